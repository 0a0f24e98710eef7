"""What a caller asks of one step beside the gradients, and what the step answers."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from fastopt._core.backend import Factor, Norm
from fastopt._core.options import check_limit, is_flag
from fastopt._step.norms import clip_factor

_Values = tuple[float | None, bool, bool, str | int | None]


class StepInfo(Sequence):
    """What a step did: four values, as attributes or as a sequence, and, beside them, ``lr``.

    Where gradients lie on a device, ``norm`` and ``clipped`` wait for it when they are asked for. Of a step
    that was captured in a graph these two and ``lr`` are those of its last replay.

    Args:
        norm, clipped, skipped, nonfinite: the four values.
        rates: the learning rate of each group.
    """

    __slots__ = ("_rates", "_unread", "_values")
    __match_args__ = ("norm", "clipped", "skipped", "nonfinite")

    def __init__(
        self,
        norm: float | None = None,
        clipped: bool = False,
        skipped: bool = False,
        nonfinite: str | int | None = None,
        rates: Sequence[float] = (),
    ) -> None:
        self._values: _Values = norm, clipped, skipped, nonfinite
        self._rates = rates
        self._unread: tuple[Norm, float, float | None] | None = None

    @classmethod
    def unread(
        cls, norm: Norm, grad_scale: float, clip_norm: float | None, rates: Sequence[float] = ()
    ) -> "StepInfo":
        """Of a step that did not wait for the norm of its gradients, which it scaled and clipped so."""
        info = cls(rates=rates)
        info._unread = norm, grad_scale, clip_norm
        return info

    def going_on(self, rates: Sequence[float]) -> Callable[[], object]:
        """The call, of C, that has it be of a step with these learning rates: the next replay."""
        return partial(setattr, self, "_rates", rates)

    @property
    def lr(self) -> float | tuple[float, ...]:
        """The learning rate that the step used, or would have if it had not been skipped: a number where the
        optimizer has one group, and else one for each group. Schedules are that of this step."""
        return self._rates[0] if len(self._rates) == 1 else tuple(self._rates)

    @property
    def norm(self) -> float | None:
        """L2 norm of the gradients times ``grad_scale``, before clipping; None if it was not needed."""
        return self._read()[0]

    @property
    def clipped(self) -> bool:
        """Whether the gradients were scaled down to ``clip_norm``."""
        return self._read()[1]

    @property
    def skipped(self) -> bool:
        """Whether nothing was updated, because a gradient was not finite."""
        return self._values[2]

    @property
    def nonfinite(self) -> str | int | None:
        """If the step was skipped, the name, or position, of the first parameter whose gradient holds NaN or
        infinity; None if none does and the norm of all is beyond float64."""
        return self._values[3]

    def _read(self) -> _Values:
        """The values now; not kept, since a replay finds another norm."""
        if self._unread is None:
            return self._values
        unscaled, grad_scale, clip_norm = self._unread
        norm = grad_scale * unscaled.value()
        return norm, clip_norm is not None and clip_factor(norm, clip_norm) != 1.0, False, None

    def __iter__(self) -> Iterator:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        return self._read()[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StepInfo | tuple):
            return NotImplemented
        return self._read() == tuple(other)

    def __hash__(self) -> int:
        return hash(self._read())

    def __repr__(self) -> str:
        pairs = zip(self.__match_args__, self, strict=True)
        return f"StepInfo({', '.join(f'{name}={value!r}' for name, value in pairs)})"

    def __reduce__(self) -> tuple:
        return StepInfo, (*self._read(), tuple(self._rates))


def scaled(
    norm: float | Norm, grad_scale: float, clip_norm: float | None, rates: Sequence[float]
) -> tuple[StepInfo, float, Factor]:
    """Of a step whose gradients have this norm: what it answers, the factor on them, and what else launches
    multiply them by, if the norm is on its way (see Norm). ``rates``: the learning rate of each group."""
    if isinstance(norm, float):
        factor = 1.0 if clip_norm is None else clip_factor(grad_scale * norm, clip_norm)
        return StepInfo(grad_scale * norm, factor != 1.0, rates=rates), grad_scale * factor, None
    later = None if clip_norm is None else norm.factor(grad_scale, clip_norm)
    return StepInfo.unread(norm, grad_scale, clip_norm, rates), grad_scale, later


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
    norm: bool,
) -> Settings:
    """The arguments of a step, checked.

    Raises:
        TypeError, ValueError: one is of another type, or out of range.
    """
    plain = clip_norm is clip_value is None and skip_nonfinite is zero_grads is norm is False
    if plain and type(grad_scale) is float and grad_scale == 1.0:
        return _PLAIN
    if clip_norm is not None:
        clip_norm = check_limit(clip_norm, "clip_norm")
    limit = math.inf if clip_value is None else check_limit(clip_value, "clip_value")
    grad_scale = check_limit(grad_scale, "grad_scale")
    if grad_scale == 0 or math.isinf(grad_scale):
        raise ValueError(f"grad_scale is {grad_scale!r}: expected a finite number above 0")
    flags = ("skip_nonfinite", skip_nonfinite), ("zero_grads", zero_grads), ("norm", norm)
    for name, flag in flags:
        if not is_flag(flag):
            raise TypeError(f"{name} is {flag!r}: expected True or False")
    need_norm = clip_norm is not None or bool(skip_nonfinite) or bool(norm)
    return Settings(clip_norm, limit, grad_scale, bool(skip_nonfinite), bool(zero_grads), need_norm)
