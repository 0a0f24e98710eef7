"""Clipping by the norm of all gradients, wherever their parameters are."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import fastopt
from fastopt._core.indices import sort_together
from fastopt._core.options import check_limit
from fastopt._step.norms import DenseSquares, clip_factor, norm_of
from fastopt.distributed.collection import ShardedEmbeddingBagCollection
from fastopt.gradients.rows import RowGradient
from fastopt.torch.memory import local
from fastopt.torch.row_gradients import RowGradients
from fastopt.torch.tables import array_of_table


def clip_grad_norm_(module: torch.nn.Module, max_norm: float) -> float:
    """Scale the gradients of a module's parameters in place by ``min(1, max_norm / (norm + 1e-6))``.

    The semantics of ``torch.nn.utils.clip_grad_norm_`` of one process that has all parameters and the
    gradients of all ranks: the tables of every :class:`ShardedEmbeddingBagCollection` within the module and
    the shards of DTensors, as of ``fully_shard``, count over all ranks that have a part; other parameters are
    those that all ranks have, as of ``DistributedDataParallel``, and count once. Gradients of tables stay
    gradients by rows; rows named several times count as their sum.

    Every rank calls it, after the backward pass, also one whose parameters have no gradients.

    Args:
        module: the whole model.
        max_norm: at least 0.

    Returns:
        The norm before clipping, the same on all ranks: NaN or infinite where a gradient is.

    Raises:
        ValueError, TypeError: ``max_norm`` is no number, or below 0.
        ValueError: a DTensor is a partial sum, or a table is fused, whose gradient is gone.
    """
    max_norm = check_limit(max_norm, "max_norm")
    for name, own in module.named_modules():
        if getattr(own, "fused", False):
            raise ValueError(f"{name} is fused, and updated in the backward pass: expected fused=False")
    square = 0.0
    for parameters, groups in _alike(module):
        own = torch.tensor(_square(parameters), dtype=torch.float64, device=parameters[0].device)
        for group in groups:
            dist.all_reduce(own, group=group)
        square += own.item()
    norm = math.sqrt(square)
    factor = clip_factor(norm, max_norm)
    if factor != 1.0:
        for p in module.parameters():
            if p.grad is not None:
                _scale(p.grad, factor)
    return norm


def _alike(module: torch.nn.Module) -> Iterator[tuple[list[torch.nn.Parameter], list[Any]]]:
    """The parameters of a module, those together that are shared out over the same groups, with these; in the
    same order on every rank."""
    of_tables = {
        id(p): own.group
        for own in module.modules()
        if isinstance(own, ShardedEmbeddingBagCollection)
        for p in own.parameters()
    }
    found: dict[tuple, tuple[list[torch.nn.Parameter], list[Any]]] = {}
    for name, p in module.named_parameters():
        if id(p) in of_tables:
            groups = [of_tables[id(p)]]
        else:
            groups = _groups_of_shards(name, p)
        found.setdefault(tuple(map(id, groups)), ([], groups))[0].append(p)
    yield from found.values()


def _groups_of_shards(name: str, p: torch.nn.Parameter) -> list[Any]:
    if not isinstance(p, DTensor):
        return []
    given = p.grad.placements if isinstance(p.grad, DTensor) else p.placements
    if any(own.is_partial() for own in given):
        raise ValueError(f"the gradient of {name!r} is a partial sum: expected shards or copies")
    return [p.device_mesh.get_group(k) for k, own in enumerate(p.placements) if own.is_shard()]


def _square(parameters: list[torch.nn.Parameter]) -> float:
    """The sum of the squares of what lies here of the gradients of parameters."""
    dense: list[torch.Tensor] = []
    by_rows: list[RowGradient] = []
    for p in parameters:
        gradient: Any = None if p.grad is None else local(p.grad)
        if isinstance(gradient, RowGradients):
            gradient = gradient.gradient()
        if isinstance(gradient, fastopt.SparseGradient):
            checked = gradient.checked("gradient", p.shape[0])
            if checked.takes_maxima:
                checked.find_winners(array_of_table(p))
            by_rows.append(checked)
        elif gradient is not None:
            dense.append(gradient.contiguous() if gradient.layout is torch.strided else gradient)
    sort_together([own.indices for own in by_rows])
    of_rows = norm_of(DenseSquares([]), np.empty(0, np.int64), by_rows)
    return fastopt.grad_norm(dense) ** 2 + of_rows**2


def _scale(gradient: torch.Tensor, factor: float) -> None:
    """Multiply what lies here of a gradient in place."""
    own = local(gradient)
    own.scale_(factor) if isinstance(own, RowGradients) else own.mul_(factor)
