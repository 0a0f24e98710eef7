"""Sums of squares in float64 and in-place clipping.

Sums go over blocks of a fixed size, each in a fixed order, whatever the number of threads.
"""

import numpy as np
from numba import prange

from fastopt.kernels.cpu.rows import sum_group
from fastopt.kernels.jit import Kernel, helper

BLOCK = 8_192  # elements
LANES = 512  # sums of a block that grow side by side, so that the loop over them vectorises
GROUPS_PER_BLOCK = 64


@helper
def add_squares(g, scale, sums):
    """``sums[i] += (g[i] * scale)**2``, in float64."""
    for i in range(g.size):
        x = np.float64(g[i]) * scale
        sums[i] += x * x


@helper
def total_of(sums):
    """Sum of a non-empty array, which it uses up: its halves are added until one element is left."""
    size = sums.size
    while size > 1:
        half = size // 2
        upper = sums[size - half : size]
        for i in range(half):
            sums[i] += upper[i]
        size -= half
    return sums[0]


@Kernel
def sum_squares(g, scale, partials):
    """Sums of squares of the blocks of the 1-D ``g``, times ``scale**2`` (a float64)."""
    for block in prange(partials.size):
        sums = np.zeros(LANES)
        last = min((block + 1) * BLOCK, g.size)
        for first in range(block * BLOCK, last, LANES):
            add_squares(g[first : min(first + LANES, last)], scale, sums)
        partials[block] = total_of(sums)


@Kernel
def sum_squares_rows(values, order, starts, scale, partials):
    """The same for blocks of the rows that result when the gradients of each group are summed."""
    groups = starts.size - 1
    for block in prange(partials.size):
        total = np.empty(values.shape[1], values.dtype)
        sums = np.zeros(values.shape[1])
        first = block * GROUPS_PER_BLOCK
        for k in range(first, min(first + GROUPS_PER_BLOCK, groups)):
            sum_group(total, values, order, starts[k], starts[k + 1])
            add_squares(total, scale, sums)
        partials[block] = total_of(sums)


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
