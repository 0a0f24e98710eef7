"""Sparse updates and reads: the rows of a table that indices name."""

import numpy as np
from numba import prange

from fastopt.kernels.cpu.prefetch import prefetch, prefetch_each
from fastopt.kernels.elements import update_row
from fastopt.kernels.jit import Kernel, helper

GROUPS_PER_CHUNK = 256  # distinct rows; small, because popular rows make chunks uneven
LOOKUPS_PER_CHUNK = 256
AHEAD = 8  # rows that are fetched before their turn: memory answers in the time of a few


@helper
def chunks_of(starts):
    """How many chunks the groups make."""
    return (starts.size - 1 + GROUPS_PER_CHUNK - 1) // GROUPS_PER_CHUNK


@helper
def sum_group(total, values, order, first, last):
    """Sum rows ``order[first:last]`` of ``values`` into ``total``, in that order."""
    for k in range(first, last):
        if k + AHEAD < order.size:
            prefetch(values, np.int64(order[k + AHEAD]))
        position = order[k]
        if k == first:
            for d in range(total.size):
                total[d] = values[position, d]
        else:
            for d in range(total.size):
                total[d] += values[position, d]


@Kernel
def update_rows(h, c, p, values, rows, order, starts, state, row_state):
    """Update the rows of the 2-D ``p`` that the groups (see index.py) name, each once, with the
    sum of its gradients among the rows of ``values``.

    Bytes moved: ``values`` once, and each distinct row of p and the state read and written.
    """
    for chunk in prange(chunks_of(starts)):
        update_chunk(h, c, p, values, rows, order, starts, np.int64(chunk), state, row_state)


@helper
def update_chunk(h, c, p, values, rows, order, starts, chunk, state, row_state):
    """One chunk's share of :func:`update_rows`; apart, because what stands in a prange compiles slowly."""
    total = np.empty(p.shape[1], p.dtype)
    groups = starts.size - 1
    first = chunk * GROUPS_PER_CHUNK
    for k in range(first, min(first + GROUPS_PER_CHUNK, groups)):
        if k + AHEAD < groups:
            row = np.int64(rows[starts[k + AHEAD]])
            prefetch(p, row)
            prefetch_each(state, row)
        sum_group(total, values, order, starts[k], starts[k + 1])
        update_row(h, c, p, total, rows[starts[k]], state, row_state)


@Kernel
def gather(table, indices, out):
    """``out[k] = table[indices[k]]``, for a 2-D table and 1-D indices."""
    chunks = (indices.size + LOOKUPS_PER_CHUNK - 1) // LOOKUPS_PER_CHUNK
    for chunk in prange(chunks):
        first = chunk * LOOKUPS_PER_CHUNK
        for k in range(first, min(first + LOOKUPS_PER_CHUNK, indices.size)):
            if k + AHEAD < indices.size:
                prefetch(table, np.int64(indices[k + AHEAD]))
            row = indices[k]
            for d in range(table.shape[1]):
                out[k, d] = table[row, d]


@Kernel
def coalesce(values, order, starts):
    """Put each group's sum in the place of its first member and zeros in the places of the others."""
    groups = starts.size - 1
    chunks = (groups + GROUPS_PER_CHUNK - 1) // GROUPS_PER_CHUNK
    for chunk in prange(chunks):
        total = np.empty(values.shape[1], values.dtype)
        first = chunk * GROUPS_PER_CHUNK
        for k in range(first, min(first + GROUPS_PER_CHUNK, groups)):
            sum_group(total, values, order, starts[k], starts[k + 1])
            for d in range(total.size):
                values[order[starts[k]], d] = total[d]
            for j in range(starts[k] + 1, starts[k + 1]):
                for d in range(total.size):
                    values[order[j], d] = 0
