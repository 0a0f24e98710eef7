"""The gradient of an embedding table as lookups leave it: which rows were read, and what came back for them.

It takes the place of the dense tensor that torch would make, of the table's size, and of the sparse one, with
a row for each index. Optimizers of :mod:`fastopt.torch` use it as it is.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves, tree_map

from fastopt._core.indices import IndexPlan
from fastopt.gradients import BagGradient, IndexedSlices, SparseGradient, SumOfGradients

_aten = torch.ops.aten
_MAX = 2  # torch's number of the mode
_COPIES = _aten.detach.default, _aten.alias.default, _aten.clone.default
_SUMS = _aten.add.Tensor, _aten.add_.Tensor


class Lookup(NamedTuple):
    """One lookup, and the gradient of its result.

    indices: 1-D, int32 or int64. offsets: int32 or int64 [bags + 1], None where each index is looked up
    alone. values: [bags, dim], or [indices, dim]. mode: "sum", "mean" or "max". weights: one for each index,
    with "sum" alone, or None. padding: a row that counts for nothing, or None. plan: of the indices. All are
    contiguous, and nobody else writes to them: they are read when the gradient is used.
    """

    indices: torch.Tensor
    offsets: torch.Tensor | None
    values: torch.Tensor
    mode: str
    weights: torch.Tensor | None
    padding: int | None
    plan: IndexPlan

    def gradient(self) -> SparseGradient:
        """As the plain optimizers take it."""
        if self.offsets is None:
            return IndexedSlices(self.plan, self.values)
        own = self.mode, self.weights, self.padding
        return BagGradient(self.plan, self.offsets, self.values, *own, include_last_offset=True)

    def dense(self, table: torch.Tensor) -> torch.Tensor:
        """As a tensor of the table's shape, in the dtype that sums are computed in."""
        total = torch.zeros_like(table, dtype=_computed_with(table))
        if self.mode == "max":
            assert self.offsets is not None
            offsets = self.offsets.to(self.indices.dtype)
            padding = -1 if self.padding is None else self.padding
            _, _, sizes, rows = torch._embedding_bag(
                table, self.indices, offsets, False, _MAX, False, None, True, padding
            )
            filled = sizes[: len(self.values)] > 0
            return total.scatter_add_(0, rows[filled].to(torch.int64), self.values[filled].to(total.dtype))
        counting, bags, _ = self._counted()
        values = self.values[bags[counting]] * self.weights_of_all()[counting, None]
        return total.index_add_(0, self.indices[counting], values)

    def by_frequency(self) -> "Lookup":
        """The same with the gradient of each index divided by how often it is named; not for "max"."""
        weights = self.weights_of_all()
        _, positions, counts = self.indices.unique(return_inverse=True, return_counts=True)
        return self._replace(mode="sum", weights=weights / counts[positions])

    def _counted(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Whether each index counts, its bag, and how many of each bag count."""
        if self.offsets is None:
            bags = torch.arange(len(self.indices), device=self.indices.device)
        else:
            lengths = self.offsets.diff().to(torch.int64)
            bags = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        counting = torch.ones_like(bags, dtype=torch.bool)
        if self.padding is not None:
            counting = self.indices != self.padding
        return counting, bags, torch.bincount(bags[counting], minlength=len(self.values))

    def weights_of_all(self) -> torch.Tensor:
        """The weight of each index, not rounded to 16 bits; not for "max"."""
        dtype = _computed_with(self.values)
        if self.weights is not None:
            return self.weights.to(dtype)
        weights = self.values.new_ones(len(self.indices), dtype=dtype)
        if self.mode == "mean":
            _, bags, lengths = self._counted()
            weights = weights / lengths[bags].clamp(min=1)
        return weights


def _computed_with(table: torch.Tensor) -> torch.dtype:
    """The dtype that a table's gradients are added up in."""
    return torch.float32 if table.dtype.itemsize == 2 else table.dtype


class RowGradients(torch.Tensor):
    """Gradients of one table by lookups, in the place of a tensor of its shape.

    Sums of such keep the lookups apart. For any other operation of torch it is the dense gradient, and what
    is done in place makes it one.

    Attributes:
        table: what the gradient is of. lookups: whose sum it is. whole: the dense gradient, if torch has
            changed it in place; then there are no lookups.
    """

    table: torch.Tensor
    lookups: tuple[Lookup, ...]
    whole: torch.Tensor | None

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, table: torch.Tensor, lookups: Sequence[Lookup]) -> "RowGradients":
        return torch.Tensor._make_wrapper_subclass(cls, table.shape, dtype=table.dtype, device=table.device)

    def __init__(self, table: torch.Tensor, lookups: Sequence[Lookup]) -> None:
        self.table = table.detach()
        self.lookups = tuple(lookups)
        self.whole = None

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return f"RowGradients(shape={tuple(self.shape)}, lookups={len(self.lookups)})"

    def dense(self) -> torch.Tensor:
        """The dense gradient."""
        if self.whole is not None:
            return self.whole
        total = torch.zeros_like(self.table, dtype=_computed_with(self.table))
        for own in self.lookups:
            total += own.dense(self.table)
        return total.to(self.table.dtype)

    def numpy(self, *, force: bool = False) -> Any:
        """The dense gradient as an array."""
        return self.dense().numpy(force=force)

    def tolist(self) -> list:
        """The dense gradient as lists."""
        return self.dense().tolist()

    def gradient(self) -> SparseGradient | torch.Tensor:
        """As the plain optimizers take it: by rows, where it can be."""
        if self.whole is not None:
            return self.whole
        if not self.lookups:
            none = torch.zeros(0, dtype=torch.int64, device=self.table.device)
            return IndexedSlices(none, self.table.new_zeros(0, self.table.shape[1]))
        if len(self.lookups) == 1:
            return self.lookups[0].gradient()
        return SumOfGradients([own.gradient() for own in self.lookups])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        if func in _COPIES and args[0].whole is None:
            return cls(args[0].table, args[0].lookups)
        if func in _SUMS and not kwargs and all(isinstance(own, cls) and own.whole is None for own in args):
            if func is _aten.add_.Tensor:
                args[0].lookups += args[1].lookups
                return args[0]
            return cls(args[0].table, args[0].lookups + args[1].lookups)
        if func is _aten.zero_.default:
            args[0].lookups, args[0].whole = (), None
            return args[0]
        return _as_dense(func, args, kwargs or {})


def _as_dense(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What an operation of torch makes of dense gradients; those that it writes become dense."""
    dense = {id(own): own.dense() for own in tree_leaves((args, kwargs)) if isinstance(own, RowGradients)}

    def taken(own: Any) -> Any:
        return dense[id(own)] if isinstance(own, RowGradients) else own

    result = func(*tree_map(taken, args), **tree_map(taken, kwargs))
    returned = {id(whole): key for key, whole in dense.items()}
    written = {}
    for argument, given in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            for own in tree_leaves(given):
                if isinstance(own, RowGradients):
                    own.lookups, own.whole = (), dense[id(own)]
                    written[id(own)] = own
    return tree_map(lambda own: written.get(returned.get(id(own), 0), own), result)
