"""The numbers of a step: hyperparameters of rules and of weight decay, folded in float64 and checked to fit
the dtype that is computed with."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fastopt._core.arrays import DTYPES
from fastopt._core.groups import ParameterGroup
from fastopt._core.options import checked_options
from fastopt.kernels.rule import L2, Decoupled, Scaled

LEAST = {dtype: float(np.finfo(dtype).smallest_subnormal) for dtype in DTYPES}
MOST = {dtype: float(np.finfo(dtype).max) for dtype in DTYPES}


class Conditions(NamedTuple):
    """What a step's numbers depend on beside the options.

    rates: the learning rate of each group. scale: factor on the gradients. limit: what their elements are
    clipped to.
    """

    rates: list[float]
    scale: float
    limit: float


class StepOptions(NamedTuple):
    """The options of a step.

    checked: of each group. rates: the learning rate of each group. changed: whether any of ``checked`` is
    another dict than the group adopted. other_plan: whether more than learning rates changed.
    """

    checked: list[dict[str, Any]]
    rates: list[float]
    changed: bool
    other_plan: bool


def learning_rate(group: ParameterGroup, options: Mapping[str, Any], steps: int) -> float:
    """The learning rate of a group, under these options of it, after so many steps of the optimizer."""
    lr = options["lr"]
    if callable(lr):
        lr = checked_options({"lr": lr(steps)}, f"{group.label}, at step {steps},")["lr"]
    if options["rows"] == "dense" and lr * options["weight_decay"] >= 1:
        raise ValueError(
            f"lr is {lr!r} and weight_decay {options['weight_decay']!r} in {group.label}: rows='dense' needs "
            "lr * weight_decay below 1"
        )
    return lr


def rule_numbers(
    group: ParameterGroup, options: Mapping[str, Any], lr: float, step: int, compute: np.dtype
) -> Any:
    """The rule's hyperparameters for the ``step``-th update of a parameter."""
    own = options if options["lr"] is lr else {**options, "lr": lr}
    h = group.rule.fold(step, own, compute)
    if math.hypot(*h) > MOST[compute]:  # then one of them may be, and else none
        _check_range(h, compute, group.label)
    return h


def decay_numbers(
    group: ParameterGroup,
    options: Mapping[str, Any],
    decay: type,
    lr: float,
    scale: float,
    limit: float,
    compute: np.dtype,
) -> Any:
    """The gradient's scale and limit and the weight decay."""
    if options["maximize"]:
        scale = -scale
    if limit > MOST[compute]:
        limit = math.inf
    c: Any
    if decay is Scaled:
        c = Scaled(scale, limit)
    elif decay is Decoupled:
        c = Decoupled(scale, limit, 1.0 - lr * options["weight_decay"])
    else:
        c = L2(scale, limit, options["weight_decay"])
    _check_range(c, compute, group.label)
    if 0 < abs(scale) < LEAST[compute]:
        raise ValueError(
            f"grad_scale, with clipping, makes {scale!r} for {group.label}: expected a factor that is not 0 "
            f"in {compute}"
        )
    return c


def _check_range(values: Any, compute: np.dtype, label: str) -> None:
    for name, value in zip(values._fields, values, strict=True):
        if MOST[compute] < abs(value) < math.inf:
            raise ValueError(
                f"the options of {label} make {name} {value!r}: expected a number that fits {compute}"
            )
