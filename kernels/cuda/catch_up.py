"""Rows of tables take the steps that they missed (see ``fastopt.kernels.catch_up``): a warp a row.

What the steps after each step of a history come to is tabulated first, by a thread for each: that takes
float64 and many registers, of which the kernel over rows then needs few. The kind Loop has no such numbers
(see catch_up_loop.py).

Bytes moved: those of a row of the table and of its state read and written, for each that is behind.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.extending import register_jitable

from fastopt.kernels.catch_up import caught_up, coefficient_count, coefficients, row_caught_up, tabulated
from fastopt.kernels.cuda.catch_up_loop import loop_over_steps
from fastopt.kernels.cuda.elements import Code, prototypes
from fastopt.kernels.cuda.launch import kernel
from fastopt.kernels.cuda.memory import (
    WARP,
    integer,
    lane_and_warp,
    load_each,
    meet,
    numbers_at,
    store,
)
from fastopt.kernels.cuda.row_vectors import row_slots, row_vectors
from fastopt.kernels.element import unpack
from fastopt.kernels.intrinsics import view_2d
from fastopt.kernels.layout import (
    TABLE_DIM,
    TABLE_FIRST_ROW,
    TABLE_KEY,
    TABLE_POSITION,
    TABLE_ROW_STEPS,
    TABLE_ROWS,
    TABLE_SKIPPED,
    TABLE_STEP,
    TABLE_TABULATED,
    TABLE_TABULATED_FROM,
)
from fastopt.kernels.rule import Loop
from fastopt.kernels.source import define

THREADS = 128
WARPS = THREADS // WARP


@kernel("iiiiiiii", THREADS)
def tabulate(kind: type, compute: np.dtype) -> Any:
    """``(steps, rows, columns, window, base, now, count, table)``: what the steps up to ``now`` come to after
    each of ``count`` steps from ``base`` on: rows of coefficients of the type that is computed with.

    steps: float64 [rows, columns], of a history with this ``window``.
    """
    mode, like, double = kind(), compute.type(0), np.float64(0)
    width, size = coefficient_count(kind), compute.itemsize
    lines = [f"store(place + {n * size}, k[{n}])" for n in range(width)]
    store_numbers = register_jitable(define("store_numbers", "place, k", *lines, "return None", store=store))

    def tabulate(steps, rows, columns, window, base, now, count, table):
        i = np.int64(cuda.blockIdx.x) * THREADS + np.int64(cuda.threadIdx.x)
        if i < count:
            history = view_2d(steps, rows, columns, double)
            k = coefficients(mode, history, window, base, base + i, now, like)
            store_numbers(table + i * width * size, k)

    return tabulate


@kernel("iiiiiiiii", THREADS)
def catch_up_rows(code: Code, kind: type) -> Any:
    """``(table, numbers, bounds, count, rows, aligned, mark, memory, memory_size)``: have rows take the steps
    before the step ``table[TABLE_STEP]`` that they missed, and set what steps they have taken to ``mark``.

    table: columns of ``fastopt.kernels.layout``. numbers: hyperparameters of the rule, of the type that is
    computed with. bounds: the address of two int64, the first segment and the one after the last; or 0 for
    the rows up to ``count``. rows: how many the table has; segments of others are left out. aligned: whether
    rows allow loads and stores of whole vectors. memory: for loop_over_steps, so many bytes a warp.
    """
    h, _, like = prototypes(code)
    take = register_jitable(loop_over_steps(code) if kind is Loop else _all_at_once(code, kind))
    _, store_row = row_slots(code)

    def catch_up_rows(table, numbers, bounds, count, rows, aligned, mark, memory, memory_size):
        lane, warp = lane_and_warp()
        own = np.int64(cuda.blockIdx.x) * WARPS + warp
        own_memory = memory + own * memory_size
        own_h = unpack(h, numbers_at(h, numbers, like), like)
        step, skipped = integer(table, TABLE_STEP) - 1, integer(table, TABLE_SKIPPED)
        listed, first_row = integer(table, TABLE_ROWS), integer(table, TABLE_FIRST_ROW)
        row_steps = integer(table, TABLE_ROW_STEPS)
        first, total = np.int64(0), count
        if bounds != 0:
            first = integer(bounds, 0)
            total = integer(bounds, 1) - first
        while own < total:
            row = own
            if bounds != 0:
                row = integer(listed, first + own) - first_row
            if row < rows and row != skipped:
                place = row_steps + row * 8
                taken = integer(place, 0)
                if taken < step:
                    new = take(own_h, table, row, taken, step, aligned != 0, lane, own_memory)
                    meet()  # every lane has read what one of them writes, and no more needs the memory
                    if lane == 0:
                        store_row(table, row, new)
                        store(place, mark)
                elif taken < mark:
                    meet()
                    if lane == 0:
                        store(place, mark)
            own += np.int64(cuda.gridDim.x) * WARPS

    return catch_up_rows


def _all_at_once(code: Code, kind: type) -> Callable:
    """The function that has a row take the steps after ``first`` in one go, and returns what becomes of its
    state of one element a row."""
    mode, like, size, width = kind(), code.compute.type(0), code.compute.itemsize, coefficient_count(kind)
    vectors, (load_row, _) = row_vectors(code.formats, code.compute), row_slots(code)
    lines = vectors.loads()
    for j, e in vectors.elements_of_lane():
        numbers = ", ".join(f"x{j}_{e}[{n}]" for n in range(len(vectors.own)))
        lines.append(f"x{j}_{e} = caught_up(k, h, {numbers}, *row_values)")
    lines += vectors.stores_of_elements()
    take_run = vectors.function(["k", "h", "row_values"], lines, caught_up=caught_up)
    run = vectors.run

    def all_at_once(h, table, row, first, last, aligned, lane, memory):
        i = first - integer(table, TABLE_TABULATED_FROM)
        k = tabulated(mode, load_each(integer(table, TABLE_TABULATED) + i * width * size, like, width))
        dim, key = integer(table, TABLE_DIM), integer(table, TABLE_KEY)
        position = integer(table, TABLE_POSITION) + row * dim
        row_values = load_row(table, row)
        at = np.int64(0)
        while at < dim:
            take_run(table, row, aligned, at, dim, key, position, lane, k, h, row_values)
            at += run
        return row_caught_up(k, h, *row_values)

    return all_at_once
