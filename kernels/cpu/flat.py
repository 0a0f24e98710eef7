"""Dense updates: every element of any number of arrays, in one pass and one launch.

Arrays are described by a row of int64 numbers each. Their elements are numbered from the first array's
first to the last one's last, and a launch is divided by these numbers: chunks are of about equal
size, whatever the sizes of the arrays.
"""

import numpy as np
from numba import prange

from fastopt.kernels.cpu.formats import BLOCK, gradient_itemsize, new_buffers, run_length, update_run
from fastopt.kernels.cpu.memory import view
from fastopt.kernels.elements import unpack
from fastopt.kernels.jit import Kernel, helper

(
    NUMBERS,  # the row of hyperparameters
    POSITION,  # that random bits are counted from
    KEY,  # of the random bits
    PLACES,  # two addresses (see formats.py) each of the parameter, the gradient and the slots
) = range(4)
PARAMETER, GRADIENT, STATE = PLACES, PLACES + 2, PLACES + 4


@Kernel
def update_arrays(h, c, like, kinds, table, bases, numbers, zero_grads, chunk):
    """Update arrays and their state with their gradients.

    h, c: the types of the hyperparameters. like: a number of the type that is computed with. kinds:
    formats of parameter, gradient and state. table: [array, column]. bases: the number of each array's
    first element, and that of all. numbers: [any number, fields of h and of c], float64. zero_grads:
    whether gradients become 0. chunk: elements a chunk, a multiple of BLOCK.

    Bytes moved: each of the parameter and the state read and written, the gradient read; for float32
    Adam 28 an element.
    """
    for k in prange((bases[-1] + chunk - 1) // chunk):
        last = min((k + 1) * chunk, bases[-1])
        update_chunk(h, c, like, kinds, table, bases, numbers, zero_grads, k * chunk, last)


@helper
def array_at(bases, position):
    """The last array that begins at ``position`` or before."""
    low, high = 0, bases.size - 1
    while high - low > 1:
        middle = (low + high) // 2
        if bases[middle] <= position:
            low = middle
        else:
            high = middle
    return low


@helper
def update_chunk(h, c, like, kinds, table, bases, numbers, zero_grads, first, last):
    """The blocks of arrays that begin between the elements ``first`` and ``last``."""
    buffers = new_buffers(kinds, like)
    run = run_length(kinds)
    begin_array = array_at(bases, first)
    known = table[begin_array, NUMBERS]
    own_h = unpack(h, numbers[known], like)
    own_c = unpack(c, numbers[known, len(h) :], like)
    for t in range(begin_array, table.shape[0]):
        base = bases[t]
        if base >= last:
            break
        row = table[t]
        if row[NUMBERS] != known:
            known = row[NUMBERS]
            own_h = unpack(h, numbers[known], like)
            own_c = unpack(c, numbers[known, len(h) :], like)
        begin = max(first - base + BLOCK - 1, 0) // BLOCK * BLOCK
        end = min((last - base + BLOCK - 1) // BLOCK * BLOCK, bases[t + 1] - base)
        places = row[PLACES:]
        for at in range(begin, end, run):
            size = min(run, end - at)
            update_run(own_h, own_c, like, kinds, places, at, size, row[KEY], row[POSITION] + at, buffers)
            if zero_grads:
                width = gradient_itemsize(kinds, like)
                view(row[GRADIENT] + at * width, size * width, np.uint8(0))[:] = 0
