"""Learning-rate schedules: functions that return a factor for each step, counted from 0.

Multiply a schedule by a learning rate and pass the product, which is a schedule too, as ``lr``:

    >>> import fastopt
    >>> lr = 1e-3 * fastopt.schedules.warmup_cosine(warmup=100, total=10_000)
    >>> lr(0), lr(100), lr(10_000)
    (1e-05, 0.001, 0.0)

Any other function of the step may be passed as well. The step is the optimizer's ``steps``, the number of
steps that are finished.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from fastopt._core.options import plain


@dataclass(frozen=True)
class Schedule:
    """A function of the step that returns a factor, and that can be multiplied by a number, its ``scale``,
    or by another schedule."""

    scale: float = field(default=1.0, kw_only=True)
    __array_ufunc__ = None  # so that arrays leave the product to it

    def factor(self, step: int) -> float:
        """The factor at ``step``, before ``scale``."""
        raise NotImplementedError

    def __call__(self, step: int) -> float:
        return self.scale * self.factor(step)

    def __mul__(self, other: Any) -> "Schedule":
        if isinstance(other, Schedule):
            return product([self, other])
        scale = plain(other)
        if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
            return NotImplemented
        return replace(self, scale=self.scale * float(scale))

    __rmul__ = __mul__

    def __repr__(self) -> str:
        own = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name != "scale")
        return ("" if self.scale == 1.0 else f"{self.scale!r} * ") + f"{type(self).__name__}({own})"


def _check(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}: expected {expected}")


@dataclass(frozen=True, repr=False)
class constant(Schedule):
    """The factor is 1 at every step."""

    def factor(self, step: int) -> float:
        return 1.0


@dataclass(frozen=True, repr=False)
class step(Schedule):
    """The factor is ``gamma ** (step // every)``, as that of torch's StepLR."""

    every: int
    gamma: float = 0.1

    def __post_init__(self) -> None:
        _check(self.every >= 1, "every", self.every, "at least 1 step")
        _check(self.gamma >= 0, "gamma", self.gamma, "at least 0")

    def factor(self, step: int) -> float:
        return self.gamma ** (step // self.every)


@dataclass(frozen=True, repr=False)
class multistep(Schedule):
    """The factor is multiplied by ``gamma`` at each of the ``milestones``, as that of torch's MultiStepLR."""

    milestones: Sequence[int]
    gamma: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(sorted(self.milestones)))
        _check(self.gamma >= 0, "gamma", self.gamma, "at least 0")

    def factor(self, step: int) -> float:
        return self.gamma ** sum(step >= milestone for milestone in self.milestones)


@dataclass(frozen=True, repr=False)
class exponential(Schedule):
    """The factor is ``gamma ** step``, as that of torch's ExponentialLR."""

    gamma: float

    def __post_init__(self) -> None:
        _check(self.gamma >= 0, "gamma", self.gamma, "at least 0")

    def factor(self, step: int) -> float:
        return self.gamma**step


@dataclass(frozen=True, repr=False)
class cosine(Schedule):
    """The factor falls along half a cosine from 1 at step 0 to ``final`` at step ``total``, and stays there.

    This is equation 5 of Loshchilov & Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts",
    without restarts.
    """

    total: int
    final: float = 0.0

    def __post_init__(self) -> None:
        _check(self.total >= 1, "total", self.total, "at least 1 step")
        _check(self.final >= 0, "final", self.final, "at least 0")

    def factor(self, step: int) -> float:
        return _cosine(step / self.total, self.final)


@dataclass(frozen=True, repr=False)
class linear_warmup(Schedule):
    """The factor is ``(step + 1) / warmup`` until it reaches 1, and then stays 1; it is never 0."""

    warmup: int

    def __post_init__(self) -> None:
        _check(self.warmup >= 0, "warmup", self.warmup, "at least 0 steps")

    def factor(self, step: int) -> float:
        return _warmup(step, self.warmup)


@dataclass(frozen=True, repr=False)
class warmup_cosine(Schedule):
    """The factor is that of :class:`linear_warmup` for ``warmup`` steps, then that of :class:`cosine` until
    step ``total``.

    It is 1 at the steps ``warmup - 1``, the last of the warmup, and ``warmup``, from which the cosine falls;
    at step ``total`` and later it is ``final``. With ``warmup=0`` it is 1 at step 0 alone.
    """

    warmup: int
    total: int
    final: float = 0.0

    def __post_init__(self) -> None:
        _check(self.warmup >= 0, "warmup", self.warmup, "at least 0 steps")
        _check(self.total > self.warmup, "total", self.total, f"more than warmup, {self.warmup}")
        _check(self.final >= 0, "final", self.final, "at least 0")

    def factor(self, step: int) -> float:
        if step < self.warmup:
            return _warmup(step, self.warmup)
        return _cosine((step - self.warmup) / (self.total - self.warmup), self.final)


@dataclass(frozen=True, repr=False)
class inverse_sqrt(Schedule):
    """The factor is ``(step + 1) / warmup`` for ``warmup`` steps, then ``sqrt(warmup / (step + 1))``: 1 at
    step ``warmup - 1``. ``warmup=1`` leaves the warmup out.

    This is equation 3 of Vaswani et al. 2017, "Attention Is All You Need", relative to its peak.
    """

    warmup: int

    def __post_init__(self) -> None:
        _check(self.warmup >= 1, "warmup", self.warmup, "at least 1 step")

    def factor(self, step: int) -> float:
        return min((step + 1) / self.warmup, math.sqrt(self.warmup / (step + 1)))


@dataclass(frozen=True, repr=False)
class polynomial(Schedule):
    """The factor falls as ``(1 - step / total) ** power`` from 1 at step 0 to ``final`` at step ``total``,
    and stays there; with ``final=0`` as that of torch's PolynomialLR."""

    total: int
    power: float = 1.0
    final: float = 0.0

    def __post_init__(self) -> None:
        _check(self.total >= 1, "total", self.total, "at least 1 step")
        _check(self.power > 0, "power", self.power, "more than 0")
        _check(self.final >= 0, "final", self.final, "at least 0")

    def factor(self, step: int) -> float:
        return self.final + (1.0 - self.final) * (1.0 - min(step / self.total, 1.0)) ** self.power


@dataclass(frozen=True, repr=False)
class one_cycle(Schedule):
    """The factor rises along half a cosine from ``1 / div_factor`` at step 0 to 1 at step ``pct_start * total
    - 1``, and falls along another to ``1 / div_factor / final_div_factor`` at step ``total - 1``, where it
    stays; as that of torch's OneCycleLR, relative to ``max_lr``.

    This is Smith & Topin 2017, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning
    Rates", with cosines in the place of lines.
    """

    total: int
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def __post_init__(self) -> None:
        _check(self.total >= 2, "total", self.total, "at least 2 steps")
        _check(0 <= self.pct_start <= 1, "pct_start", self.pct_start, "a share, from 0 to 1")
        _check(self.div_factor > 0, "div_factor", self.div_factor, "more than 0")
        _check(self.final_div_factor > 0, "final_div_factor", self.final_div_factor, "more than 0")

    def factor(self, step: int) -> float:
        first, last, peak = 1.0 / self.div_factor, self.total - 1, self.pct_start * self.total - 1
        if step <= peak and peak > 0:
            return first + (1.0 - first) * (1.0 - _cosine(step / peak, 0.0))
        fallen = (step - peak) / (last - peak) if last > peak else 1.0
        return _cosine(fallen, first / self.final_div_factor)


@dataclass(frozen=True, repr=False)
class product(Schedule):
    """The factor is the product of those of ``schedules``, each a schedule or any function of the step;
    ``linear_warmup(100) * exponential(0.999)`` is ``product([linear_warmup(100), exponential(0.999)])``."""

    schedules: Sequence[Callable[[int], float]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedules", tuple(self.schedules))
        for k, own in enumerate(self.schedules):
            if not callable(own):
                raise TypeError(f"schedules[{k}] is {own!r}: expected a schedule or a function of the step")

    def factor(self, step: int) -> float:
        return math.prod(own(step) for own in self.schedules)


def _warmup(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _cosine(progress: float, final: float) -> float:
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
