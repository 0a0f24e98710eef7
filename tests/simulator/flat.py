"""Loops over elements and rows that the simulator can run: it knows neither intrinsics nor shuffles."""

import numpy as np
from numba import cuda

from fastopt.kernels.element import element_of, load, store, update_element, update_row


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
    """Update every row of the 2-D ``p``, a thread a row, for rules with state of one element a row."""
    row = np.uint64(cuda.grid(1))
    stride = np.uint64(cuda.gridsize(1))
    rows = np.uint64(p.shape[0])
    while row < rows:
        update_row(h, c, p[row], g[row], load(state, row), element_of(row_state, row))
        row += stride
