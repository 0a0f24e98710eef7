"""Sums of squares in float64 and in-place clipping.

Sums go over blocks of a fixed size, each in a fixed order, whatever the number of threads.
"""

import numpy as np
from fastopt.kernels.cpu.rows import sum_group
from fastopt.kernels.jit import Kernel, helper
from numba import prange

BLOCK = 8_192  # elements
GROUPS_PER_BLOCK = 64


@helper
def block_sum_squares(g, first, last, scale):
    """Sum of ``(g[i] * scale)**2`` over [first, last), in eight interleaved float64 sums."""
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = 0.0
    whole = last - (last - first) % 8
    for i in range(first, whole, 8):
        x0, x1 = g[i] * scale, g[i + 1] * scale
        x2, x3 = g[i + 2] * scale, g[i + 3] * scale
        x4, x5 = g[i + 4] * scale, g[i + 5] * scale
        x6, x7 = g[i + 6] * scale, g[i + 7] * scale
        s0 += x0 * x0
        s1 += x1 * x1
        s2 += x2 * x2
        s3 += x3 * x3
        s4 += x4 * x4
        s5 += x5 * x5
        s6 += x6 * x6
        s7 += x7 * x7
    for i in range(whole, last):
        x0 = g[i] * scale
        s0 += x0 * x0
    return ((s0 + s4) + (s2 + s6)) + ((s1 + s5) + (s3 + s7))


@Kernel
def sum_squares(g, scale, partials):
    """Sums of squares of the blocks of the 1-D ``g``, times ``scale**2`` (a float64)."""
    for block in prange(partials.size):
        first = block * BLOCK
        partials[block] = block_sum_squares(g, first, min(first + BLOCK, g.size), scale)


@Kernel
def sum_squares_rows(values, order, starts, scale, partials):
    """The same for the rows that result when the gradients of each group are summed."""
    groups = starts.size - 1
    for block in prange(partials.size):
        total = np.empty(values.shape[1], values.dtype)
        result = 0.0
        first = block * GROUPS_PER_BLOCK
        for k in range(first, min(first + GROUPS_PER_BLOCK, groups)):
            sum_group(total, values, order, starts[k], starts[k + 1])
            result += block_sum_squares(total, 0, total.size, scale)
        partials[block] = result


@Kernel
def scale_in_place(g, factor):
    """``g *= factor``, for a 1-D ``g`` and a factor of its dtype."""
    for i in prange(g.size):
        g[i] *= factor


@Kernel
def clip_in_place(g, limit):
    """Clip each element of the 1-D ``g`` to [-limit, limit]; NaN stays NaN."""
    for i in prange(g.size):
        value = g[i]
        if value > limit:
            g[i] = limit
        elif value < -limit:
            g[i] = -limit
