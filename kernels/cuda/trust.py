"""Updates by rules with a trust ratio: the length of a step depends on norms of the whole array.

The ratios are found on the device, before the update by dense.py: a kernel adds up the squares of the
parameter and of the direction, over blocks of elements that begin with their array, and another adds those of
an array and writes the array's own hyperparameters, the ratio in the learning rate. Sums are in float64, each
in a fixed order: they depend neither on the grid nor on the other arrays. Those of float64 are taken once
more, in units that the first sums ask for (see ``fastopt.kernels.magnitude``); where these are 1, nothing is
done.

Bytes moved, before the update: the parameter, the gradient and the state read; for float32 LAMB 16 an
element.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.extending import register_jitable

from fastopt.kernels.cuda.elements import Code, prototypes
from fastopt.kernels.cuda.launch import kernel
from fastopt.kernels.cuda.layout import ARRAY_ALIGNED, ARRAY_SHARED, ARRAY_SIZE, array_columns
from fastopt.kernels.cuda.memory import (
    integer,
    lane_and_warp,
    last_at_most,
    load,
    numbers_at,
    store,
)
from fastopt.kernels.cuda.sums import THREADS, WARPS, block_sum
from fastopt.kernels.cuda.vectors import Vectors
from fastopt.kernels.element import trust_ratio, unpack
from fastopt.kernels.layout import ARRAY_NUMBERS
from fastopt.kernels.magnitude import unit_of
from fastopt.kernels.source import define

SUMMED = (
    8_192  # elements whose squares are summed up apart, a multiple of what a block of threads takes at a time
)


@kernel("iiiiiii", THREADS)
def sum_directions(code: Code) -> Any:
    """``(table, bases, arrays, numbers, units, again, sums)``: the sums of squares of the parameter and of
    the direction of each block of SUMMED elements.

    table: rows of layout.py. bases: int64, the number of each array's first block, and that of all. numbers:
    rows of hyperparameters, of the type that is computed with. units: float64 [array, 2], what numbers are
    divided by before they are squared if ``again``; arrays whose units are 1 are then left out. sums: float64
    [block, 2].
    """
    h, c, like = prototypes(code)
    columns, width, size = array_columns(len(code.formats)), len(h) + len(c), like.itemsize
    of_c = len(h) * size
    vectors = Vectors(code.formats, code.compute)
    sum_run, run = register_jitable(_sum_of_run(vectors)), vectors.run
    one = np.float64(1)

    def sum_directions(table, bases, arrays, numbers, units, again, sums):
        lane, warp = lane_and_warp()
        block = np.int64(cuda.blockIdx.x)
        while block < integer(bases, arrays):
            t = last_at_most(bases, arrays, block)
            p_unit = u_unit = one
            if again:
                p_unit, u_unit = load(units + t * 16, one), load(units + t * 16 + 8, one)
            if not again or p_unit != one or u_unit != one:
                row = table + t * columns * 8
                first = (block - integer(bases, t)) * SUMMED
                last = min(first + SUMMED, integer(row, ARRAY_SIZE))
                own = numbers + integer(row, ARRAY_SHARED + ARRAY_NUMBERS) * width * size
                own_h = unpack(h, numbers_at(h, own, like), like)
                own_c = unpack(c, numbers_at(c, own + of_c, like), like)
                aligned = integer(row, ARRAY_ALIGNED) != 0
                p_sq = u_sq = 0.0
                at = first + warp * run
                while at < last:
                    p_own, u_own = sum_run(
                        own_h, own_c, row, aligned, at, last, lane, one / p_unit, one / u_unit
                    )
                    p_sq += p_own
                    u_sq += u_own
                    at += WARPS * run
                p_sq, u_sq = block_sum(p_sq), block_sum(u_sq)
                if cuda.threadIdx.x == 0:
                    store(sums + block * 16, p_sq)
                    store(sums + block * 16 + 8, u_sq)
            block += np.int64(cuda.gridDim.x)

    return sum_directions


def _sum_of_run(vectors: Vectors) -> Callable:
    """The function that sums up the squares of a lane's elements and of their directions, over units."""
    lines = [*vectors.opening(), "p_sq = u_sq = 0.0"]
    for j in range(vectors.count):
        lines += vectors.reads(j)
    for j in range(vectors.count):
        for e in range(vectors.length):
            lines += [
                f"p, u = direction(h, c, {vectors.given(j, e)})",
                f"if i{j} + {e} < last:",
                "    x, y = np.float64(p) * over_p, np.float64(u) * over_u",
                "    p_sq += x * x",
                "    u_sq += y * y",
            ]
    names = {**vectors.names, "direction": vectors.elements.direction}
    arguments = "h, c, row, aligned, at, last, lane, over_p, over_u"
    return define("sum_run", arguments, *lines, "return p_sq, u_sq", **names)


@kernel("iiiiiiiii", THREADS)
def find_trust_ratios(code: Code) -> Any:
    """``(table, bases, arrays, exact, numbers, sums, units, again, own)``: set row t of ``own`` to the
    hyperparameters of array t, its trust ratio in the learning rate.

    The arguments are those of :func:`sum_directions`, which has set ``sums``, and ``exact``, the float64
    hyperparameters. units: become those that the sums ask for, unless ``again``.
    """
    h, c, like = prototypes(code)
    columns, width, size, cast = array_columns(len(code.formats)), len(h) + len(c), like.itemsize, type(like)
    double, one = np.float64(0), np.float64(1)

    def find_trust_ratios(table, bases, arrays, exact, numbers, sums, units, again, own):
        thread = np.int64(cuda.threadIdx.x)
        t = np.int64(cuda.blockIdx.x)
        while t < arrays:
            row = table + t * columns * 8
            p_unit = u_unit = one
            if again:
                p_unit, u_unit = load(units + t * 16, one), load(units + t * 16 + 8, one)
            if not again or p_unit != one or u_unit != one:
                p_sq = u_sq = 0.0
                block = integer(bases, t) + thread
                while block < integer(bases, t + 1):
                    p_sq += load(sums + block * 16, double)
                    u_sq += load(sums + block * 16 + 8, double)
                    block += THREADS
                p_sq, u_sq = block_sum(p_sq), block_sum(u_sq)
                named = integer(row, ARRAY_SHARED + ARRAY_NUMBERS) * width
                place = own + t * width * size
                if thread == 0:
                    own_h = unpack(h, numbers_at(h, exact + named * 8, double), double)
                    ratio = trust_ratio(own_h, p_sq, u_sq, p_unit, u_unit, integer(row, ARRAY_SIZE))
                    store(place, cast(load(exact + named * 8, double) * ratio))
                    if not again:
                        store(units + t * 16, unit_of(p_sq))
                        store(units + t * 16 + 8, unit_of(u_sq))
                elif thread < width:
                    store(place + thread * size, load(numbers + (named + thread) * size, like))
            t += np.int64(cuda.gridDim.x)

    return find_trust_ratios
