"""Lookups in the graphs of ``torch.compile``: one op, which it takes as it is, and what the op leaves for
tables in the backward pass (see traced.py)."""

from collections.abc import Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from fastopt.torch.calls import fits, limit_norms
from fastopt.torch.kept import is_laid_out
from fastopt.torch.lookups import copied, results
from fastopt.torch.ops import opaque
from fastopt.torch.tables import TableWeight
from fastopt.torch.traced import MODES, WITNESS, Part, gradient, options_of

# The compilers of torch 2.5 and 2.8 make such gradients dense; of the versions since, this one was tried.
_FITS = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"

_sites = count()  # the calls in graphs, whose gradients are told apart by it


class Asked(NamedTuple):
    """A lookup of a module. table: its weight, read once, as it may be computed. The others are as its
    ``forward`` takes them."""

    module: torch.nn.EmbeddingBag | torch.nn.Embedding
    table: torch.Tensor
    indices: torch.Tensor
    offsets: torch.Tensor | None = None
    weights: torch.Tensor | None = None


def has_op(module: torch.nn.Module) -> bool:
    """Whether there is an op for lookups in a module's table: there is none for those in files. Lookups
    without one are no part of the graph."""
    return _FITS and not isinstance(module.weight, TableWeight)


def takes(asked: Asked) -> bool:
    """Whether a lookup is fastopt's, in a graph that is traced."""
    return (
        not torch.compiler.is_exporting()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and is_laid_out(asked.table)  # an op never meets negatives: torch computes them before
        and fits(*asked)
    )


def look_up(many: Sequence[Asked]) -> torch.Tensor:
    """The results of lookups that :func:`takes` has let pass, side by side, [rows, sum of dims]."""
    tables: list[torch.Tensor] = []
    tensors: list[torch.Tensor] = []
    numbers: list[int] = []
    for module, table, indices, offsets, weights in many:
        limit_norms(module, table, indices)
        places = [k for k, own in enumerate(tables) if own is table]
        if not places:
            tables.append(table)
        pooled = isinstance(module, torch.nn.EmbeddingBag)
        numbers += [
            MODES.index(module.mode) if pooled else 0,
            -1 if module.padding_idx is None else module.padding_idx,
            1 if module.scale_grad_by_freq else 0,
            1 if pooled and module.include_last_offset else 0,
            1 if getattr(module, "fused", False) else 0,
            places[0] if places else len(tables) - 1,
            0 if offsets is None else 1,
            0 if weights is None else 1,
        ]
        tensors += [own for own in (indices, offsets, weights) if own is not None]
    return _in_graph(numbers, len(tables), WITNESS, *tables, *tensors)


@torch.compiler.allow_in_graph
def _in_graph(
    numbers: Sequence[int], tables: int, witness: torch.Tensor, *given: torch.Tensor
) -> torch.Tensor:
    """The results of lookups in the first tensors, so many tables, of what the others hold."""
    return _LookedUp.apply(numbers, tables, *given)[0]


def _looks_like(
    tables: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], numbers: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    many = options_of(numbers)
    indices, offsets, _ = many[0].given(iter(tensors))
    if many[0].mode is None:
        rows = indices.numel()
    else:
        rows = indices.shape[0] if offsets is None else offsets.shape[0] - many[0].with_last
    out = tables[0].new_empty(rows, sum(tables[own.table].shape[1] for own in many))
    return out, torch.empty(len(tables), dtype=torch.int64)


@opaque("look_up(Tensor[] tables, Tensor[] tensors, int[] numbers) -> (Tensor, Tensor)", _looks_like)
def _look_up(
    tables: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], numbers: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The results of lookups in tables, each of which is given once, and where the tables lie, by which those
    that are fused are known. tensors: what each lookup is given."""
    rest = iter(tensors)
    calls = [own.call(tables[own.table], rest, check=True) for own in options_of(numbers)]
    for name, found in (
        ("numbers of bags", [call.rows for call in calls]),
        ("dtypes", [call.table.dtype for call in calls]),
    ):
        if len(set(found)) > 1:
            raise ValueError(f"lookups of a collection have these {name}: {found}, expected the same of all")
    return results(calls), torch.tensor([table.data_ptr() for table in tables])


@opaque(
    "gradient_of_weights(Tensor table, Tensor values, Tensor[] tensors, int[] numbers) -> Tensor",
    lambda table, values, tensors, numbers: tensors[-1].new_empty(tensors[-1].shape),
)
def _gradient_of_weights(
    table: torch.Tensor, values: torch.Tensor, tensors: Sequence[torch.Tensor], numbers: Sequence[int]
) -> torch.Tensor:
    """The gradient of the weights of one lookup, ``values`` being that of its result."""
    [own] = options_of(numbers)
    return own.call(table, iter(tensors)).gradient_of_weights(values)


class _LookedUp(torch.autograd.Function):
    """The op, and what it leaves in the backward pass."""

    @staticmethod
    def forward(ctx: Any, numbers: Sequence[int], count: int, *given: torch.Tensor) -> tuple:
        tables, tensors = given[:count], given[count:]
        ctx.many, ctx.shapes = options_of(numbers), [table.shape for table in tables]
        rest, needed, reread = iter(tensors), iter(ctx.needs_input_grad[2 + count :]), set()
        for own in ctx.many:
            learns = [next(needed) for one in own.given(rest) if one is not None]
            if own.mode == "max" or (own.has_weights and learns[-1]):
                reread.add(own.table)
        ctx.reread = sorted(reread)  # the tables that the backward pass reads: they may not have changed
        found, places = _look_up(tables, tensors, numbers)
        ctx.save_for_backward(places, *(tables[k] for k in ctx.reread), *tensors)
        ctx.mark_non_differentiable(places)
        return found, places

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor, _: Any) -> tuple:
        places, *saved = ctx.saved_tensors
        tables = dict(zip(ctx.reread, saved, strict=False))
        rest, tables_learn = iter(saved[len(tables) :]), ctx.needs_input_grad[2:]
        needed = iter(tables_learn[len(ctx.shapes) :])
        site, parts = next(_sites), [list[Part]() for _ in ctx.shapes]
        of_tensors: list[torch.Tensor | None] = []
        dims = [ctx.shapes[own.table][1] for own in ctx.many]
        for options, values in zip(ctx.many, copied(grad_output).split(dims, 1), strict=True):
            k, own = options.table, options._replace(table=0)
            given = [one for one in own.given(rest) if one is not None]
            learns = [next(needed) for _ in given]
            of_tensors += [None for _ in given]
            if own.has_weights and learns[-1]:
                of_tensors[-1] = _gradient_of_weights(tables[k], values, given, own)
            if tables_learn[k]:
                tensors = [values, *map(copied, given)]
                tensors += [tables[k]] if own.mode == "max" else []
                tensors += [places[k].clone()] if own.fused else []
                parts[k].append(Part(site, own, tensors))
        of_tables = [
            gradient(own, shape) if own else None for own, shape in zip(parts, ctx.shapes, strict=True)
        ]
        return None, None, *of_tables, *of_tensors
