"""Segments of the indices of many tables, of which each thread sorts some by itself.

A table's indices have fewer digits than the rows of all tables, or each row a counter, and what a sort works
with stays in the caches of the core.
"""

import numpy as np

from fastopt.kernels.cpu.for_each import for_each
from fastopt.kernels.cpu.jit import Kernel, helper
from fastopt.kernels.intrinsics import view

POSITION_BITS = 32  # of a word; the others are the index's


@Kernel
def find_segments_apart(team, like, parts, words, counts, found, order, starts, rows):
    """What ``find_segments`` of index.py finds, of each part by itself.

    like: of the type of indices. parts: int64 [any number, 6]: of each its number, the address of its
    indices, where what is found of them begins in ``order``, how many there are, how many counters, and
    the bits of a digit, or 0 if each row has a counter. words: uint64 [turns, twice the most
    indices of a part], and counts: int32 [turns, twice the most counters], of turns that each sort one part
    after another. found: how many segments a part has. starts, rows: one more for each part.

    Bytes moved: the indices read, and what is found of them written; words stay in the cache.
    """
    for_each(team, sort_parts, words.shape[0], (like, parts, words, counts, found, order, starts, rows))


@helper
def sort_parts(turn, like, parts, words, counts, found, order, starts, rows):
    """Sort those parts that have this turn."""
    for place in range(turn, parts.shape[0], words.shape[0]):
        k, first, size = parts[place, 0], parts[place, 2], parts[place, 3]
        counters, digit_bits = parts[place, 4], parts[place, 5]
        indices, last = view(parts[place, 1], size, like), first + size
        own = order[first:last], starts[first + k : last + k + 1], rows[first + k : last + k + 1]
        if digit_bits:
            own_counts = counts[turn, :counters], counts[turn, counters : 2 * counters]
            own_words = words[turn, :size], words[turn, size : 2 * size]
            found[k] = sort_by_digits(indices, digit_bits, *own_words, *own_counts, *own)
        else:
            found[k] = sort_by_rows(indices, counts[turn, :counters], *own)


@helper
def sort_by_rows(indices, counts, order, starts, rows):
    """Segments of indices, by a counter for each row; returns how many there are."""
    counts[:] = 0
    for i in range(indices.size):
        counts[np.uint64(indices[i])] += np.int32(1)
    found, before = np.uint64(0), np.int32(0)
    for row in range(counts.size):
        count = counts[row]
        counts[row] = before
        rows[found] = row
        starts[found] = before
        before += count
        found += np.uint64(count > 0)
    starts[found] = before
    for i in range(indices.size):
        row = np.uint64(indices[i])
        place = counts[row]
        order[np.uint64(place)] = i
        counts[row] = place + np.int32(1)
    return np.int64(found)


@helper
def sort_by_digits(indices, digit_bits, words, sorted_words, low_counts, high_counts, order, starts, rows):
    """Segments of indices of two digits; returns how many there are."""
    bits, mask = np.uint64(digit_bits), np.uint64(low_counts.size - 1)
    low_counts[:] = 0
    high_counts[:] = 0
    for i in range(indices.size):
        row = np.uint64(indices[i])
        low_counts[row & mask] += np.int32(1)
        high_counts[row >> bits] += np.int32(1)
    counts_to_places(low_counts)
    counts_to_places(high_counts)
    for i in range(indices.size):
        row = np.uint64(indices[i])
        place = low_counts[row & mask]
        words[np.uint64(place)] = (row << np.uint64(POSITION_BITS)) | np.uint64(i)
        low_counts[row & mask] = place + np.int32(1)
    shift = np.uint64(POSITION_BITS) + bits
    for i in range(words.size):
        word = words[i]
        digit = word >> shift
        place = high_counts[digit]
        sorted_words[np.uint64(place)] = word
        high_counts[digit] = place + np.int32(1)
    found, former = np.uint64(0), ~np.uint64(0)
    for i in range(words.size):
        word = sorted_words[i]
        row = word >> np.uint64(POSITION_BITS)
        order[i] = np.int32(word & np.uint64((1 << POSITION_BITS) - 1))
        rows[found] = np.int64(row)
        starts[found] = i
        found += np.uint64(row != former)
        former = row
    starts[found] = words.size
    return np.int64(found)


@helper
def counts_to_places(counts):
    """From counts of digits to the place of the first of each."""
    before = np.int32(0)
    for digit in range(counts.size):
        count = counts[digit]
        counts[digit] = before
        before += count
