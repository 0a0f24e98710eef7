"""Dense updates: every element of a buffer, in one pass."""

import numpy as np
from numba import prange

from fastopt.kernels.elements import element_of, load, store, update_element, update_row
from fastopt.kernels.jit import Kernel

ROWS_PER_CHUNK = 64


@Kernel
def flat(h, c, p, g, state):
    """Update ``p`` with ``g``, both 1-D and of one dtype, and each array of the tuple ``state``.

    Bytes moved: each of p and the state read and written, g read; for float32 Adam 28 an element.
    """
    for k in prange(p.size):
        i = np.uint64(k)
        new = update_element(h, c, p[i], g[i], *load(state, i))
        p[i] = new[0]
        store(state, i, new[1:])  # apart from p: one store over (p, *state) would not vectorise


@Kernel
def flat_rows(h, c, p, g, state, row_state):
    """Update every row of the 2-D ``p``, for rules with state of one element a row."""
    chunks = (p.shape[0] + ROWS_PER_CHUNK - 1) // ROWS_PER_CHUNK
    for chunk in prange(chunks):
        first = chunk * ROWS_PER_CHUNK
        for row in range(first, min(first + ROWS_PER_CHUNK, p.shape[0])):
            update_row(h, c, p[row], g[row], load(state, row), element_of(row_state, row))
