"""Torch tensors as arrays, and the parts of DTensors that lie here."""

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# The dtypes of parameters that kernels take
DTYPES = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: BFLOAT16,
}
HALF = torch.float16, torch.bfloat16
_TORCH = {dtype: own for own, dtype in DTYPES.items()} | {
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.int64): torch.int64,
}


def computed_with(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that its numbers are computed with and added up in."""
    return torch.float32 if tensor.dtype in HALF else tensor.dtype


def array_of(tensor: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    """A copy of a tensor, converted, in the memory of the host."""
    copy = tensor.detach().to(dtype=_TORCH[dtype], device="cpu", copy=True).contiguous()
    if dtype == BFLOAT16:
        return copy.view(torch.int16).numpy().view(BFLOAT16)
    return copy.numpy()


def is_shard(tensor: Any) -> bool:
    """Whether it is a DTensor, a part of which lies here."""
    return type(tensor) not in (torch.Tensor, torch.nn.Parameter) and hasattr(tensor, "to_local")


def mark_as_part(p: torch.Tensor) -> None:
    """Have it be known that a parameter is a part of a table whose other parts lie elsewhere."""
    p.is_part_of_table = True  # type: ignore[attr-defined]


def is_part(p: torch.Tensor) -> bool:
    """Whether other parts of its table lie elsewhere."""
    return getattr(p, "is_part_of_table", False)


def local(tensor: Any) -> torch.Tensor:
    """The part of a DTensor that lies here; any other tensor as it is."""
    return tensor.to_local() if is_shard(tensor) else tensor


def beside(p: Any, own: torch.Tensor) -> torch.Tensor:
    """A tensor of the shape of a parameter's local part, as one that is sharded as the parameter is."""
    if not is_shard(p) or own.shape != local(p).shape:
        return own
    return type(p).from_local(
        own, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def sharing(tensors: Sequence[torch.Tensor]) -> set[int]:
    """The positions of contiguous tensors that share memory with another of them."""
    starts = np.array([own.data_ptr() for own in tensors], np.int64)
    ends = starts + np.array([own.numel() * own.element_size() for own in tensors], np.int64)
    order = np.argsort(starts, kind="stable")
    order = order[ends[order] > starts[order]]
    if len(order) < 2:
        return set()
    furthest = np.maximum.accumulate(ends[order])
    met = starts[order][1:] < furthest[:-1]  # one of those that begin before
    meets = starts[order][1:] < ends[order][:-1]  # the next one
    return {*order[1:][met].tolist(), *order[:-1][meets].tolist()}
