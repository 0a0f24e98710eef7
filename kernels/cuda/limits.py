"""Rows of tables whose norm is too large, scaled down.

As many lanes of a warp as a row has vectors take a row; segments say which rows there are. Squares are added
up in float64, in a fixed order.

Bytes moved: each row named read, those above the limit read and written once more.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.extending import register_jitable

from fastopt.kernels.cuda.lanes import group_sum
from fastopt.kernels.cuda.launch import kernel
from fastopt.kernels.cuda.memory import (
    WARP,
    integer,
    lane_and_warp,
    load_vector,
    store_vector,
    warp_max,
)
from fastopt.kernels.magnitude import unit_of
from fastopt.kernels.source import define

THREADS = 256
WARPS = THREADS // WARP
_DOUBLE = np.float64(0)


@kernel("iiiiiiiif", THREADS)
def limit_norms(dtype: np.dtype, length: int) -> Any:
    """``(table, dim, bits, rows, bounds, first_row, left_out, groups, max_norm)``: scale the rows whose
    norm is above ``max_norm`` by ``max_norm / (norm + 1e-7)``.

    bits: 2 to this are the lanes that take a row, ``length`` elements at a time each. rows, bounds: addresses
    of the segments' rows, and of which of them are this table's. left_out: a row that is none of the table.
    groups: of rows that the warps of all blocks take at a time.
    """
    squares, rescale = _squares(dtype, length), _rescale(dtype, length)
    cast, itemsize = dtype.type, dtype.itemsize

    def limit_norms(table, dim, bits, rows, bounds, first_row, left_out, groups, max_norm):
        lane, warp = lane_and_warp()
        lanes = np.int64(1) << bits
        member = (lane & (lanes - 1)) * length
        segment, last = integer(bounds, 0), integer(bounds, 1)
        segment += (np.int64(cuda.blockIdx.x) * WARPS + warp) << (5 - bits)
        while segment < last:  # the same for all lanes of a warp
            own = segment + (lane >> bits)
            row = integer(rows, min(own, last - 1)) - first_row
            here = own < last and row != left_out
            place = table + row * dim * itemsize
            last_element = dim if here else np.int64(0)
            total = group_sum(squares(place, member, last_element, lanes, 1.0), bits)
            unit = unit_of(total) if here else 1.0
            if warp_max(np.uint32(unit != 1.0)):
                again = group_sum(squares(place, member, last_element, lanes, unit), bits)
                total = total if unit == 1.0 else again
            norm = math.sqrt(total)
            if norm * unit > max_norm:
                factor = cast(max_norm / unit / (norm + 1e-7 / unit))
                rescale(place, member, last_element, lanes, factor)
            segment += groups

    return limit_norms


def _lines(dtype: np.dtype, length: int, *lines: str) -> list[str]:
    return [
        "while d < dim:",
        f"    v = load_vector(row + d * {dtype.itemsize}, zero, {length})",
        *(f"    {line}" for line in lines),
        f"    d += lanes * {length}",
    ]


def _squares(dtype: np.dtype, length: int) -> Callable:
    """``(row, d, dim, lanes, unit)``: the sum of squares of a lane's elements over ``unit``."""
    adding = [line for e in range(length) for line in (f"y = np.float64(v[{e}]) * over", "total += y * y")]
    made = define(
        "squares",
        "row, d, dim, lanes, unit",
        "over, total = 1.0 / unit, double",
        *_lines(dtype, length, *adding),
        "return total",
        np=np,
        load_vector=load_vector,
        zero=dtype.type(0),
        double=_DOUBLE,
    )
    return register_jitable(made)


def _rescale(dtype: np.dtype, length: int) -> Callable:
    """``(row, d, dim, lanes, factor)``: multiply a lane's elements."""
    products = ", ".join(f"v[{e}] * factor" for e in range(length))
    made = define(
        "rescale",
        "row, d, dim, lanes, factor",
        *_lines(dtype, length, f"store_vector(row + d * {dtype.itemsize}, ({products},))"),
        "return None",
        load_vector=load_vector,
        store_vector=store_vector,
        zero=dtype.type(0),
    )
    return register_jitable(made)
