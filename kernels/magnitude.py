"""Norms whose squares float64 can't hold: what numbers are divided by before they are squared.

Squares are summed up as they are first; only where that sum says so are they summed up once more, in another
unit. So ordinary numbers cost nothing, and keep their bits.
"""

import math

import numpy as np

from fastopt.kernels.linked import register_jitable

HUGE, TINY = 2.0**540, 2.0**-600  # powers of two, by which division is exact
LARGEST, SMALLEST = 1e300, 1e-280  # sums of squares, beyond which squares overflow or lose digits


@register_jitable
def unit_of(total):
    """The unit for numbers whose squares add up to ``total``: 1 where that is as it should be, or NaN."""
    if total > LARGEST:
        return HUGE
    return TINY if total < SMALLEST else 1.0


@register_jitable
def sum_of_squares(scale, x, unit):
    """The sum of squares of ``scale * x``, of the 1-D ``x``, over ``unit``, in float64."""
    over = 1.0 / unit
    total = 0.0
    for d in range(x.size):
        y = np.float64(scale * x[d]) * over
        total += y * y
    return total


@register_jitable
def magnitude(x):
    """The norm of the 1-D ``x`` as a number and its unit: their product may be more than float64 holds."""
    one = x.dtype.type(1)
    total = sum_of_squares(one, x, 1.0)
    unit = unit_of(total)
    if unit != 1.0:
        total = sum_of_squares(one, x, unit)
    return math.sqrt(total), unit
