"""Gradients of torch as the plain optimizers take them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fastopt.gradients import IndexedSlices, SparseGradient
from fastopt.torch.memory import local
from fastopt.torch.row_gradients import RowGradients

_is_contiguous: Any = torch.Tensor.is_contiguous


class Usable(NamedTuple):
    """Gradients for a step. by_rows: whether some are. without: the positions of parameters without one."""

    gradients: list[Any]
    by_rows: bool
    without: list[int]


def usable(
    given: list[torch.Tensor | None],
    params: Sequence[torch.Tensor],
    has_shards: bool,
    goes_dense: Callable[[int], bool],
) -> Usable:
    """The gradients of parameters as the plain optimizers take them.

    has_shards: whether some are DTensors. goes_dense: whether a sparse gradient of the parameter at a
    position is to be made dense.
    """
    try:
        if set(map(type, given)) == {torch.Tensor} and all(map(_is_contiguous, given)) and not has_shards:
            return Usable(given, False, [])
    except (TypeError, RuntimeError):  # None, and a sparse tensor
        pass
    found: list[Any] = []
    for i, (gradient, p) in enumerate(zip(given, params, strict=True)):
        found.append(None if gradient is None else _usable(local(gradient), local(p), i, goes_dense))
    by_rows = any(isinstance(gradient, SparseGradient) for gradient in found)
    return Usable(found, by_rows, [i for i, gradient in enumerate(found) if gradient is None])


def _usable(
    gradient: torch.Tensor, p: torch.Tensor, i: int, goes_dense: Callable[[int], bool]
) -> torch.Tensor | SparseGradient:
    if isinstance(gradient, RowGradients):
        return gradient.dense() if goes_dense(i) else gradient.gradient()
    if gradient.layout is torch.sparse_coo:
        if p.ndim == 2 and gradient.sparse_dim() == 1 and not goes_dense(i):
            return IndexedSlices(gradient._indices()[0], gradient._values().contiguous())
        gradient = gradient.to_dense()
    return gradient.resolve_neg().contiguous()
