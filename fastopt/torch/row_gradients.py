"""The gradient of an embedding table as lookups leave it: which rows were read, and what came back for them.

It takes the place of the dense tensor that torch would make, of the table's size, and of the sparse one, with
a row for each index. Optimizers of :mod:`fastopt.torch` use it as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from fastopt._core.arrays import array_view, tensor_over
from fastopt._core.indices import Indices
from fastopt.gradients import IndexedSlices, SparseGradient, SumOfGradients
from fastopt.gradients.pooling import Bags
from fastopt.gradients.rows import RowGradient
from fastopt.kernels.work import Array
from fastopt.torch.memory import computed_with
from fastopt.torch.tables import TableWeight

_aten = torch.ops.aten
_MAX = 2  # torch's number of the mode
# What is done to gradients as such, and not to their numbers
COPIES = _aten.detach.default, _aten.alias.default, _aten.clone.default
SUMS = _aten.add.Tensor, _aten.add_.Tensor
_UNSCALE = _aten._amp_foreach_non_finite_check_and_unscale_.default


@dataclass(frozen=True, eq=False)
class Lookup(SparseGradient):
    """What one lookup adds to the gradient of its table: the gradient of its result.

    indices: of the table's rows. bags: whose rows were pooled, None where each was looked up alone. values:
    [bags, dim], or [indices, dim], whose rows may lie apart. Nobody else writes to these: they are read when
    the gradient is used.
    """

    indices: Indices
    bags: Bags | None
    values: torch.Tensor

    @cached_property
    def array(self) -> Array:
        """``values``."""
        return array_view(self.values, "values")

    def numbers(self, label: str) -> tuple[Array, str]:
        """``values``."""
        return self.array, label

    def checked(self, label: str, rows: int | None) -> RowGradient:
        """The gradient with its bags, which the lookup has checked."""
        return RowGradient(self.array, self.indices, self.bags)

    def dense(self, table: torch.Tensor) -> torch.Tensor:
        """As a tensor of the table's shape, in the dtype that sums are computed in."""
        values, indices = self.values, tensor_over(self.indices.flat)
        total = torch.zeros_like(table, dtype=computed_with(table))
        if self.bags is not None and self.bags.mode == "max":
            offsets = tensor_over(self.bags.offsets).to(indices.dtype)
            _, _, sizes, rows = torch._embedding_bag(
                table, indices, offsets, False, _MAX, False, None, True, self.bags.padding
            )
            filled = sizes[: len(values)] > 0
            return total.scatter_add_(0, rows[filled].to(torch.int64), values[filled].to(total.dtype))
        counting, bags, _ = self._counted()
        values = values[bags[counting]] * self.weights_of_all()[counting, None]
        return total.index_add_(0, indices[counting], values)

    def by_frequency(self) -> "Lookup":
        """The same with the gradient of each index divided by how often it is named; pooled, and not for
        "max"."""
        assert self.bags is not None
        weights = self.weights_of_all()
        _, positions, counts = tensor_over(self.indices.flat).unique(return_inverse=True, return_counts=True)
        weights = array_view(weights / counts[positions], "weights")
        bags = Bags(self.indices, self.bags.bounds, "sum", weights, self.bags.padding)
        return replace(self, bags=bags)

    def _counted(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Whether each index counts, its bag, and how many of each bag count."""
        indices = tensor_over(self.indices.flat)
        if self.bags is None:
            bags = torch.arange(len(indices), device=indices.device)
        else:
            lengths = tensor_over(self.bags.offsets).diff()
            bags = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        counting = torch.ones_like(bags, dtype=torch.bool)
        if self.bags is not None and self.bags.padding >= 0:
            counting = indices != self.bags.padding
        return counting, bags, torch.bincount(bags[counting], minlength=len(self.values))

    def weights_of_all(self) -> torch.Tensor:
        """The weight of each index, not rounded to 16 bits; not for "max"."""
        if self.bags is not None and self.bags.weights is not None:
            return tensor_over(self.bags.weights)
        weights = self.values.new_ones(self.indices.flat.size, dtype=computed_with(self.values))
        if self.bags is not None and self.bags.mode == "mean":
            _, bags, lengths = self._counted()
            weights = weights / lengths[bags].clamp(min=1)
        return weights


class RowGradients(torch.Tensor):
    """Gradients of one table by lookups, in the place of a tensor of its shape.

    Sums of such keep the lookups apart, and a ``GradScaler`` scales each back. For any other operation of
    torch it is the dense gradient, and what is done in place makes it one.

    Attributes:
        table: what the gradient is of, or, out of a compiled graph, a tensor of its shape, dtype and device
            where its numbers do not count. lookups: whose sum it is. whole: the dense gradient, if torch has
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
        if isinstance(self.table, TableWeight):
            raise RuntimeError(
                f"the gradient of lookups in {self.table.table!r} is not made dense, as torch does to clip "
                "it, to step, or to add it to the dense one of another use of the weight, as of weight.t(): "
                "expected an optimizer of fastopt.torch, clip_norm of its step, and no such use beside "
                "lookups"
            )
        total = torch.zeros_like(self.table, dtype=computed_with(self.table))
        for own in self.lookups:
            total += own.dense(self.table)
        return total.to(self.table.dtype)

    @torch.no_grad()
    def scale_(self, factor: float) -> None:
        """Multiply it in place. The values of lookups, which others may hold, stay as they are."""
        if self.whole is not None:
            self.whole *= factor
        self.lookups = tuple(replace(own, values=own.values * factor) for own in self.lookups)

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
            return self.lookups[0]
        return SumOfGradients(self.lookups)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        if func in COPIES and args[0].whole is None:
            return cls(args[0].table, args[0].lookups)
        if func in SUMS and not kwargs and all(isinstance(own, cls) and own.whole is None for own in args):
            if func is _aten.add_.Tensor:
                args[0].lookups += args[1].lookups
                return args[0]
            return cls(args[0].table, args[0].lookups + args[1].lookups)
        if func is _UNSCALE and not kwargs:
            return _unscale(*args)
        if func is _aten.zero_.default:
            args[0].lookups, args[0].whole = (), None
            return args[0]
        return _as_dense(func, args, kwargs or {})


def _unscale(gradients: Sequence[torch.Tensor], found_inf: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply gradients in place, as a ``GradScaler`` does, and set ``found_inf`` if a number is not finite.
    The values of lookups, which others may hold, are copied before."""
    numbers = []
    for gradient in gradients:
        if not isinstance(gradient, RowGradients):
            numbers.append(gradient)
        elif gradient.whole is not None:
            numbers.append(gradient.whole)
        else:
            gradient.lookups = tuple(replace(own, values=own.values.clone()) for own in gradient.lookups)
            numbers += [own.values for own in gradient.lookups]
    if numbers:
        _UNSCALE(numbers, found_inf, factor)


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
