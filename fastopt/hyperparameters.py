"""Ranges of hyperparameters, by name."""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

_AT_LEAST_0: tuple[Callable[[float], bool], str] = (lambda x: x >= 0, "a finite number, at least 0")
_ANY: tuple[Callable[[float], bool], str] = (lambda x: True, "a finite number")
_FRACTION: tuple[Callable[[float], bool], str] = (lambda x: 0 <= x < 1, "a number in [0, 1)")

_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0,
    "momentum": _AT_LEAST_0,
    "dampening": _ANY,
    "eps": _AT_LEAST_0,
    "alpha": (lambda x: 0 <= x <= 1, "a number in [0, 1]"),
    "lr_decay": _AT_LEAST_0,
    "initial_accumulator_value": _AT_LEAST_0,
    "beta": _FRACTION,
    "beta1": _FRACTION,
    "beta2": _FRACTION,
}
_FLAGS = {"maximize", "nesterov", "centered", "amsgrad", "decoupled_weight_decay"}


def check_options(options: Mapping[str, Any], label: str) -> None:
    """Refuse hyperparameters out of range; ``label`` says whose they are."""
    for name, value in options.items():
        where = f"{name} of {label} is {value!r}"
        if name in _FLAGS:
            if not isinstance(value, bool):
                raise TypeError(f"{where}: expected True or False")
        elif name == "betas":
            if not isinstance(value, tuple | list) or len(value) != 2:
                raise TypeError(f"{where}: expected a pair of numbers, such as (0.9, 0.999)")
            for beta in value:
                _check_number(beta, where, _FRACTION, "a pair of numbers in [0, 1)")
        elif not isinstance(value, bool) and not (name == "lr" and callable(value)):
            _check_number(value, where, _RANGES.get(name, _ANY))
        elif isinstance(value, bool) and name in _RANGES:
            raise TypeError(f"{where}: expected {_RANGES[name][1]}")


def _check_number(
    value: Any, where: str, allowed: tuple[Callable[[float], bool], str], expected: str | None = None
) -> None:
    accepts, wording = allowed
    expected = expected or wording
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{where}: expected {expected}")
    if not math.isfinite(value) or not accepts(float(value)):
        raise ValueError(f"{where}: expected {expected}")
