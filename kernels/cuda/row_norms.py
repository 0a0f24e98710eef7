"""Sums of squares of the gradients of rows, in float64 and in a fixed order.

A block of threads sums up SEGMENTS segments of a table. A warp, or as many of its lanes as a row has columns
for, takes a segment at a time; a row's gradients are added in the order of their positions, in the type of
the values. Partial sums have fixed places, for as many segments as there are positions: beyond the segments
that there really are, which only the device knows, they are 0.

Bytes moved: each row of values that a gradient names read, once.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.extending import register_jitable

from fastopt.kernels.cuda.lanes import VECTOR_BYTES, lane_bits, vector_length
from fastopt.kernels.cuda.launch import kernel
from fastopt.kernels.cuda.memory import (
    integer,
    last_at_most,
    load,
    load_if,
    load_vector,
    store,
)
from fastopt.kernels.cuda.norms import is_done, scale_of
from fastopt.kernels.cuda.segments import DeviceSegments
from fastopt.kernels.cuda.sums import THREADS, block_sum
from fastopt.kernels.source import define
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
    ROW_WHOLE,  # whether lanes read whole vectors
    ROW_LANE_BITS,  # 2 to this are the lanes that take a segment
) = range(15)
COLUMNS = 15
AHEAD = 4  # positions whose values are on their way at the same time

_INDEX, _DOUBLE = np.int32(0), np.float64(0)


def segments_of(gradient: TableGradient) -> DeviceSegments:
    """The segments of a gradient, which are a device's."""
    own: Any = gradient.segments
    return own


def row_of(gradient: TableGradient) -> list[int]:
    """What kernels read of a gradient."""
    own, values = segments_of(gradient), gradient.values
    dim = values.shape[1]
    length = vector_length(values.itemsize, dim, values.address)

    def place(array: Any) -> int:
        return 0 if array is None else array.address

    return [
        values.address,
        dim,
        *map(place, (gradient.source, gradient.weights, gradient.winners)),
        gradient.skipped,
        *map(place, (own.order, own.starts, own.rows)),
        own.own_bounds,
        own.first_row,
        own.first_position,
        own.table_rows,
        int(length > 1),
        lane_bits(dim // length),
    ]


@kernel("iiifiii", THREADS)
def sum_squares_of_rows(like: np.dtype) -> Any:
    """``(table, bases, gradients, scale, unit, blocks, partials)``: the sums of squares of each block of
    segments, times ``scale**2``.

    table: rows with the columns above. bases: int64, of each gradient the number of its first block, and that
    of all. Other arguments are those of ``norms.sum_squares``.
    """
    length = VECTOR_BYTES // like.itemsize
    of_vector, of_column = (register_jitable(_adder_of_columns(like, n)) for n in (length, 1))

    def sum_squares_of_rows(table, bases, gradients, scale, unit, blocks, partials):
        thread = np.int64(cuda.threadIdx.x)
        own = scale_of(scale, unit)
        block = blocks if is_done(unit) else np.int64(cuda.blockIdx.x)
        while block < blocks:
            t = last_at_most(bases, gradients, block)
            row = table + t * COLUMNS * 8
            bounds, bits = integer(row, ROW_BOUNDS), integer(row, ROW_LANE_BITS)
            segment = integer(bounds, 0) + (block - integer(bases, t)) * SEGMENTS
            last = min(segment + SEGMENTS, integer(bounds, 1))
            segment += thread >> bits
            lanes, dim = np.int64(1) << bits, integer(row, ROW_DIM)
            member = thread & (lanes - 1)
            total = _DOUBLE
            while segment < last:
                if has_gradient(row, segment):
                    if integer(row, ROW_WHOLE) != 0:
                        d = member * length
                        while d < dim:
                            total += of_vector(row, segment, d, own)
                            d += lanes * length
                    else:
                        d = member
                        while d < dim:
                            total += of_column(row, segment, d, own)
                            d += lanes
                segment += THREADS >> bits
            total = block_sum(total)
            if thread == 0:
                store(partials + block * 8, total)
            block += np.int64(cuda.gridDim.x)

    return sum_squares_of_rows


@register_jitable
def has_gradient(row, segment):
    """Whether the row of a segment is one of the table, and is not skipped."""
    named = load(integer(row, ROW_ROWS) + segment * 8, np.int64(0)) - integer(row, ROW_FIRST_ROW)
    return named != integer(row, ROW_SKIPPED) and named != integer(row, ROW_TABLE_ROWS)


def _adder_of_columns(like: np.dtype, length: int) -> Callable:
    """``(row, segment, d, scale)``: the sum of squares of a segment's gradient, of ``length`` columns from
    ``d`` on."""
    zero, size, columns = like.type(0), like.itemsize, range(length)

    def steps(count: int) -> list[str]:
        """Lines that add the values of ``count`` positions from sorted position ``j`` on."""
        lines = [f"p{u} = np.int64(load(order + (j + {u}) * 4, index)) - origin" for u in range(count)]
        lines += [
            f"a{u} = (np.int64(load(source + (j + {u} - origin) * 4, index)) if source else p{u}) * dim + d"
            for u in range(count)
        ]
        lines += [
            f"w{u} = load_if(weights != 0, weights + (j + {u} - origin) * {size}, one)" for u in range(count)
        ]
        lines += [f"v{u} = load_vector(values + a{u} * {size}, zero, {length})" for u in range(count)]
        for u in range(count):
            lines += ["if winners:"]
            lines += [
                f"    if load(winners + (a{u} + {e}) * 4, index) == p{u}: g{e} += v{u}[{e}]" for e in columns
            ]
            lines += ["else:", *(f"    g{e} += w{u} * v{u}[{e}]" for e in columns)]
        return lines

    squares = [line for e in columns for line in (f"x = np.float64(g{e}) * scale", "total += x * x")]
    places = {
        "values": ROW_VALUES,
        "dim": ROW_DIM,
        "source": ROW_SOURCE,
        "weights": ROW_WEIGHTS,
        "winners": ROW_WINNERS,
        "order": ROW_ORDER,
        "origin": ROW_FIRST_POSITION,
        "starts": ROW_STARTS,
    }
    return define(
        "add_columns",
        "row, segment, d, scale",
        *(f"{name} = integer(row, {column})" for name, column in places.items()),
        "starts += segment * 4",
        "j, last = np.int64(load(starts, index)), np.int64(load(starts + 4, index))",
        f"{' = '.join(f'g{e}' for e in columns)} = zero",
        f"while j + {AHEAD} <= last:",
        *(f"    {line}" for line in [*steps(AHEAD), f"j += {AHEAD}"]),
        "while j < last:",
        *(f"    {line}" for line in [*steps(1), "j += 1"]),
        "total = double",
        *squares,
        "return total",
        np=np,
        integer=integer,
        load=load,
        load_if=load_if,
        load_vector=load_vector,
        index=_INDEX,
        zero=zero,
        one=like.type(1),
        double=_DOUBLE,
    )
