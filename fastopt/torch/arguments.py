"""The types of constructors' arguments, as torch's optimizers take them by name, for type checkers."""

from collections.abc import Iterable
from typing import Any

import torch

from fastopt._core.options import SharedOptions

Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]
Rate = float | torch.Tensor  # a number that may be a tensor of one element


class Ways(SharedOptions, total=False):
    """Of every class of torch but SparseAdam: Adafactor has no more."""

    foreach: bool | None
    maximize: bool


class Capturable(Ways, total=False):
    """Of RMSprop, RAdam and NAdam."""

    capturable: bool
    differentiable: bool


class Fused(Ways, total=False):
    """Of SGD and Adagrad."""

    differentiable: bool
    fused: bool | None


class FusedCapturable(Capturable, total=False):
    """Of AdamW."""

    fused: bool | None


class Decoupling(FusedCapturable, total=False):
    """Of Adam."""

    decoupled_weight_decay: bool
