"""Arithmetic for ``fold``, of one step or of an array of them, with the same bits.

NumPy's powers and exponentials of arrays are its own on some processors: those of each element by itself are
the C library's, as those of Python's floats are.
"""

import math
from typing import Any

import numpy as np

LEAST_LOG = -746.0  # of a number that is not rounded to 0


def power(base: float, exponent: Any) -> Any:
    """``base`` to the power of a number or of an array."""
    if type(exponent) is int or not isinstance(exponent, np.ndarray):
        return base**exponent
    result = np.zeros(exponent.shape)
    above = exponent * math.log(base) > LEAST_LOG if 0.0 < base < 1.0 else np.full(exponent.shape, True)
    result[above] = [base**x for x in exponent[above].tolist()]
    return result


def exponential(x: Any) -> Any:
    """e to the power of a number or of an array."""
    return np.array([math.exp(y) for y in x.tolist()]) if isinstance(x, np.ndarray) else math.exp(x)


def root(x: Any) -> Any:
    """The square root of a number or of an array."""
    return math.sqrt(x) if type(x) is float or not isinstance(x, np.ndarray) else np.sqrt(x)


def choose(condition: Any, one: Any, other: Any) -> Any:
    """``one`` where the condition, a truth value or an array of them, holds, else ``other``."""
    return (
        np.where(condition, one, other) if isinstance(condition, np.ndarray) else one if condition else other
    )
