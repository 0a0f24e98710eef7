"""The norm of the gradients of all ranks together, and clipping by it."""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from fastopt.clipping import grad_norm
from fastopt.distributed.collection import ShardedEmbeddingBagCollection
from fastopt.gradients import SparseGradient
from fastopt.torch.row_gradients import RowGradients

_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


@torch.no_grad()
def clip_grad_norm_(model: torch.nn.Module, max_norm: float) -> float:
    """Scale all gradients of a model, on all ranks, by ``min(1, max_norm / (norm + 1e-6))``.

    Every rank calls it, between the backward pass and the steps. The norm is that of all gradients together:
    sharded tables by what each rank has of them, rows named several times counted as their sum; DTensors as
    wholes; other parameters, whose gradients ``DistributedDataParallel`` has made the same on all ranks,
    once. Those of tables stay by rows, but for mode "max", where the norm is found by a dense gradient of the
    part.

    Args:
        model: with :class:`ShardedEmbeddingBagCollection` anywhere within. max_norm: at least 0.

    Returns:
        The norm before clipping: the same number on all ranks.

    Raises:
        ValueError: ``max_norm`` is below 0, or a table is fused, whose gradient is gone.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm is {max_norm!r}: expected at least 0")
    collections = [own for own in model.modules() if isinstance(own, ShardedEmbeddingBagCollection)]
    sharded: set[int] = set()
    square = 0.0
    for collection in collections:
        for table in collection.layout.tables:
            if table.own.fused:
                raise ValueError(
                    f"table {table.name!r} is fused, and updated in the backward pass: expected fused=False"
                )
        own = [p for p in collection.parameters() if p.grad is not None]
        sharded.update(map(id, own))
        total = torch.tensor(_square([p.grad for p in own]), dtype=torch.float64)
        total = total.to(collection.layout.tables[0].own.weight.device)
        dist.all_reduce(total, group=collection.group)
        square += float(total)
    others = [p.grad for p in model.parameters() if p.grad is not None and id(p) not in sharded]
    if others:
        whole: Any = torch.nn.utils.get_total_norm(others)
        square += float(whole.full_tensor() if hasattr(whole, "full_tensor") else whole) ** 2
    norm = math.sqrt(square)
    factor = max_norm / (norm + _EPS)
    if not factor > 1.0:
        for p in model.parameters():
            if p.grad is not None:
                _scale(p.grad, factor)
    return norm


def _square(gradients: list[Any]) -> float:
    """Of the norm of gradients by rows, and of dense ones."""
    given = [own.gradient() if isinstance(own, RowGradients) else own for own in gradients]
    for k, own in enumerate(given):
        if isinstance(own, SparseGradient) and own.checked("", None).takes_maxima:
            given[k] = gradients[k].dense()
    return grad_norm(given) ** 2


def _scale(gradient: torch.Tensor, factor: float) -> None:
    if isinstance(gradient, RowGradients) and gradient.whole is None:
        gradient.lookups = tuple(replace(own, values=own.values * factor) for own in gradient.lookups)
    else:
        gradient.mul_(factor)
