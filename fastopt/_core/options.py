"""The options that all optimizers share, and the range of every option by its name."""

import math
import numbers
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, TypedDict

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


class _Option(NamedTuple):
    """An option that is being checked; its text, which is only made for errors, says what it is."""

    name: str
    label: str
    value: Any

    def __str__(self) -> str:
        return f"{self.name} of {self.label} is {self.value!r}"


def plain(value: Any) -> Any:
    """The number that a NumPy scalar, or an array or tensor of one element, holds now, and a tuple of numbers
    for a list, tuple or array of them; anything else as it is.
    """
    if isinstance(value, bool | int | float | str | None) and not isinstance(value, np.generic):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    shape = getattr(value, "shape", None)
    if not isinstance(shape, tuple) or not hasattr(value, "tolist") or isinstance(value, np.ma.MaskedArray):
        return value
    return value.item() if math.prod(shape) == 1 else plain(value.tolist())


def is_immutable(value: Any) -> bool:
    """Whether an option changes by assignment alone, which is not so of an array."""
    if isinstance(value, tuple):
        return all(map(is_immutable, value))
    return value is None or callable(value) or isinstance(value, int | float | str | np.generic | np.dtype)


def is_flag(value: Any) -> bool:
    """Whether it is True or False, those of NumPy among them."""
    return isinstance(value, bool | np.bool)


def checked_options(options: Mapping[str, Any], label: str, signed: Collection[str] = ()) -> dict[str, Any]:
    """A copy of ``options`` with plain Python numbers. ``label`` names their parameter group in errors;
    ``signed``: those that may be negative, whatever their range is.

    Raises:
        TypeError, ValueError: an option has a wrong type or is out of range.
    """
    checked: dict[str, Any] = {}
    for name, value in options.items():
        where = _Option(name, label, value)
        if name in _FLAGS:
            if not is_flag(value):
                raise TypeError(f"{where}: expected True or False")
            checked[name] = bool(value)
        elif name == "rows":
            if not isinstance(value, str) or value not in ("lazy", "dense"):
                raise ValueError(f"{where}: expected 'lazy' or 'dense'")
            checked[name] = value
        elif name in ("clip_row_norm", "state_dtype") and value is None:
            checked[name] = value
        elif name == "state_dtype":
            checked[name] = _state_dtype(value, where)
        elif name == "seed":
            seed = plain(value)
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
                raise ValueError(f"{where}: expected a whole number from 0 to 2**63 - 1")
            checked[name] = seed
        elif name == "betas":
            pair = _FRACTION[0], "a pair of numbers in [0, 1)"
            checked[name] = tuple(_number(beta, where, pair) for beta in _pair(where, "(0.9, 0.999)"))
        elif name == "eps" and "beta2_decay" in options:  # Adafactor has a pair of them.
            first, second = _pair(where, "(None, 1e-3)")
            first = first if first is None else _number(first, where, _AT_LEAST_0)
            checked[name] = first, _number(second, where, _AT_LEAST_0)
        elif name == "lr" and callable(value):
            checked[name] = value
        elif is_flag(value) and name not in _RANGES:
            checked[name] = bool(value)
        else:
            checked[name] = _number(value, where, _ANY if name in signed else _RANGES.get(name, _ANY))
    return checked


def _state_dtype(value: Any, where: _Option) -> str:
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


def _pair(where: _Option, example: str) -> tuple:
    """The option's two numbers."""
    pair = plain(where.value)
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise TypeError(f"{where}: expected a pair of numbers, such as {example}")
    return pair


def _number(value: Any, where: _Option, allowed: tuple[Callable[[float], bool], str]) -> int | float:
    accepts, expected = allowed
    number = _real(value)
    if number is None:
        raise TypeError(f"{where}: expected {expected}")
    if not abs(number) <= sys.float_info.max or not accepts(number):
        raise ValueError(f"{where}: expected {expected}")
    return number


def _real(value: Any) -> int | float | None:
    """The number that it is or holds, None if it is none."""
    if type(value) is float:  # which ABCs take long to find out
        return value
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def check_limit(value: Any, name: str) -> float:
    """``value`` as a float that is not negative.

    Raises:
        TypeError, ValueError: it is no number, negative, or out of the range of float64.
    """
    if type(value) is float and value >= 0:
        return value
    try:
        real = _real(value)
        if real is None:
            raise TypeError(f"{name} is {value!r}: expected a number")
        number = float(real)
    except OverflowError:
        number = -math.inf
    if not number >= 0:
        raise ValueError(f"{name} is {value!r}: expected at least 0, in the range of float64")
    return number
