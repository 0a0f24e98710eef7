"""Dense updates: every element of any number of arrays, in one pass and one launch.

The elements of all arrays are numbered from the first array's first to the last one's last, and a launch is
divided by these numbers: chunks are of about equal size, whatever the sizes of the arrays.
"""

import numpy as np

from fastopt.kernels.cpu.chunks import chunk_count, chunk_ends
from fastopt.kernels.cpu.for_each import for_each
from fastopt.kernels.cpu.jit import Kernel, helper
from fastopt.kernels.cpu.runs import (
    coded_slots,
    gradient_itemsize,
    new_array,
    parameter_itemsize,
    run_length,
    update_run,
)
from fastopt.kernels.element import unpack
from fastopt.kernels.formats import BLOCK
from fastopt.kernels.intrinsics import CACHE_LINE, view
from fastopt.kernels.layout import (
    ARRAY_GRADIENT,
    ARRAY_KEY,
    ARRAY_NUMBERS,
    ARRAY_PARAMETER,
    ARRAY_PLACES,
    ARRAY_POSITION,
)


@Kernel
def update_arrays(team, h, c, like, kinds, table, bases, numbers, zero_grads, chunk):
    """Update arrays and their state with their gradients.

    h, c: the types of the hyperparameters. like: a number of the type that is computed with. kinds:
    formats of parameter, gradient and state. table: [array, column of layout.py]. bases: the number of
    each array's first element, and that of all. numbers: [any number, fields of h and of c], float64.
    zero_grads: whether gradients become 0. chunk: elements a chunk, a multiple of BLOCK.

    Bytes moved: each of the parameter and the state read and written, the gradient read; for float32
    Adam 28 an element.
    """
    arguments = h, c, like, kinds, table, bases, numbers, zero_grads, chunk
    for_each(team, update_chunk, chunk_count(bases[-1], chunk), arguments)


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
def before_line(address, width):
    """Elements of an array at ``address`` before its first whole cache line. ``width``: bytes of an element,
    or 0 where it has to be gone through in blocks, which gives 0."""
    ahead = -address % CACHE_LINE
    return 0 if width == 0 or ahead % width else ahead // width


@helper
def update_chunk(k, h, c, like, kinds, table, bases, numbers, zero_grads, chunk):
    """The blocks of arrays that begin in chunk ``k``; those of long arrays begin with the next cache line, an
    array's first one excepted."""
    first, last = chunk_ends(k, chunk, bases[-1])
    buffers = new_array((coded_slots(kinds, like), BLOCK), like)
    run, width = run_length(kinds, like), parameter_itemsize(kinds, like)
    begin_array = array_at(bases, first)
    known = table[begin_array, ARRAY_NUMBERS]
    own_h = unpack(h, numbers[known], like)
    own_c = unpack(c, numbers[known, len(h) :], like)
    for t in range(begin_array, table.shape[0]):
        base = bases[t]
        if base >= last:
            break
        row = table[t]
        if row[ARRAY_NUMBERS] != known:
            known = row[ARRAY_NUMBERS]
            own_h = unpack(h, numbers[known], like)
            own_c = unpack(c, numbers[known, len(h) :], like)
        begin = max(first - base + BLOCK - 1, 0) // BLOCK * BLOCK
        end = chunk_count(last - base, BLOCK) * BLOCK
        numel = bases[t + 1] - base
        # Runs begin with cache lines of the parameter, but for its first: a vector that lies in two lines
        # takes two accesses. One run more would cost a short array more than that spares.
        before = before_line(row[ARRAY_PARAMETER], width) if numel > run else 0
        length = before if begin == 0 and before else run
        begin, end = begin + (before if begin else 0), min(end + before, numel)
        places = row[ARRAY_PLACES:]
        for run_end in range(begin + length, end + run, run):
            at = max(run_end - run, begin)
            size = min(run_end, end) - at
            key, position = row[ARRAY_KEY], row[ARRAY_POSITION] + at
            update_run(own_h, own_c, like, kinds, places, at, size, key, position, buffers)
            if zero_grads:
                bytes_each = gradient_itemsize(kinds, like)
                view(row[ARRAY_GRADIENT] + at * bytes_each, size * bytes_each, np.uint8(0))[:] = 0
