"""The options that all optimizers share, and the range of every option by its name."""

import math
import numbers
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypedDict

import numpy as np

from fastopt.kernels.formats import STATE_DTYPES


class SharedOptions(TypedDict, total=False):
    """The options that all optimizers share, which :class:`fastopt.Optimizer` explains."""

    rows: str
    step_per_row: bool
    clip_row_norm: float | None
    state_dtype: Any
    master_weights: bool
    seed: int


SHARED: dict[str, Any] = {
    "rows": "lazy",
    "step_per_row": False,
    "clip_row_norm": None,
    "state_dtype": None,
    "master_weights": False,
    "seed": 0,
}
# The options that can't be changed once the optimizer is built.
FIXED = "rows", "step_per_row", "state_dtype", "master_weights"

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
    "momentum_decay": _AT_LEAST_0,
    "clip_row_norm": _AT_LEAST_0,
    "initial_accumulator_value": _AT_LEAST_0,
    "beta": _FRACTION,
    "beta1": _FRACTION,
    "beta2": _FRACTION,
    "beta2_decay": (lambda x: x <= 0, "a finite number, at most 0"),
    "d": (lambda x: x > 0, "a finite number above 0"),
}
_FLAGS = {
    "maximize",
    "nesterov",
    "centered",
    "amsgrad",
    "decoupled_weight_decay",
    "step_per_row",
    "master_weights",
}


def checked_options(options: Mapping[str, Any], label: str) -> dict[str, Any]:
    """A copy of ``options`` with plain Python numbers. ``label`` names their parameter group in errors.

    Raises:
        TypeError, ValueError: an option has a wrong type or is out of range.
    """
    checked: dict[str, Any] = {}
    for name, value in options.items():
        where = f"{name} of {label} is {value!r}"
        if name in _FLAGS:
            if not isinstance(value, bool):
                raise TypeError(f"{where}: expected True or False")
            checked[name] = value
        elif name == "rows":
            if not isinstance(value, str) or value not in ("lazy", "dense"):
                raise ValueError(f"{where}: expected 'lazy' or 'dense'")
            checked[name] = value
        elif name in ("clip_row_norm", "state_dtype") and value is None:
            checked[name] = value
        elif name == "state_dtype":
            checked[name] = _state_dtype(value, where)
        elif name == "seed":
            if (
                isinstance(value, bool)
                or not isinstance(value, numbers.Integral)
                or not 0 <= int(value) < 2**63
            ):
                raise ValueError(f"{where}: expected a whole number from 0 to 2**63 - 1")
            checked[name] = int(value)
        elif name == "betas":
            if not isinstance(value, tuple | list) or len(value) != 2:
                raise TypeError(f"{where}: expected a pair of numbers, such as (0.9, 0.999)")
            pair = _FRACTION[0], "a pair of numbers in [0, 1)"
            checked[name] = tuple(_number(beta, where, pair) for beta in value)
        elif name == "eps" and "beta2_decay" in options:  # Adafactor has a pair of them.
            if not isinstance(value, tuple | list) or len(value) != 2:
                raise TypeError(f"{where}: expected a pair of numbers, such as (None, 1e-3)")
            first = value[0] if value[0] is None else _number(value[0], where, _AT_LEAST_0)
            checked[name] = first, _number(value[1], where, _AT_LEAST_0)
        elif (name == "lr" and callable(value)) or (isinstance(value, bool) and name not in _RANGES):
            checked[name] = value
        else:
            checked[name] = _number(value, where, _RANGES.get(name, _ANY))
    return checked


def _state_dtype(value: Any, where: str) -> str:
    """The name of the storage formats that ``value``, one of these names or a dtype, stands for."""
    if isinstance(value, str) and value in STATE_DTYPES:
        return value
    name = str(value).removeprefix("torch.")  # The text of a torch dtype is torch.bfloat16, for example.
    with suppress(TypeError, ValueError):
        name = np.dtype(value).name
    for state_dtype, meaning in STATE_DTYPES.items():
        if name in meaning.dtypes:
            return state_dtype
    *others, last = map(repr, STATE_DTYPES)
    raise ValueError(f"{where}: expected None, {', '.join(others)} or {last}")


def _number(value: Any, where: str, allowed: tuple[Callable[[float], bool], str]) -> int | float:
    accepts, expected = allowed
    number: int | float
    if type(value) is float:  # which ABCs take long to find out
        number = value
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{where}: expected {expected}")
    else:
        number = int(value) if isinstance(value, numbers.Integral) else float(value)
    if not abs(number) <= sys.float_info.max or not accepts(number):
        raise ValueError(f"{where}: expected {expected}")
    return number


def check_limit(value: Any, name: str) -> float:
    """``value`` as a float that is not negative.

    Raises:
        TypeError, ValueError: it is no number, negative, or out of the range of float64.
    """
    if type(value) is float and value >= 0:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}: expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = -math.inf
    if not number >= 0:
        raise ValueError(f"{name} is {value!r}: expected at least 0, in the range of float64")
    return number
