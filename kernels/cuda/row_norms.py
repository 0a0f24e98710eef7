"""Sums of squares of the gradients of rows, in float64 and in a fixed order.

A block of threads sums up SEGMENTS segments of a table, one warp a segment at a time, its lanes being
columns; a row's gradients are added in the order of their positions, in the type of the values. Partial sums
have fixed places, for as many segments as there are positions: beyond the segments that there really are,
which only the device knows, they are 0.

Bytes moved: each row of values that a gradient names read, once.
"""

from typing import Any

import numpy as np
from numba import cuda
from numba.extending import register_jitable

from fastopt.kernels.cuda.dense import array_of
from fastopt.kernels.cuda.launch import kernel
from fastopt.kernels.cuda.memory import WARP, integer, lane_and_warp, load, store
from fastopt.kernels.cuda.norms import is_done, scale_of
from fastopt.kernels.cuda.sums import THREADS, WARPS, block_sum
from fastopt.kernels.work import TableGradient

SEGMENTS = 64  # whose squares are summed up apart

(
    ROW_VALUES,  # address of [any number, ROW_DIM]
    ROW_DIM,
    ROW_SOURCE,  # address of int32, or 0
    ROW_WEIGHTS,  # address, or 0
    ROW_WINNERS,  # address of int32, or 0
    ROW_SKIPPED,  # a row that gets no gradient, or -1
    ROW_ORDER,  # address of int32
    ROW_STARTS,  # address of int32
    ROW_ROWS,  # address of int64
    ROW_BOUNDS,  # address of int64: the table's first segment, and that after its last
    ROW_FIRST_ROW,
    ROW_FIRST_POSITION,
    ROW_TABLE_ROWS,  # the row of indices outside the table
) = range(13)
COLUMNS = 13

_INDEX, _DOUBLE = np.int32(0), np.float64(0)


def row_of(gradient: TableGradient) -> list[int]:
    """What kernels read of a gradient."""
    own = gradient.segments

    def place(array: Any) -> int:
        return 0 if array is None else array.address

    return [
        gradient.values.address,
        gradient.values.shape[1],
        *map(place, (gradient.source, gradient.weights, gradient.winners)),
        gradient.skipped,
        *map(place, (own.order, own.starts, own.rows)),
        own.bounds.address + own.table * own.bounds.itemsize,
        own.first_row,
        own.first_position,
        own.table_rows,
    ]


@kernel("iiifiii", THREADS)
def sum_squares_of_rows(like: np.dtype) -> Any:
    """``(table, bases, gradients, scale, unit, blocks, partials)``: the sums of squares of each block of
    segments, times ``scale**2``.

    table: rows with the columns above. bases: int64, of each gradient the number of its first block, and that
    of all. Other arguments are those of ``norms.sum_squares``.
    """
    add_row = register_jitable(_adder_of_row(like))

    def sum_squares_of_rows(table, bases, gradients, scale, unit, blocks, partials):
        lane, warp = lane_and_warp()
        own = scale_of(scale, unit)
        block = blocks if is_done(unit) else np.int64(cuda.blockIdx.x)
        while block < blocks:
            t = array_of(bases, gradients, block)
            row = table + t * COLUMNS * 8
            bounds = integer(row, ROW_BOUNDS)
            first = integer(bounds, 0) + (block - integer(bases, t)) * SEGMENTS
            last = min(first + SEGMENTS, integer(bounds, 1))
            total = _DOUBLE
            segment = first + warp
            while segment < last:
                total += add_row(row, segment, lane, own)
                segment += WARPS
            total = block_sum(total)
            if lane == 0 and warp == 0:
                store(partials + block * 8, total)
            block += np.int64(cuda.gridDim.x)

    return sum_squares_of_rows


def _adder_of_row(like: np.dtype) -> Any:
    """``(row, segment, lane, scale)``: the sum of squares of a segment's gradient, of a lane's columns."""
    zero, size = like.type(0), like.itemsize

    def add_row(row, segment, lane, scale):
        total = _DOUBLE
        named = integer(integer(row, ROW_ROWS), segment) - integer(row, ROW_FIRST_ROW)
        if named == integer(row, ROW_SKIPPED) or named == integer(row, ROW_TABLE_ROWS):
            return total
        values, dim, source = integer(row, ROW_VALUES), integer(row, ROW_DIM), integer(row, ROW_SOURCE)
        winners = integer(row, ROW_WINNERS)
        weights = integer(row, ROW_WEIGHTS) if winners == 0 else 0
        order, origin = integer(row, ROW_ORDER), integer(row, ROW_FIRST_POSITION)
        starts = integer(row, ROW_STARTS) + segment * 4
        first, last = np.int64(load(starts, _INDEX)), np.int64(load(starts + 4, _INDEX))
        d = lane
        while d < dim:
            gradient = zero
            for j in range(first, last):
                position = np.int64(load(order + j * 4, _INDEX)) - origin
                at = position
                if source:
                    at = np.int64(load(source + (j - origin) * 4, _INDEX))
                at = at * dim + d
                if winners == 0 or np.int64(load(winners + at * 4, _INDEX)) == position:
                    x = load(values + at * size, zero)
                    gradient += load(weights + (j - origin) * size, zero) * x if weights else x
            x = np.float64(gradient) * scale
            total += x * x
            d += WARP
        return total

    return add_row
