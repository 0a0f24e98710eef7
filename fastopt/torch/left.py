"""Parameters that kernels do not take, which torch's own step updates, and parts of those that lie elsewhere,
too: what can't be done for them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fastopt._core.options import SHARED
from fastopt.torch.memory import HALF, is_part


def refuse(name: str, p: torch.Tensor) -> None:
    """Refuse a parameter that neither kernels nor a class of torch can update."""
    raise TypeError(
        f"a parameter {_described(p)} on {p.device}: {name} takes C-contiguous tensors of float32, float64, "
        "float16 or bfloat16 on the CPU or a CUDA device"
    )


def check_clipping(params: Iterable[torch.Tensor]) -> None:
    """Refuse to clip where a part of the gradients is not seen."""
    for p in params:
        raise ValueError(
            f"a parameter {_described(p)} is updated by torch's own step, which does not clip: expected "
            "neither clip_norm nor clip_value, use torch.nn.utils.clip_grad_norm_"
        )


def check_whole(params: Iterable[torch.Tensor], has_shards: bool, clip_norm: Any) -> None:
    """Refuse to clip parameters of which other parts lie elsewhere."""
    if has_shards:
        raise ValueError(
            "clip_norm and clip_value see the parts of DTensors that lie here alone: expected neither, "
            "use torch.nn.utils.clip_grad_norm_ before the step"
        )
    if clip_norm is not None and any(map(is_part, params)):
        raise ValueError(
            "clip_norm sees the parts of tables that lie here alone: expected None, use "
            "fastopt.distributed.clip_grad_norm_ before the step"
        )


def check_options(group: Mapping[str, Any], params: Iterable[torch.Tensor]) -> None:
    """Refuse options of a group that torch's step does not know, and which would make a difference."""
    for p in params:
        for name, default in SHARED.items():
            if group[name] != default and _matters(name, group[name], p):
                raise ValueError(
                    f"{name} is {group[name]!r} in the group of a parameter {_described(p)}, which is "
                    f"updated by torch's own step: expected {default!r}, put it into a group of its own"
                )


def _matters(name: str, value: Any, p: torch.Tensor) -> bool:
    """Whether kernels would do something else with a parameter for this option."""
    if name == "state_dtype":
        return value != str(p.dtype).removeprefix("torch.")
    if name == "master_weights":
        return p.dtype in HALF
    if name == "clip_row_norm":
        return p.ndim == 2
    return name != "seed" and p.grad is not None and p.grad.layout is not torch.strided


def _described(p: torch.Tensor) -> str:
    return f"of dtype {p.dtype}, shape {tuple(p.shape)}, strides {p.stride()} and layout {p.layout}"
