"""Sums of squares in float64 and in-place clipping.

Sums go over blocks of a fixed size, each in a fixed order, whatever the number of threads.
"""

import numpy as np
from numba import prange
from numba.extending import overload
from numba.np.numpy_support import as_dtype

from fastopt.kernels.cpu.flat import array_at
from fastopt.kernels.cpu.formats import CODECS, itemsize, same
from fastopt.kernels.cpu.memory import view
from fastopt.kernels.cpu.tables import DIM, GROUPS, PARAM, SKIPPED, gradient_of, row_of_group
from fastopt.kernels.elements import define
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
def sum_squares_arrays(like, kinds, addresses, bases, scale, partials):
    """Sums of squares of arrays, times ``scale**2`` (a float64): partials of BLOCK elements each, whichever
    arrays they belong to, so that it does not matter how elements are divided into arrays.

    like: a number of the type that is computed with. kinds: the arrays' format. bases: the number of each
    array's first element, and that of all.
    """
    for block in prange(partials.size):
        last = min((block + 1) * BLOCK, bases[-1])
        partials[block] = sum_squares_range(like, kinds, addresses, bases, scale, block * BLOCK, last)


@helper
def sum_squares_range(like, kinds, addresses, bases, scale, first, last):
    sums = np.zeros(LANES)
    for t in range(array_at(bases, first), addresses.size):
        base = bases[t]
        if base >= last:
            break
        at, end = max(first - base, 0), min(last - base, bases[t + 1] - base)
        while at < end:
            lane = (base + at) % LANES
            size = min(LANES - lane, end - at)
            add_squares_at(kinds, like, addresses[t], at, scale, sums[lane : lane + size])
            at += size
    return total_of(sums)


def add_squares_at(kinds, like, address, at, scale, sums):
    """``sums[i] += (g[at + i] * scale)**2``, in float64, for the array ``g`` at an address."""
    _add_squares_at(kinds.members[0], np.dtype(type(like)))(kinds, like, address, at, scale, sums)


@overload(add_squares_at)
def _overload_add_squares_at(kinds, like, address, at, scale, sums):
    return _add_squares_at(kinds.instance_class.members[0], as_dtype(like))


def _add_squares_at(kind, like):
    stored = CODECS[kind].stored(0) if kind in CODECS else like.type(0)
    decode = CODECS[kind].decode if kind in CODECS else same
    width = itemsize(kind, like.itemsize)
    add = restricted_helper(
        define(
            "add_decoded",
            "g, scale, sums",
            "for k in range(g.size):",
            "    i = np.uint64(k)",
            "    x = np.float64(decode(g[i])) * scale",
            "    sums[i] += x * x",
            np=np,
            decode=decode,
        )
    )

    def add_at(kinds, like, address, at, scale, sums):
        add(view(address + at * width, sums.size, stored), scale, sums)

    return add_at


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
