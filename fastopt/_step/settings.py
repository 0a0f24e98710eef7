"""What a caller asks of one step beside the gradients, and what the step answers."""

import math
from typing import NamedTuple

from fastopt._core.options import check_limit, is_flag


class StepInfo(NamedTuple):
    """What a step did.

    norm: L2 norm of the gradients times ``grad_scale``, before clipping; None if it was not needed.
    clipped: whether the gradients were scaled down to ``clip_norm``.
    skipped: whether nothing was updated, because a gradient was not finite.
    nonfinite: then the name, or position, of the first parameter whose gradient holds NaN or infinity; None
        if none does and the norm of all is beyond float64.
    """

    norm: float | None = None
    clipped: bool = False
    skipped: bool = False
    nonfinite: str | int | None = None


class Settings(NamedTuple):
    """The checked arguments of a step.

    limit: what elements of gradients are clipped to, ``clip_value`` or infinity. need_norm: whether the norm
    of all gradients has to be known.
    """

    clip_norm: float | None
    limit: float
    grad_scale: float
    skip_nonfinite: bool
    zero_grads: bool
    need_norm: bool


_PLAIN = Settings(None, math.inf, 1.0, False, False, False)


def checked_settings(
    clip_norm: float | None,
    clip_value: float | None,
    grad_scale: float,
    skip_nonfinite: bool,
    zero_grads: bool,
) -> Settings:
    """The arguments of a step, checked.

    Raises:
        TypeError, ValueError: one is of another type, or out of range.
    """
    plain = clip_norm is clip_value is None and skip_nonfinite is zero_grads is False
    if plain and type(grad_scale) is float and grad_scale == 1.0:
        return _PLAIN
    if clip_norm is not None:
        clip_norm = check_limit(clip_norm, "clip_norm")
    limit = math.inf if clip_value is None else check_limit(clip_value, "clip_value")
    grad_scale = check_limit(grad_scale, "grad_scale")
    if grad_scale == 0 or math.isinf(grad_scale):
        raise ValueError(f"grad_scale is {grad_scale!r}: expected a finite number above 0")
    for name, flag in (("skip_nonfinite", skip_nonfinite), ("zero_grads", zero_grads)):
        if not is_flag(flag):
            raise TypeError(f"{name} is {flag!r}: expected True or False")
    need_norm = clip_norm is not None or bool(skip_nonfinite)
    return Settings(clip_norm, limit, grad_scale, bool(skip_nonfinite), bool(zero_grads), need_norm)
