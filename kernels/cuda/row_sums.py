"""The gradient of a row: the sum of the rows of values that its segment names, in the order of positions.

A lane adds up the columns that it works on, the values of several positions on their way at the same time:
the additions, and so the bits, are those of the CPU. Only a long segment, that of a popular row, is not left
to one warp: first, the slots of SLOT sorted positions that it covers wholly are summed up, each by a warp;
the sum is then that of its head, of the slots' sums and of its tail. So the order of additions follows from
the segment alone, whatever the grid.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.extending import register_jitable

from fastopt.kernels.cuda.lanes import VECTOR_BYTES
from fastopt.kernels.cuda.launch import kernel
from fastopt.kernels.cuda.layout import ROWS_ALIGNED, ROWS_BOUNDS, ROWS_SHARED, ROWS_SLOTS
from fastopt.kernels.cuda.memory import (
    WARP,
    integer,
    lane_and_warp,
    last_at_most,
    load,
    load_if,
    load_vector,
    store_if,
)
from fastopt.kernels.layout import (
    TABLE_DIM,
    TABLE_FIRST_POSITION,
    TABLE_ORDER,
    TABLE_SOURCE,
    TABLE_SOURCE_BASE,
    TABLE_SOURCE_ORIGIN,
    TABLE_STARTS,
    TABLE_VALUES,
    TABLE_WEIGHTS,
    TABLE_WINNERS,
)
from fastopt.kernels.source import define

THREADS = 256
WARPS = THREADS // WARP
SLOT_BITS = 7
SLOT = 1 << SLOT_BITS  # sorted positions
LONG = 2 * SLOT  # positions of a segment, above which it is summed up by slots
TOGETHER = 4, 2, 1  # positions whose values are on their way at the same time

_INDEX = np.int32(0)
_PLACES = {
    "values": TABLE_VALUES,
    "dim": TABLE_DIM,
    "source": TABLE_SOURCE,
    "base": TABLE_SOURCE_BASE,
    "weights": TABLE_WEIGHTS,
    "winners": TABLE_WINNERS,
    "order": TABLE_ORDER,
    "origin": TABLE_FIRST_POSITION,
}


@register_jitable
def bounds_of(table, segment):
    """The first sorted position of a segment, and the one after its last."""
    place = integer(table, TABLE_STARTS) + segment * 4
    return np.int64(load(place, _INDEX)), np.int64(load(place + 4, _INDEX))


@register_jitable
def added_if(counts, total, x):
    """A sum with the number ``x``, if that counts."""
    return total + x if counts else total


@functools.cache  # all kernels call the same one, which is compiled once
def gradient_of(like: np.dtype, length: int, whole: bool) -> Callable:
    """``(table, j, last, d, end, slots)``: a tuple, the sum over the sorted positions from ``j`` up to
    ``last`` of ``length`` columns from ``d`` on.

    table: columns of ``fastopt.kernels.layout``. slots: the address of the sums of slots, [slot, dim], or 0.
    whole: whether the columns are there, and can be read by vectors; else those from ``end`` on are 0.
    """
    columns, size = range(length), like.itemsize

    def values_at(place: str, name: str) -> list[str]:
        if whole:
            return [f"{name} = load_vector({place}, zero, {length})"]
        each = (f"load_if(d + {e} < end, {place} + {e * size}, zero)" for e in columns)
        return [f"{name} = ({', '.join(each)},)"]

    def add(count: int) -> list[str]:
        """Lines that add the values of ``count`` positions from ``j`` on."""
        lines = [f"a{u} = np.int64(load(source + (j + {u}) * 4, index)) - base" for u in range(count)]
        lines += [
            f"w{u} = load_if(weights != 0, weights + (j + {u} - origin) * {size}, one)" for u in range(count)
        ]
        for u in range(count):
            lines += values_at(f"values + (a{u} * dim + d) * {size}", f"v{u}")
        for u in range(count):
            lines += [f"g{e} = g{e} + w{u} * v{u}[{e}]" for e in columns]
        return lines

    won = ["a = np.int64(load(source + j * 4, index)) - base"]
    won += ["p = np.int64(load(order + j * 4, index)) - origin"]
    won += values_at(f"values + (a * dim + d) * {size}", "v")
    for e in columns:
        inside = "True" if whole else f"d + {e} < end"
        winner = f"load_if({inside}, winners + (a * dim + d + {e}) * 4, none)"
        won.append(f"g{e} = added_if({winner} == p, g{e}, v[{e}])")
    most, *fewer = TOGETHER
    ranges = [f"while j + {most} <= stop:", *(f"    {line}" for line in [*add(most), f"j += {most}"])]
    for count in fewer:
        ranges += [f"if j + {count} <= stop:", *(f"    {line}" for line in [*add(count), f"j += {count}"])]
    slot = f"slots + (s * dim + d) * {size}"
    gradient = define(
        "gradient",
        "table, j, last, d, end, slots",
        *(f"{name} = integer(table, {column})" for name, column in _PLACES.items()),
        f"source -= integer(table, {TABLE_SOURCE_ORIGIN}) * 4",
        # Any number can be added to -0.0 and stays as it is.
        f"{' = '.join(f'g{e}' for e in columns)} = zero if winners else -zero",
        "if winners:",
        "    while j < last:",
        *(f"        {line}" for line in [*won, "j += 1"]),
        "stop = resume = last",
        f"if slots and last - j > {LONG}:",
        f"    stop = origin + (((j - origin + {SLOT - 1}) >> {SLOT_BITS}) << {SLOT_BITS})",
        f"    resume = origin + (((last - origin) >> {SLOT_BITS}) << {SLOT_BITS})",
        "while True:",
        *(f"    {line}" for line in ranges),
        "    if stop == last:",
        "        break",
        f"    s, end_of_slots = (stop - origin) >> {SLOT_BITS}, (resume - origin) >> {SLOT_BITS}",
        "    while s < end_of_slots:",
        *(f"        {line}" for line in values_at(slot, "t")),
        *(f"        g{e} = g{e} + t[{e}]" for e in columns),
        "        s += 1",
        "    j, stop = resume, last",
        f"return ({''.join(f'g{e}, ' for e in columns)})",
        added_if=added_if,
        load=load,
        load_if=load_if,
        load_vector=load_vector,
        integer=integer,
        np=np,
        index=_INDEX,
        none=np.int32(-1),
        zero=like.type(0),
        one=like.type(1),
    )
    return register_jitable(gradient)


@kernel("iiiii", THREADS)
def sum_slots(like: np.dtype) -> Any:
    """``(tables, columns, bases, count, slots)``: the sums of the slots that long segments cover wholly.

    tables: rows of so many columns (see layout.py). bases: int64, the number of each table's first slot, and
    that of all; slots: how many there are.
    """
    length, size = VECTOR_BYTES // like.itemsize, like.itemsize
    whole, part = (gradient_of(like, length, own) for own in (True, False))
    lines = [f"store_if(d + {e} < dim, place + {e * size}, g[{e}])" for e in range(length)]
    store_sum = define("store_sum", "place, d, dim, g", *lines, "return None", store_if=store_if)
    store_sum = register_jitable(store_sum)

    def sum_slots(tables, columns, bases, count, slots):
        lane, warp = lane_and_warp()
        own = np.int64(cuda.blockIdx.x) * WARPS + warp
        while own < slots:
            t = last_at_most(bases, count, own)
            slot, row = own - integer(bases, t), tables + t * columns * 8
            table = row + ROWS_SHARED * 8
            dim, first = integer(table, TABLE_DIM), integer(table, TABLE_FIRST_POSITION) + slot * SLOT
            if lies_in_long_segment(table, integer(row, ROWS_BOUNDS), first):
                sums = integer(row, ROWS_SLOTS) + slot * dim * size
                aligned = integer(row, ROWS_ALIGNED) != 0
                d = lane * length
                while d < dim:
                    if aligned and d + length <= dim:
                        g = whole(table, first, first + SLOT, d, dim, 0)
                    else:
                        g = part(table, first, first + SLOT, d, dim, 0)
                    store_sum(sums + d * size, d, dim, g)
                    d += WARP * length
            own += np.int64(cuda.gridDim.x) * WARPS

    return sum_slots


@register_jitable
def lies_in_long_segment(table, bounds, first):
    """Whether one of the segments of ``bounds``, a long one, has the slot from ``first`` on wholly."""
    low, high = integer(bounds, 0), integer(bounds, 1)
    starts = integer(table, TABLE_STARTS)
    while high - low > 1:
        middle = (low + high) >> 1
        if np.int64(load(starts + middle * 4, _INDEX)) <= first:
            low = middle
        else:
            high = middle
    begin, end = bounds_of(table, low)
    return end - begin > LONG and begin <= first and first + SLOT <= end
