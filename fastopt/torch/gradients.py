"""Gradients of torch as the plain optimizers take them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastopt.gradients import IndexedSlices
from fastopt.torch.memory import is_shard, local

_is_contiguous: Any = torch.Tensor.is_contiguous


def usable(
    given: list[torch.Tensor | None], params: Sequence[torch.Tensor], goes_dense: Callable[[int], bool]
) -> tuple[list[Any], bool]:
    """Gradients for a step, and whether some are by rows.

    goes_dense: whether a sparse gradient of the parameter at a position is to be made dense.
    """
    try:
        if all(map(_is_contiguous, given)) and not any(map(is_shard, given)):
            return given, False
    except (TypeError, RuntimeError):  # None, and a sparse tensor
        pass
    found: list[Any] = []
    for i, (gradient, p) in enumerate(zip(given, params, strict=True)):
        found.append(None if gradient is None else _usable(local(gradient), local(p), i, goes_dense))
    return found, any(isinstance(gradient, IndexedSlices) for gradient in found)


def _usable(
    gradient: torch.Tensor, p: torch.Tensor, i: int, goes_dense: Callable[[int], bool]
) -> torch.Tensor | IndexedSlices:
    if gradient.layout is torch.sparse_coo:
        if p.ndim == 2 and gradient.sparse_dim() == 1 and not goes_dense(i):
            return IndexedSlices(gradient._indices()[0], gradient._values().contiguous())
        gradient = gradient.to_dense()
    return gradient.resolve_neg().contiguous()
