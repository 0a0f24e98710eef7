"""Embedding tables as modules of torch, whose gradients are never made: what their lookups leave goes to the
optimizer (see row_gradients.py)."""

import inspect
from typing import Any

import torch

from fastopt.torch.calls import call_of
from fastopt.torch.lookups import look_up


class _MayBeFused(torch.nn.Module):
    """The base of modules that have ``fused``, before that of torch."""

    fused = False  # of those that were pickled without

    def __init__(self, *args: Any, fused: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fused = fused

    def extra_repr(self) -> str:
        return super().extra_repr() + (", fused=True" if self.fused else "")


def _with_fused(base: type) -> inspect.Signature:
    """The arguments of torch's class, and ``fused``."""
    own = inspect.Parameter("fused", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    theirs = inspect.signature(base)
    return theirs.replace(parameters=[*theirs.parameters.values(), own])


class EmbeddingBag(_MayBeFused, torch.nn.EmbeddingBag):
    """``torch.nn.EmbeddingBag`` with the lookups and gradients of :func:`fastopt.embedding_bag`.

    ``weight.grad`` is a :class:`RowGradients`, which the optimizers of :mod:`fastopt.torch` take as it is,
    and others as a dense gradient; ``sparse`` makes no difference. What fastopt does not take goes torch's
    own way: other dtypes, strided tables, nested tensors, what is traced or under transforms of
    :mod:`torch.func`.

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
        return _embedding_bag(self, input, offsets, per_sample_weights)


class Embedding(_MayBeFused, torch.nn.Embedding):
    """``torch.nn.Embedding`` with the lookups and gradients of :func:`fastopt.embedding`; arguments and all
    else as for :class:`EmbeddingBag`."""

    __signature__ = _with_fused(torch.nn.Embedding)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """See ``torch.nn.Embedding``."""
        return _embedding(self, input)


@torch.compiler.disable
def _embedding_bag(
    module: EmbeddingBag,
    given: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    """The pooled lookup of a module."""
    call = call_of(module, given, offsets, weights)
    if call is None:
        return torch.nn.EmbeddingBag.forward(module, given, offsets, weights)
    return look_up([call])


@torch.compiler.disable
def _embedding(module: Embedding, given: torch.Tensor) -> torch.Tensor:
    """The lookup of a module."""
    call = call_of(module, given)
    if call is None:
        return torch.nn.Embedding.forward(module, given)
    return look_up([call]).reshape(*given.shape, module.embedding_dim)
