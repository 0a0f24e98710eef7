"""The floor: kernels with the loads and stores of an update and no arithmetic to speak of."""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import prange

from fastopt._core.backend import host
from fastopt.kernels.cpu.rows import BLOCK
from fastopt.kernels.cpu.segments import MOST_FETCHED, add_row, sum_rows
from fastopt.kernels.intrinsics import AHEAD, prefetch, prefetch_rows, view


@numba.njit(parallel=True)
def _one(p, g):
    for i in prange(p.size):
        p[i] += g[i]


@numba.njit(parallel=True)
def _two(p, g, a):
    for i in prange(p.size):
        x = g[i]
        p[i] += x
        a[i] += x


@numba.njit(parallel=True)
def _three(p, g, a, b):
    for i in prange(p.size):
        x = g[i]
        p[i] += x
        a[i] += x
        b[i] += x


@numba.njit(parallel=True)
def _four(p, g, a, b, c):
    for i in prange(p.size):
        x = g[i]
        p[i] += x
        a[i] += x
        b[i] += x
        c[i] += x


KERNELS = {1: _one, 2: _two, 3: _three, 4: _four}


def floor(p: np.ndarray, g: np.ndarray, states: list[np.ndarray]) -> Callable[[], Any]:
    """A call that reads ``g``, and reads and writes ``p`` and ``states``, arrays as large."""
    kernel = KERNELS[1 + len(states)]
    return lambda: kernel(p, g, *states)


@numba.njit(parallel=True)
def _rows(table, state, row_state, values, summed, rows, order, starts, parts):
    segments, dim = starts.size - 1, values.shape[1]
    like = values.dtype.type(0)
    stride = dim * values.itemsize
    no_weights = np.empty(0, values.dtype)
    for part in prange(parts):
        totals = np.ones((BLOCK, dim), values.dtype)
        places = np.empty(BLOCK, np.int64)
        begin, end = part * segments // parts, (part + 1) * segments // parts
        for block in range(begin, end, BLOCK):
            until = min(block + BLOCK, end)
            fetched, of_block = np.int64(starts[block]), np.int64(starts[until] - starts[block])
            each = min(-(-of_block // (until - block)), MOST_FETCHED) if summed else np.int64(0)
            for k in range(block, until):
                ahead = fetched + AHEAD
                prefetch_rows(values.ctypes.data, stride, order, 0, ahead, min(ahead + each, order.size))
                fetched += each
                if k + AHEAD < segments:
                    prefetch(table.ctypes.data + rows[k + AHEAD] * stride, stride)
                    for n in range(state.shape[1]):
                        at = rows[k + AHEAD] * state.shape[1] + n
                        prefetch(state.ctypes.data + at * stride, stride)
                    if row_state.size:
                        size = values.itemsize
                        prefetch(row_state.ctypes.data + rows[k + AHEAD] * size, size)
                first, last, total = np.int64(starts[k]), np.int64(starts[k + 1]), totals[k - block]
                places[k - block] = total.ctypes.data
                if summed and last - first > 1:
                    sum_rows(values.ctypes.data, stride, order, 0, no_weights, first, last, order.size, total)
                elif summed:
                    places[k - block] = values.ctypes.data + order[first] * stride
            for k in range(block, until):
                own = view(places[k - block], dim, like)
                add_row(view(table.ctypes.data + rows[k] * stride, dim, like), own)
                for n in range(state.shape[1]):
                    at = rows[k] * state.shape[1] + n
                    add_row(view(state.ctypes.data + at * stride, dim, like), own)
                if row_state.size:
                    row_state[rows[k]] += own[0]


def row_floor(
    table: np.ndarray, values: np.ndarray, indices: np.ndarray, states: int, row_states: int, summed: bool
) -> Callable[[], Any]:
    """A call that reads and writes the rows ``indices`` of ``table``, of ``states`` arrays as large, side by
    side, and of ``row_states`` (0 or 1) of one number a row, all sorted beforehand; if ``summed`` it reads
    all ``values`` once and adds them up."""
    [(rows, order, starts, *_)] = host().segments_of([(indices, table.shape[0])])
    state = np.zeros((table.shape[0], states, table.shape[1]), table.dtype)
    row_state = np.zeros(table.shape[0] * row_states, table.dtype)
    parts = 8 * numba.get_num_threads()
    return lambda: _rows(table, state, row_state, values, summed, rows, order, starts, parts)
