"""Loops over elements and rows that the simulator can run: it knows neither intrinsics nor shuffles."""

import numpy as np
from numba import cuda
from numba.extending import register_jitable

from fastopt.kernels.element import begin_row, load, regularise, store, update_element, update_elements


def flat(h, c, p, g, state):
    """Update ``p`` with ``g``, both 1-D, and each array of the tuple ``state``."""
    # With signed 64-bit indices the loop would carry sign checks and slow divisions.
    i = np.uint64(cuda.grid(1))
    stride = np.uint64(cuda.gridsize(1))
    size = np.uint64(p.size)
    while i < size:
        new = update_element(h, c, p[i], g[i], *load(state, i))
        p[i] = new[0]
        store(state, i, new[1:])
        i += stride


def flat_rows(h, c, p, g, state, row_state):
    """Update every row of the 2-D ``p``, a thread a row, for rules with one number a row as their state."""
    row = np.uint64(cuda.grid(1))
    stride = np.uint64(cuda.gridsize(1))
    rows = np.uint64(p.shape[0])
    while row < rows:
        update_row(h, c, p[row], g[row], load(state, row), row_state[0][row : row + np.uint64(1)])
        row += stride


@register_jitable
def update_row(h, c, p, g, state, row_state):
    """Update a row; ``row_state`` has one element."""
    total = p.dtype.type(0)
    for d in range(g.size):
        x = regularise(c, p[d], g[d])
        total += x * x
    row_values = begin_row(h, total / p.dtype.type(g.size), (row_state,))
    update_elements(h, c, p, g, state, row_values)
