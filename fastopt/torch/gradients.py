"""Gradients of torch as the plain optimizers take them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fastopt.gradients import SparseGradient
from fastopt.gradients.given import as_gradient
from fastopt.torch.memory import HALF, local
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
    as_they_are: bool,
    goes_dense: Callable[[int], bool],
) -> Usable:
    """The gradients of parameters as the plain optimizers take them.

    as_they_are: whether dense ones that are contiguous need no closer look: none is a DTensor, or of a dtype
    that kernels do not take. goes_dense: whether a sparse gradient of the parameter at a position is to be
    made dense.
    """
    try:
        if as_they_are and set(map(type, given)) == {torch.Tensor} and all(map(_is_contiguous, given)):
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
    gradient = gradient.to(taken_dtype(gradient, p))
    if gradient.layout is torch.sparse_coo:
        if p.ndim == 2 and gradient.sparse_dim() == 1 and not goes_dense(i):
            return as_gradient(gradient, "gradient")
        gradient = gradient.to_dense()
    return gradient.resolve_neg().contiguous()


def last_by_rows(gradients: Sequence[Any], before: Sequence[bool]) -> list[bool]:
    """Whether the last gradient of each parameter is by rows: one of these, or the one ``before``."""
    return [
        known if own is None else isinstance(own, SparseGradient)
        for own, known in zip(gradients, before, strict=True)
    ]


def taken_dtype(gradient: torch.Tensor, p: torch.Tensor) -> torch.dtype:
    """The dtype that kernels take a gradient in, its own if they do: ``p.grad_dtype`` allows any."""
    if p.dtype in HALF and gradient.dtype != p.dtype:
        return torch.float32
    return p.dtype
