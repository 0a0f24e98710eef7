"""Sums of squares in float64 and in-place clipping.

Sums go over blocks of a fixed size, each in a fixed order, whatever the number of threads.
"""

import numpy as np
from numba import prange

from fastopt.kernels.cpu.memory import view
from fastopt.kernels.cpu.tables import DIM, GROUPS, PARAM, SKIPPED, gradient_of, row_of_group
from fastopt.kernels.jit import Kernel, helper, restricted_helper

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
        add_sums(sums[:half], sums[size - half : size])
        size -= half
    return sums[0]


@restricted_helper
def add_sums(totals, sums):
    for k in range(totals.size):
        totals[k] += sums[k]


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
def sum_squares_tables(like, tables, blocks, scale, partials):
    """The same for gradients of tables (see tables.py), a row's gradients summed: partials of
    GROUPS_PER_BLOCK groups each, blocks being of [table, number of the block in it]."""
    for block in prange(blocks.shape[0]):
        partials[block] = sum_squares_block(like, tables[blocks[block, 0]], blocks[block, 1], scale)


@helper
def sum_squares_block(like, table, block, scale):
    dim = table[DIM]
    total = np.empty_like(view(table[PARAM], dim, like))
    sums = np.zeros(dim)
    first = block * GROUPS_PER_BLOCK
    for group in range(first, min(first + GROUPS_PER_BLOCK, table[GROUPS])):
        if row_of_group(table, group) != table[SKIPPED]:
            add_squares(view(gradient_of(table, like, total, group), dim, like), scale, sums)
    return total_of(sums)


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
