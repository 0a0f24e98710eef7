"""Segments of indices on a device: a stable radix sort, whose result is that of
``fastopt.kernels.cpu.index``, since whole numbers alone decide.

Sorted are 64-bit words that hold a key above a position, eight bits of the key a pass. A block of threads
takes TILE words: the digits of each tile are counted; each digit's counts are added up over the tiles; and
each word is moved to its place, its rank among the equal digits of its warp being found by votes. Then the
words that begin a segment are counted and written down in the same way. How many segments there are stays on
the device, so that nothing waits.

A single tile is sorted by one launch, and more of them by three a pass.

Bytes moved: 16 an index to make the words, 24 a pass, 16 to find segments, and what these take.
"""

from typing import Any

import numpy as np
from numba import cuda
from numba.extending import register_jitable

from fastopt.kernels.cuda.integers import unchanged
from fastopt.kernels.cuda.launch import kernel
from fastopt.kernels.cuda.memory import (
    ALL_LANES,
    WARP,
    integer,
    lane_and_warp,
    last_at_most,
    load,
    load_if,
    meet,
    store,
)
from fastopt.kernels.cuda.sums import THREADS, WARPS

DIGIT_BITS = 8
DIGITS = 1 << DIGIT_BITS  # as many as a block has threads: each thread looks after one
STEPS = 16  # words of a thread
TILE = THREADS * STEPS
OF_WARP = WARP * STEPS
PLACES = WARPS * DIGITS  # sizes of shared arrays have to be names

WORD, NUMBER, COUNT = np.uint64(0), np.int64(0), np.int32(0)

# What is known of the tables, int64 [columns, tables]
(
    FIRST_POSITIONS,  # of each table's indices among those of all
    ADDRESSES,  # of the indices
    STRIDES,  # bytes from one index to the next
    ITEMSIZES,
    ROWS,
    FIRST_ROWS,  # what is added to a table's rows: one more for each table than it has rows
    COLUMNS,
) = range(7)


@register_jitable
def index_at(address, stride, itemsize, i):
    """Index ``i`` of an int32 or int64 array."""
    place = address + i * stride
    return load(place, NUMBER) if itemsize == 8 else np.int64(load(place, COUNT))


@register_jitable
def digit_of(word, shift):
    return np.uint32((word >> np.uint64(shift)) & np.uint64(DIGITS - 1))


@register_jitable
def lower_lanes(mask, lane):
    """How many of the lanes in ``mask`` are before this one."""
    before = np.uint32((np.uint64(1) << np.uint64(lane)) - np.uint64(1))
    return np.int64(cuda.popc(np.uint32(mask) & before))


@register_jitable
def block_before(x, shared):
    """The sums of an int32 over the threads of a block before this one, and over all of them. All threads
    have to come.

    shared: int32 [WARPS], from the kernel: what several functions that it calls allocate is linked twice.
    """
    lane, warp = lane_and_warp()
    own = np.int32(x)
    for distance in (1, 2, 4, 8, 16):
        other = cuda.shfl_up_sync(ALL_LANES, own, distance)
        if lane >= distance:
            own = np.int32(own + other)
    cuda.syncthreads()  # before it is written, each thread has read what it was for the last sum
    if lane == WARP - 1:
        shared[warp] = own
    cuda.syncthreads()
    before, total = np.int32(own - np.int32(x)), np.int32(0)
    for w in range(WARPS):
        if w == warp:
            before = np.int32(before + total)
        total = np.int32(total + shared[w])
    return before, total


@register_jitable
def word_of(tables, count, i, position_bits):
    """The key of position ``i`` above the position: the table's first row plus the index or, if that is
    outside the table, plus the number of its rows."""
    t, column = last_at_most(tables, count, i), count * 8
    own = tables + t * 8
    first, address = load(own + FIRST_POSITIONS * column, NUMBER), load(own + ADDRESSES * column, NUMBER)
    stride, itemsize = load(own + STRIDES * column, NUMBER), load(own + ITEMSIZES * column, NUMBER)
    row, rows = index_at(address, stride, itemsize, i - first), load(own + ROWS * column, NUMBER)
    if row < 0 or row >= rows:
        row = rows
    key = np.uint64(load(own + FIRST_ROWS * column, NUMBER) + row)
    return np.uint64((key << np.uint64(position_bits)) | np.uint64(i))


@kernel("iiiiiii", THREADS)
def make_words() -> Any:
    """``(tables, count, size, position_bits, words, tiles, counts)``: the word of each position, and what
    ``count_digits`` finds for the lowest digit of keys."""

    def make_words(tables, count, size, position_bits, words, tiles, counts):
        own = cuda.shared.array(DIGITS, np.int32)
        thread, tile = np.int64(cuda.threadIdx.x), np.int64(cuda.blockIdx.x)
        while tile < tiles:
            own[thread] = 0
            cuda.syncthreads()
            i, last = tile * TILE + thread, min((tile + 1) * TILE, size)
            while i < last:
                word = word_of(tables, count, i, position_bits)
                store(words + i * 8, word)
                cuda.atomic.add(own, digit_of(word, position_bits), 1)
                i += THREADS
            cuda.syncthreads()
            store(counts + (thread * tiles + tile) * 4, own[thread])
            tile += np.int64(cuda.gridDim.x)

    return make_words


@kernel("iiiii", THREADS)
def count_digits() -> Any:
    """``(words, size, shift, tiles, counts)``: counts, int32 [digit, tile], of the digits above ``shift``."""

    def count_digits(words, size, shift, tiles, counts):
        own = cuda.shared.array(DIGITS, np.int32)
        thread, tile = np.int64(cuda.threadIdx.x), np.int64(cuda.blockIdx.x)
        while tile < tiles:
            own[thread] = 0
            cuda.syncthreads()
            i, last = tile * TILE + thread, min((tile + 1) * TILE, size)
            while i < last:
                cuda.atomic.add(own, digit_of(load(words + i * 8, WORD), shift), 1)
                i += THREADS
            cuda.syncthreads()
            store(counts + (thread * tiles + tile) * 4, own[thread])
            tile += np.int64(cuda.gridDim.x)

    return count_digits


@kernel("iiii", THREADS)
def add_up() -> Any:
    """``(counts, rows, length, totals)``: set each number of int32 [rows, length] to the sum of those before
    it in its row, and ``totals`` to the sums of the rows."""

    def add_up(counts, rows, length, totals):
        shared = cuda.shared.array(WARPS, np.int32)
        thread, row = np.int64(cuda.threadIdx.x), np.int64(cuda.blockIdx.x)
        while row < rows:
            done, first = np.int32(0), np.int64(0)
            while first < length:
                place = counts + (row * length + first + thread) * 4
                inside = first + thread < length
                before, total = block_before(load_if(inside, place, COUNT), shared)
                if inside:
                    store(place, np.int32(done + before))
                done = np.int32(done + total)
                first += THREADS
            if thread == 0:
                store(totals + row * 4, done)
            row += np.int64(cuda.gridDim.x)

    return add_up


@register_jitable
def equal_lanes(digit, i, last):
    """The lanes that have the digit of this one, of those whose ``i`` is before ``last``. All lanes have to
    come."""
    equal = np.uint32(cuda.ballot_sync(ALL_LANES, i < last))
    for bit in range(DIGIT_BITS):
        has = digit & np.uint32(1 << bit) != 0
        votes = np.uint32(cuda.ballot_sync(ALL_LANES, has))
        equal = np.uint32(equal & (votes if has else ~votes))
    return equal


@register_jitable
def move_tile(words, tile, size, shift, place, alone, out, places, shared):
    """Move the words of a tile to their places by the digit above ``shift``. ``place``: where the first with
    this thread's digit goes, found here for a tile that is ``alone``.

    Each warp moves OF_WARP words that lie together, so that words of a digit keep their order.

    places: int32 [warp, digit], shared. shared: for block_before.
    """
    thread = np.int64(cuda.threadIdx.x)
    lane, warp = lane_and_warp()
    own, first = np.uint64(warp * DIGITS), tile * TILE + warp * OF_WARP  # a place is never negative
    last = min(first + OF_WARP, size)
    for w in range(WARPS):
        places[w * DIGITS + thread] = 0
    cuda.syncthreads()
    i = first + lane
    while i < last:
        cuda.atomic.add(places, own + np.uint64(digit_of(load(words + i * 8, WORD), shift)), 1)
        i += WARP
    cuda.syncthreads()
    place = np.int32(place)
    if alone:
        found = np.int32(0)
        for w in range(WARPS):
            found = np.int32(found + places[w * DIGITS + thread])
        place, _ = block_before(found, shared)
    for w in range(WARPS):
        found = places[w * DIGITS + thread]
        places[w * DIGITS + thread] = place
        place = np.int32(place + found)
    cuda.syncthreads()
    i = first + lane
    word = load_if(i < last, words + i * 8, WORD)
    while first < last:
        following = i + WARP
        ahead = load_if(following < last, words + following * 8, WORD)
        digit = digit_of(word, shift)
        equal = equal_lanes(digit, i, last)
        rank, at = lower_lanes(equal, lane), own + np.uint64(digit)
        if i < last:
            store(out + (np.int64(places[at]) + rank) * 8, word)
        meet()
        if i < last and rank == 0:
            places[at] += np.int32(cuda.popc(equal))
        meet()
        word, i, first = ahead, following, first + WARP
    cuda.syncthreads()


@kernel("iiiiiii", THREADS)
def move_words() -> Any:
    """``(words, size, shift, tiles, before, totals, out)``: move each word to its place by the digit above
    ``shift``. before: int32 [digit, tile], how often the digit occurs in earlier tiles. totals: int32
    [digit]."""

    def move_words(words, size, shift, tiles, before, totals, out):
        places = cuda.shared.array(PLACES, np.int32)
        shared = cuda.shared.array(WARPS, np.int32)
        thread, tile = np.int64(cuda.threadIdx.x), np.int64(cuda.blockIdx.x)
        smaller, _ = block_before(load(totals + thread * 4, COUNT), shared)
        while tile < tiles:
            place = np.int32(smaller + load(before + (thread * tiles + tile) * 4, COUNT))
            move_tile(words, tile, size, shift, place, False, out, places, shared)
            tile += np.int64(cuda.gridDim.x)

    return move_words


@register_jitable
def is_head(words, i, position_bits):
    """Whether a segment begins with sorted position ``i``."""
    if i == 0:
        return True
    bits = np.uint64(position_bits)
    return load(words + i * 8, WORD) >> bits != load(words + (i - 1) * 8, WORD) >> bits


@kernel("iiiii", THREADS)
def count_heads() -> Any:
    """``(words, size, position_bits, tiles, counts)``: how many segments begin in each tile, int32."""

    def count_heads(words, size, position_bits, tiles, counts):
        shared = cuda.shared.array(WARPS, np.int32)
        thread, tile = np.int64(cuda.threadIdx.x), np.int64(cuda.blockIdx.x)
        while tile < tiles:
            i, last = tile * TILE + thread, min((tile + 1) * TILE, size)
            found = np.int32(0)
            while i < last:
                found = np.int32(found + is_head(words, i, position_bits))
                i += THREADS
            _, total = block_before(found, shared)
            if thread == 0:
                store(counts + tile * 4, total)
            tile += np.int64(cuda.gridDim.x)

    return count_heads


@register_jitable
def write_tile(words, tile, size, position_bits, done, order, starts, rows, shared):
    """Split the sorted words of a tile into the positions, and the starts and rows of segments, ``done`` of
    which begin in earlier tiles; returns how many do with these."""
    thread, bits = np.int64(cuda.threadIdx.x), np.uint64(position_bits)
    mask = (np.uint64(1) << bits) - np.uint64(1)
    first, last = tile * TILE, min((tile + 1) * TILE, size)
    while first < last:
        i = first + thread
        head = i < last and is_head(words, i, position_bits)
        earlier, total = block_before(np.int32(head), shared)
        if i < last:
            word = load(words + i * 8, WORD)
            store(order + i * 4, np.int32(word & mask))
            if head:
                at = done + np.int64(earlier)
                store(starts + at * 4, np.int32(i))
                store(rows + at * 8, np.int64(word >> bits))
        done += np.int64(total)
        first += THREADS
    return done


@register_jitable
def write_bounds(t, step, tables, count, size, distinct, starts, bounds):
    """Write where in the segments those of table ``t``, and of each ``step`` further on, begin, and the end
    of the last segment. bounds: int64 [count + 1]."""
    while t <= count:
        low, high = np.int64(0), distinct
        if t == count:
            low = distinct
            store(starts + distinct * 4, np.int32(size))
        else:
            position = integer(tables, FIRST_POSITIONS * count + t)
            while low < high:
                middle = (low + high) >> 1
                if np.int64(load(starts + middle * 4, COUNT)) < position:
                    low = middle + 1
                else:
                    high = middle
        store(bounds + t * 8, low)
        t += unchanged(step)


@kernel("iiiiiiii", THREADS)
def write_heads() -> Any:
    """``(words, size, position_bits, tiles, before, order, starts, rows)``: split sorted words into the
    positions, and the starts and rows of segments. before: int32 [tile], how many begin in earlier tiles."""

    def write_heads(words, size, position_bits, tiles, before, order, starts, rows):
        shared = cuda.shared.array(WARPS, np.int32)
        tile = np.int64(cuda.blockIdx.x)
        while tile < tiles:
            done = np.int64(load(before + tile * 4, COUNT))
            write_tile(words, tile, size, position_bits, done, order, starts, rows, shared)
            tile += np.int64(cuda.gridDim.x)

    return write_heads


@kernel("iiiiii", THREADS)
def find_tables() -> Any:
    """``(tables, count, size, distinct, starts, bounds)``: where in the segments those of each table begin,
    and the end of the last segment. distinct: the address of how many there are, int32."""

    def find_tables(tables, count, size, distinct, starts, bounds):
        t = np.int64(cuda.blockIdx.x) * THREADS + np.int64(cuda.threadIdx.x)
        found, step = np.int64(load(distinct, COUNT)), np.int64(cuda.gridDim.x) * THREADS
        write_bounds(t, step, tables, count, size, found, starts, bounds)

    return find_tables


@kernel("iiiiiiiiiii", THREADS)
def sort_tile() -> Any:
    """``(tables, count, size, position_bits, key_bits, words, others, order, starts, rows, bounds)``: all of
    the above for positions that fit a tile, by one block."""

    def sort_tile(tables, count, size, position_bits, key_bits, words, others, order, starts, rows, bounds):
        places = cuda.shared.array(PLACES, np.int32)
        shared = cuda.shared.array(WARPS, np.int32)
        thread, shift = np.int64(cuda.threadIdx.x), position_bits
        i = thread
        while i < size:
            store(words + i * 8, word_of(tables, count, i, position_bits))
            i += THREADS
        cuda.syncthreads()
        while shift < position_bits + key_bits:
            move_tile(words, 0, size, shift, 0, True, others, places, shared)
            words, others = others, words
            shift += DIGIT_BITS
        distinct = write_tile(words, 0, size, position_bits, np.int64(0), order, starts, rows, shared)
        cuda.syncthreads()
        write_bounds(thread, THREADS, tables, count, size, distinct, starts, bounds)

    return sort_tile
