"""The gradients of tables in graphs that ``torch.compile`` traces.

There the gradient of a table is a :class:`TracedGradients`, which names the tensors that it is made of, so
that compilers see these and no tensor of the table's size. Out of the graph comes a :class:`RowGradients` of
the same, or, for a table that is fused, its update.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

from fastopt.torch import fused
from fastopt.torch.lookups import Call
from fastopt.torch.ops import opaque
from fastopt.torch.row_gradients import COPIES, SUMS, RowGradients

MODES = None, "sum", "mean", "max"


class Options(NamedTuple):
    """What a lookup is asked for, in whole numbers, and read as from a module, as a :class:`Call` does.

    mode_number: the place in ``MODES``, 0 for rows that are not pooled. padding: a row, or -1. table: which
    of the tables of an op. has_offsets, has_weights: whether there are such.
    """

    mode_number: int
    padding: int
    scale_grad_by_freq: int
    with_last: int
    fused: int
    table: int
    has_offsets: int
    has_weights: int

    @property
    def mode(self) -> str | None:
        return MODES[self.mode_number]

    @property
    def padding_idx(self) -> int | None:
        return None if self.padding < 0 else self.padding

    @property
    def include_last_offset(self) -> bool:
        return bool(self.with_last)

    def call(self, table: torch.Tensor, tensors: Iterator[torch.Tensor], check: bool = False) -> Call:
        """The lookup of the indices, offsets and weights that come next."""
        return Call(self, table, *self.given(tensors), check=check)

    def given(self, tensors: Iterator[torch.Tensor]) -> tuple[torch.Tensor, Any, Any]:
        """The indices, offsets and weights that come next."""
        indices = next(tensors)
        offsets = next(tensors) if self.has_offsets else None
        return indices, offsets, next(tensors) if self.has_weights else None


def options_of(numbers: Sequence[int]) -> list[Options]:
    """Those of each lookup, which stand one after the other."""
    width = len(Options._fields)
    return [Options(*numbers[k : k + width]) for k in range(0, len(numbers), width)]


class Part(NamedTuple):
    """What one lookup adds to the gradient of its table.

    site: which of the calls in the graph it belongs to. tensors: the gradient of the result, what was looked
    up, the table, if maxima were taken, and where it lies, if it is fused.
    """

    site: int
    options: Options
    tensors: list[torch.Tensor]

    @classmethod
    def of(cls, site: int, options: Options, tensors: Iterator[torch.Tensor]) -> "Part":
        """The part whose tensors come next."""
        width = 2 + options.has_offsets + options.has_weights + (options.mode == "max") + options.fused
        return cls(site, options, [next(tensors) for _ in range(width)])

    @property
    def values(self) -> torch.Tensor:
        return self.tensors[0]

    @property
    def place(self) -> int:
        """Where the table lies, if it is fused."""
        return int(self.tensors[-1])

    def table(self, shape: Sequence[int]) -> torch.Tensor:
        """The table, where its numbers count; otherwise a tensor like it, in the memory of one number."""
        if self.options.mode == "max":
            return self.tensors[-2 if self.options.fused else -1]
        return self.values.new_empty(()).expand(*shape)


def delivered(parts: Sequence[Part], shape: Sequence[int]) -> RowGradients | None:
    """The gradient that goes to a table of this shape, None if the backward pass updates it, which it has
    then: once for each call in the graph."""
    for _, alike in groupby((part for part in parts if part.options.fused), lambda part: part.site):
        own = list(alike)
        fused.update([(fused.parameter_at(own[0].place, shape), _by_rows(own, shape))])
    left = [part for part in parts if not part.options.fused]
    return _by_rows(left, shape) if left else None


def _by_rows(parts: Sequence[Part], shape: Sequence[int]) -> RowGradients:
    lookups = []
    for part in parts:
        call = part.options.call(part.table(shape), iter(part.tensors[1:]))
        lookups.append(call.lookup(part.values))
    # Maxima are found in the table, whatever else is added
    chosen = next((part for part in parts if part.options.mode == "max"), parts[0])
    return RowGradients(chosen.table(shape), lookups)


@opaque(
    "dense_gradient(Tensor[] tensors, int[] numbers, SymInt rows) -> Tensor",
    lambda tensors, numbers, rows: tensors[0].new_empty(rows, tensors[0].shape[1]),
)
def _dense_gradient(tensors: Sequence[torch.Tensor], numbers: Sequence[int], rows: int) -> torch.Tensor:
    """The dense gradient of a table of so many rows; tensors: those of all parts."""
    rest = iter(tensors)
    parts = [Part.of(0, options, rest) for options in options_of(numbers)]
    return _by_rows(parts, (rows, parts[0].values.shape[1])).dense()


class TracedGradients(torch.Tensor):
    """What :class:`RowGradients` is out of graphs: sums keep the parts, for all other operations it is the
    dense gradient.

    Args:
        parts: whose sum it is. shape: the table's.
    """

    parts: list[Part]

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, parts: Sequence[Part], shape: Sequence[int]) -> "TracedGradients":
        values = parts[0].values
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=values.dtype, device=values.device)

    def __init__(self, parts: Sequence[Part], shape: Sequence[int]) -> None:
        self.parts = list(parts)
        vars(self).update(self._named())

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"TracedGradients(shape={tuple(self.shape)}, lookups={len(self.parts)})"

    def _named(self) -> dict[str, torch.Tensor]:
        """All tensors, by the names of attributes, by which compilers read them."""
        tensors = (own for part in self.parts for own in part.tensors)
        return {f"tensor_{k}": own for k, own in enumerate(tensors)}

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return [*self._named()], [(part.site, part.options) for part in self.parts]

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], own: Any, size: Any, stride: Any) -> Any:
        """The gradient of these tensors; at the end of a backward pass, that which goes to the table."""
        tensors = iter(inner.values())
        parts = [Part.of(site, options, tensors) for site, options in own]
        return gradient(parts, size)

    def dense(self) -> torch.Tensor:
        """The dense gradient, by an op."""
        numbers = [number for part in self.parts for number in part.options]
        return _dense_gradient([*self._named().values()], numbers, self.shape[0])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        if func in COPIES:
            return cls(args[0].parts, args[0].shape)
        if func in SUMS and not kwargs and all(isinstance(own, cls) for own in args):
            return cls(args[0].parts + args[1].parts, args[0].shape)
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func} with the gradient of a table, in a graph that is compiled")

        def taken(own: Any) -> Any:
            return own.dense() if isinstance(own, cls) else own

        return func(*tree_map(taken, args), **tree_map(taken, kwargs or {}))


def gradient(parts: Sequence[Part], shape: Sequence[int]) -> Any:
    """What a table of this shape gets: in a graph that is traced, where tensors have no numbers, the
    :class:`TracedGradients`."""
    return (delivered if type(parts[0].values) is torch.Tensor else TracedGradients)(parts, shape)


class _Witness(torch.Tensor):
    """A tensor without numbers, of a class like :class:`TracedGradients`."""

    own: torch.Tensor

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, own: torch.Tensor) -> "_Witness":
        return torch.Tensor._make_wrapper_subclass(cls, own.shape, dtype=own.dtype, device=own.device)

    def __init__(self, own: torch.Tensor) -> None:
        self.own = own

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return "_Witness()"

    def _stable_hash_for_caching(self) -> str:
        return "all are alike"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["own"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], own: Any, size: Any, stride: Any) -> "_Witness":
        return _Witness(inner["own"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        def taken(own: Any) -> Any:
            return own.own if isinstance(own, cls) else own

        return func(*tree_map(taken, args), **tree_map(taken, kwargs or {}))


# A graph is to be given such a tensor: compilers do not look for one among its gradients otherwise
WITNESS = _Witness(torch.zeros(0))
