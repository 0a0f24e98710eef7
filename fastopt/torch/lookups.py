"""Lookups in tables that are parameters of torch, and what they leave for the optimizer in the backward
pass."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastopt._core.arrays import array_view, tensor_over
from fastopt._core.backend import backend_of
from fastopt._core.indices import Indices, sort_together
from fastopt.gradients.pooling import Bags, Offsets, checked_bags, weights_dtypes
from fastopt.kernels.work import Array
from fastopt.torch import fused
from fastopt.torch.memory import DTYPES
from fastopt.torch.row_gradients import Lookup, RowGradients
from fastopt.torch.tables import array_of_table


class Call:
    """What one lookup is asked for, checked.

    Of what the caller gave there are copies where gradients may be made of it later, when other numbers may
    be in its place.

    Args:
        module: an ``EmbeddingBag`` or ``Embedding`` of torch, whose options count, or others with the
            attributes of one; ``mode`` is None of a lookup that is not pooled. table: its weight.
        indices, offsets, weights: as its ``forward`` takes them, the first two also once they are copied and
            checked. check: whether indices that lie on a device are looked at.

    Attributes:
        table, weights: as given, the latter a copy. indices: checked. bags: of a pooled lookup. fused:
            whether the backward pass updates the table.

    Raises:
        ValueError: an index is out of range, or offsets are not those of bags.
    """

    def __init__(
        self,
        module: Any,
        table: torch.Tensor,
        indices: torch.Tensor | Indices,
        offsets: torch.Tensor | Offsets | None = None,
        weights: torch.Tensor | None = None,
        check: bool = True,
    ) -> None:
        pooled = not isinstance(module, torch.nn.Embedding) and module.mode is not None
        if torch.is_grad_enabled():
            indices = indices if isinstance(indices, Indices) else copied(indices)
            weights = None if weights is None else copied(weights)
        self.table = table
        self.weights = weights
        self.fused = bool(getattr(module, "fused", False))
        self._padding = module.padding_idx
        self._by_frequency = bool(module.scale_grad_by_freq) and not (pooled and module.mode == "max")
        self.bags: Bags | None = None
        if pooled:
            given = SimpleNamespace(
                indices=indices,
                offsets=offsets,
                mode=module.mode,
                per_sample_weights=weights,
                padding_idx=module.padding_idx,
                include_last_offset=module.include_last_offset and offsets is not None,
                check_indices=check,
            )
            dtypes = () if weights is None else weights_dtypes(DTYPES[table.dtype])
            self.bags = checked_bags(given, "", table.shape[0], dtypes)
            self.indices = self.bags.indices
        else:
            self.indices = Indices.checked(indices, "indices", table.shape[0], check)

    @property
    def rows(self) -> int:
        """How many rows the result has."""
        return self.indices.flat.size if self.bags is None else self.bags.count

    @property
    def takes_maxima(self) -> bool:
        """Whether rows are pooled to their maxima, which are found in the table once more where the gradient
        is used."""
        return self.bags is not None and self.bags.mode == "max"

    def result(self, table: Array) -> Array:
        """What is looked up in ``table``, the array of the table: a new array."""
        if self.bags is None:
            return backend_of(table).gather(table, self.indices.flat)
        return self.bags.pool_max(table)[0] if self.takes_maxima else self.bags.pool(table)

    def lookup(self, values: torch.Tensor) -> Lookup:
        """What is left of it for the table's gradient, ``values`` being that of the result."""
        bags, own = self.bags, self.indices
        if bags is None and (self._by_frequency or self._padding is not None):
            offsets = Offsets(backend_of(own.array).regular_offsets(own.flat.size, 1))
            bags = Bags(own, offsets, "sum", None, -1 if self._padding is None else self._padding)
        found = Lookup(own, bags, values)
        return found.by_frequency() if self._by_frequency else found

    def gradient_of_weights(self, values: torch.Tensor) -> torch.Tensor:
        """The gradient of the weights of a pooled lookup."""
        assert self.bags is not None and self.weights is not None
        table, own = array_of_table(self.table), array_view(values.contiguous(), "values")
        found = self.bags.products(table, own, DTYPES[self.weights.dtype])
        return tensor_over(found).reshape(self.weights.shape)


def look_up(calls: Sequence[Call]) -> torch.Tensor:
    """The results of lookups side by side, [rows, sum of dims]; all have as many rows, and their tables one
    dtype and device."""
    weights = [call.weights for call in _weighted(calls)]
    return _LookedUp.apply(calls, *(call.table for call in calls), *weights)


class _LookedUp(torch.autograd.Function):
    """Lookups, and what they leave in the backward pass."""

    @staticmethod
    def forward(ctx: Any, calls: Sequence[Call], *given: torch.Tensor) -> torch.Tensor:
        ctx.calls = calls
        of_weights = ctx.needs_input_grad[1 + len(calls) :]
        reread = [call.table for call in calls if call.takes_maxima]
        reread += [call.table for call, needed in zip(_weighted(calls), of_weights, strict=True) if needed]
        ctx.save_for_backward(*reread)  # the backward pass reads them: they may not have changed
        return results(calls)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        ctx.saved_tensors  # noqa: B018  raises if a table has changed, where that matters
        calls: Sequence[Call] = ctx.calls
        needed = ctx.needs_input_grad[1:]
        learning = [call for call, learns in zip(calls, needed, strict=False) if learns]
        if not all(call.fused for call in learning):
            grad_output = copied(grad_output)  # which may be the caller's, or the gradient of others, too
        elif grad_output.stride(1) != 1:
            grad_output = grad_output.contiguous()
        values = dict(zip(calls, grad_output.split([call.table.shape[1] for call in calls], 1), strict=True))
        of_weights = [
            call.gradient_of_weights(values[call]) if learns else None
            for call, learns in zip(_weighted(calls), needed[len(calls) :], strict=True)
        ]
        of_tables = gradients_of_tables(learning, values)
        return None, *map(of_tables.get, calls), *of_weights


def gradients_of_tables(
    calls: Sequence[Call], values: Mapping[Call, torch.Tensor]
) -> dict[Call, RowGradients]:
    """What lookups leave for the gradients of their tables, ``values`` being those of their results. Tables
    that are fused are updated, and nothing is left for them."""
    sort_together([call.indices for call in calls])
    found = {call: RowGradients(call.table, [call.lookup(values[call])]) for call in calls}
    fused.update((call.table, found.pop(call)) for call in calls if call.fused)
    return found


def _weighted(calls: Sequence[Call]) -> list[Call]:
    return [call for call in calls if call.weights is not None]


def results(calls: Sequence[Call]) -> torch.Tensor:
    """What is looked up, side by side."""
    tables = [array_of_table(call.table) for call in calls]
    if len(calls) == 1:
        return tensor_over(calls[0].result(tables[0]))
    backend = backend_of(tables[0])
    bounds = [*accumulate((table.shape[1] for table in tables), initial=0)]
    out = backend.empty((calls[0].rows, bounds[-1]), tables[0].dtype)
    columns = [out[:, a:b] for a, b in pairwise(bounds)]
    pooled = []
    for call, table, own in zip(calls, tables, columns, strict=True):
        if call.bags is None or call.takes_maxima:
            own[...] = call.result(table)
        else:
            pooled.append(call.bags.lookup(table, own))
    backend.pool(pooled)
    return tensor_over(out)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy: before it is used others may write to what was given."""
    return tensor.clone(memory_format=torch.contiguous_format)
