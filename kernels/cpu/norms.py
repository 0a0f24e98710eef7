"""Sums of squares in float64 and in-place clipping.

Sums go over blocks of a fixed size, each in a fixed order, whatever the number of threads.
"""

import functools
from collections.abc import Callable

import numpy as np

from fastopt.kernels.cpu.chunks import chunk_count, chunk_ends
from fastopt.kernels.cpu.dense import array_at
from fastopt.kernels.cpu.for_each import for_each
from fastopt.kernels.cpu.jit import Kernel, helper, restricted_helper
from fastopt.kernels.cpu.runs import Formats, made_by
from fastopt.kernels.cpu.segments import fetch_values, fetching, gradient_of, row_of_segment
from fastopt.kernels.formats import PLAIN, Format
from fastopt.kernels.intrinsics import view
from fastopt.kernels.layout import TABLE_DIM, TABLE_PARAMETER, TABLE_SEGMENTS, TABLE_SKIPPED
from fastopt.kernels.source import define

SUMMED = 8_192  # elements whose squares are summed up apart, a multiple of formats.BLOCK
LANES = 512  # sums that grow side by side, so that the loop over them vectorises
SEGMENTS_PER_BLOCK = 64


@functools.cache
def _adder(kind: Format) -> Callable:
    """``(g, scale, sums)``: ``sums[i] += (g[i] * scale)**2``, in float64, for a row ``g`` in a format."""
    return restricted_helper(
        define(
            "add_squares",
            "g, scale, sums",
            "for k in range(g.size):",
            "    i = np.uint64(k)",
            "    x = np.float64(decode(g[i])) * scale",
            "    sums[i] += x * x",
            np=np,
            decode=kind.decode,
        )
    )


add_squares = _adder(PLAIN)


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
def sum_squares_arrays(team, like, kinds, addresses, bases, scale, partials):
    """Sums of squares of arrays, times ``scale**2`` (a float64): partials of SUMMED elements each, whichever
    arrays they belong to, so that it does not matter how elements are divided into arrays.

    like: a number of the type that is computed with. kinds: the arrays' format. bases: the number of each
    array's first element, and that of all.
    """
    for_each(team, sum_squares_range, partials.size, (like, kinds, addresses, bases, scale, partials))


@helper
def sum_squares_range(block, like, kinds, addresses, bases, scale, partials):
    first, last = block * SUMMED, min((block + 1) * SUMMED, bases[-1])
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
    partials[block] = total_of(sums)


def _adder_at(members: Formats, like: np.dtype) -> Callable:
    [kind] = members
    return define(
        "add_squares_at",
        "kinds, like, address, at, scale, sums",
        f"add(view(address + at * {kind.itemsize(like)}, sums.size, stored), scale, sums)",
        view=view,
        stored=kind.zero(like),
        add=_adder(kind),
        kind=kind.name,
    )


@made_by(_adder_at)
def add_squares_at(kinds, like, address, at, scale, sums):
    """``sums[i] += (g[at + i] * scale)**2``, in float64, for the array ``g`` at an address."""


@Kernel
def sum_squares_tables(team, won, like, tables, blocks, scale, partials):
    """The same for gradients of tables (see layout.py), a row's gradients summed: partials of
    SEGMENTS_PER_BLOCK segments each, blocks being of [table, number of the block in it]. won: see
    segments.py."""
    for_each(team, sum_squares_block, blocks.shape[0], (won, like, tables, blocks, scale, partials))


@helper
def sum_squares_block(k, won, like, tables, blocks, scale, partials):
    table, block = tables[blocks[k, 0]], blocks[k, 1]
    dim = table[TABLE_DIM]
    total = np.empty_like(view(table[TABLE_PARAMETER], dim, like))
    sums = np.zeros(dim)
    first, last = chunk_ends(block, SEGMENTS_PER_BLOCK, table[TABLE_SEGMENTS])
    fetched, each, final = fetching(table, first, last)
    for segment in range(first, last):
        fetch_values(table, fetched, min(fetched + each, final))
        fetched += each
        if row_of_segment(table, segment) != table[TABLE_SKIPPED]:
            add_squares(view(gradient_of(table, won, like, total, segment), dim, like), scale, sums)
    partials[k] = total_of(sums)


@Kernel
def scale_in_place(team, g, factor):
    """``g *= factor``, for a 1-D ``g`` and a factor of its dtype."""
    for_each(team, scale_part, chunk_count(g.size, SUMMED), (g, factor))


@helper
def scale_part(part, g, factor):
    own = g[part * SUMMED : (part + 1) * SUMMED]
    for i in range(own.size):
        own[i] *= factor


@Kernel
def clip_in_place(team, g, limit):
    """Clip each element of the 1-D ``g`` to [-limit, limit]; NaN stays NaN."""
    for_each(team, clip_part, chunk_count(g.size, SUMMED), (g, limit))


@helper
def clip_part(part, g, limit):
    own = g[part * SUMMED : (part + 1) * SUMMED]
    for i in range(own.size):
        value = own[i]
        if value > limit:
            own[i] = limit
        elif value < -limit:
            own[i] = -limit
