"""Embedding tables as modules of torch, whose gradients are never made: what their lookups leave goes to the
optimizer (see row_gradients.py)."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch

from fastopt.tables.table import Table
from fastopt.torch import compiled
from fastopt.torch.calls import call_of
from fastopt.torch.lookups import look_up
from fastopt.torch.tables import TableWeight


class _OfTable(torch.nn.Module):
    """What the modules have before that of torch: ``fused``, and tables in files, which stay where they are
    when the model is moved, converted or saved."""

    fused = False  # of those that were pickled without

    def __init__(self, *args: Any, fused: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fused = fused

    @classmethod
    def from_table(cls, table: Table, **options: Any) -> Self:
        """A module over a table in files, which is not copied.

        Its weight is a parameter over the memory that the files are mapped to. The optimizers of
        :mod:`fastopt.torch` update the rows that were looked up, with the state in the table's files; its
        gradient is never made dense. ``optimizer.flush()``, ``optimizer.state_dict()`` and the end of the
        table's ``with`` block make what counts after a crash.

        Args:
            table: one of :func:`fastopt.open_table`.
            options: as for the class, but for the numbers of rows and columns, ``device`` and ``dtype``.

        Raises:
            TypeError: ``table`` is none.
            ValueError: it is closed; so say lookups and steps if it is closed later.

        The weight is not in the model's ``state_dict()``, since the table is stored by flushes. It stays on
        the CPU, in its dtype, whatever ``.to()`` and the like do with the model, and is not copied or
        pickled. In a forked child rows may be read, but not updated.

        Example:
            >>> with fastopt.open_table("items.table", rows=10**9, dim=64) as table:
            ...     bag = EmbeddingBag.from_table(table, mode="sum")
            ...     optimizer = RowwiseAdagrad(bag.parameters(), lr=0.1)
            ...     bag(torch.tensor([[3, 999_999_999]])).sum().backward()
            ...     optimizer.step()
        """
        weight = TableWeight(table)
        return cls(*weight.shape, _weight=weight, **options)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", fused=True" if self.fused else "")

    @contextmanager
    def _without_files(self) -> Iterator[None]:
        """While this lasts, a weight that lies in files is not among the parameters."""
        own = {name: p for name, p in self._parameters.items() if isinstance(p, TableWeight)}
        self._parameters.update(dict.fromkeys(own))
        try:
            yield
        finally:
            self._parameters.update(own)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        with self._without_files():
            return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *given: Any) -> None:
        with self._without_files():
            super()._save_to_state_dict(*given)

    def _load_from_state_dict(self, *given: Any) -> None:
        with self._without_files():
            super()._load_from_state_dict(*given)


def _with_fused(base: type) -> inspect.Signature:
    """The arguments of torch's class, and ``fused``."""
    own = inspect.Parameter("fused", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    theirs = inspect.signature(base)
    return theirs.replace(parameters=[*theirs.parameters.values(), own])


class EmbeddingBag(_OfTable, torch.nn.EmbeddingBag):
    """``torch.nn.EmbeddingBag`` with the lookups and gradients of :func:`fastopt.embedding_bag`.

    ``weight.grad`` is a :class:`RowGradients`, which the optimizers of :mod:`fastopt.torch` take as it is,
    and others as a dense gradient; ``sparse`` makes no difference. What fastopt does not take goes torch's
    own way: other dtypes, strided tables, nested tensors, what is traced or under transforms of
    :mod:`torch.func`. In a graph of ``torch.compile`` the lookup is one op.

    Args:
        fused: whether the backward pass itself has the table's optimizer, one of :mod:`fastopt.torch`, update
            the rows that were looked up, so that no gradient is left: each lookup is an update of its own,
            which no clipping of norms, ``GradScaler`` or sum over passes sees. ``optimizer.step()`` updates
            all other parameters. False by default.
        others: as for ``torch.nn.EmbeddingBag``.
    """

    __signature__ = _with_fused(torch.nn.EmbeddingBag)

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``torch.nn.EmbeddingBag``."""
        found = _looked_up(self, input, offsets, per_sample_weights)
        return super().forward(input, offsets, per_sample_weights) if found is None else found


class Embedding(_OfTable, torch.nn.Embedding):
    """``torch.nn.Embedding`` with the lookups and gradients of :func:`fastopt.embedding`; arguments and all
    else as for :class:`EmbeddingBag`."""

    __signature__ = _with_fused(torch.nn.Embedding)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """See ``torch.nn.Embedding``."""
        found = _looked_up(self, input)
        return super().forward(input) if found is None else found.reshape(*input.shape, self.embedding_dim)


def _looked_up(
    module: EmbeddingBag | Embedding,
    given: torch.Tensor,
    offsets: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """What a module looks up, a row for each bag or index; None if that is torch's."""
    if torch.compiler.is_compiling() and compiled.has_op(module):
        asked = compiled.Asked(module, module.weight, given, offsets, weights)
        return compiled.look_up([asked]) if compiled.takes(asked) else None
    if torch.compiler.is_dynamo_compiling():
        return _out_of_graphs(module, given, offsets, weights)
    call = call_of(module, module.weight, given, offsets, weights)
    return None if call is None else look_up([call])


_out_of_graphs = torch.compiler.disable(_looked_up)
