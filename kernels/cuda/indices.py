"""What is found of indices and offsets on a device, and those that are made there."""

from typing import Any

import numpy as np
from numba import cuda
from numba.extending import register_jitable

from fastopt.kernels.cuda.integers import unchanged
from fastopt.kernels.cuda.launch import kernel
from fastopt.kernels.cuda.memory import WARP, integer, load, store
from fastopt.kernels.cuda.sort import index_at
from fastopt.kernels.cuda.sums import THREADS

MOST_BLOCKS = 2048  # of a launch, then each goes on with elements further on
MOST_PARTS = 256  # of those that the host puts together
LARGEST = np.iinfo(np.int64).max


def blocks_for(size: int, most: int = MOST_BLOCKS) -> int:
    """How many blocks share out elements."""
    return max(1, min(-(-size // THREADS), most))


@register_jitable
def place_of():
    """The first element of this thread, and how far on the next one is."""
    first = np.int64(cuda.blockIdx.x) * THREADS + np.int64(cuda.threadIdx.x)
    return first, np.int64(cuda.gridDim.x) * THREADS


@register_jitable
def block_min(x):
    """The smallest int64 of a block, in each of its threads. All of them have to come."""
    shared = cuda.shared.array(THREADS, np.int64)
    thread = np.int64(cuda.threadIdx.x)
    cuda.syncthreads()  # before it is written, each thread has read what it was for the last
    shared[thread] = x
    cuda.syncthreads()
    distance = THREADS >> 1
    while distance:
        if thread < distance:
            shared[thread] = min(shared[thread], shared[thread + distance])
        cuda.syncthreads()
        distance >>= 1
    return shared[0]


@kernel("iiiii", THREADS)
def find_bounds() -> Any:
    """``(indices, stride, itemsize, size, found)``: the smallest index of each block's, and the largest with
    its bits turned, which makes it the smallest; int64 [block, 2]."""

    def find_bounds(indices, stride, itemsize, size, found):
        i, step = place_of()
        low = high = np.int64(LARGEST)
        while i < size:
            x = index_at(indices, stride, itemsize, i)
            low, high = min(low, x), min(high, ~x)
            i += unchanged(step)
        low, high = block_min(low), block_min(high)
        if np.int64(cuda.threadIdx.x) == 0:
            own = found + np.int64(cuda.blockIdx.x) * 16
            store(own, low)
            store(own + 8, high)

    return find_bounds


@kernel("iii", THREADS)
def check_offsets() -> Any:
    """``(offsets, size, found)``: the first and the last of int64 offsets, and the position of each block's
    first that is larger than the next, or LARGEST; int64 [2 + blocks]."""

    def check_offsets(offsets, size, found):
        i, step = place_of()
        if i == 0:
            store(found, integer(offsets, 0))
            store(found + 8, integer(offsets, size - 1))
        falls_at = np.int64(LARGEST)
        while i + 1 < size:
            if integer(offsets, i) > integer(offsets, i + 1):
                falls_at = min(falls_at, i)
            i += unchanged(step)
        falls_at = block_min(falls_at)
        if np.int64(cuda.threadIdx.x) == 0:
            store(found + (2 + np.int64(cuda.blockIdx.x)) * 8, falls_at)

    return check_offsets


@kernel("iiiiiii", THREADS)
def copy_offsets() -> Any:
    """``(offsets, stride, itemsize, given, size, count, out)``: ``count`` int64 offsets, those that are
    ``given`` and then ``size``."""

    def copy_offsets(offsets, stride, itemsize, given, size, count, out):
        i, step = place_of()
        while i < count:
            store(out + i * 8, index_at(offsets, stride, itemsize, i) if i < given else size)
            i += unchanged(step)

    return copy_offsets


@kernel("iii", THREADS)
def make_multiples() -> Any:
    """``(width, count, out)``: int64 multiples of ``width``, from 0 on."""

    def make_multiples(width, count, out):
        i, step = place_of()
        while i < count:
            store(out + i * 8, i * width)
            i += unchanged(step)

    return make_multiples


@kernel("iiiii", THREADS)
def name_all() -> Any:
    """``(rows, row, order, starts, bounds)``: segments of all rows, each with one position; ``row`` is the
    address of the rows."""

    def name_all(rows, row, order, starts, bounds):
        i, step = place_of()
        while i <= rows:
            if i < rows:
                store(row + i * 8, i)
                store(order + i * 4, np.int32(i))
            else:
                store(bounds, np.int64(0))
                store(bounds + 8, rows)
            store(starts + i * 4, np.int32(i))
            i += unchanged(step)

    return name_all


@kernel("iiiii", WARP)
def find_named() -> Any:
    """``(bounds, table, rows, past, found)``: the first segment of a table and the end of those that have a
    row of it; ``past`` is the key of indices outside."""

    def find_named(bounds, table, rows, past, found):
        if np.int64(cuda.threadIdx.x) == 0:
            first, last = integer(bounds, table), integer(bounds, table + 1)
            if last > first and integer(rows, last - 1) == past:
                last -= 1
            store(found, first)
            store(found + 8, last)

    return find_named


@kernel("iiii", THREADS)
def subtract_number() -> Any:
    """``(rows, first_row, count, out)``: int64 rows, less ``first_row``."""

    def subtract_number(rows, first_row, count, out):
        i, step = place_of()
        while i < count:
            store(out + i * 8, integer(rows, i) - first_row)
            i += unchanged(step)

    return subtract_number


@kernel("iii", THREADS)
def subtract_neighbours() -> Any:
    """``(starts, count, out)``: how far each of ``count`` int32 starts is from the next."""
    zero = np.int32(0)

    def subtract_neighbours(starts, count, out):
        i, step = place_of()
        while i < count:
            start, end = load(starts + i * 4, zero), load(starts + (i + 1) * 4, zero)
            store(out + i * 4, np.int32(end - start))
            i += unchanged(step)

    return subtract_neighbours
