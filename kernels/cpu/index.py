"""Segments of indices: which positions belong to each distinct row, in order.

A key is an index plus the number of rows of all tables before its own, so that one sort finds the
segments of any number of tables. Sorted are 64-bit words that hold a key above a position;
which block of the words a thread works on does not show in the result, since the sort is stable.
"""

from collections.abc import Sequence

import numpy as np

from fastopt.kernels.cpu.chunks import chunk_ends
from fastopt.kernels.cpu.for_each import for_each
from fastopt.kernels.cpu.jit import Kernel, helper
from fastopt.kernels.cpu.memory import empty
from fastopt.kernels.cpu.threads import thread_count
from fastopt.kernels.intrinsics import view
from fastopt.kernels.work import Segments

DIGIT_BITS = 11  # 2,048 counters fit the first-level cache
INDICES_PER_BLOCK = 32_768  # that a thread counts and moves at a time


@helper
def bounds_of(indices, first, last):
    """Smallest and largest of ``indices[first:last]``."""
    own = indices[first:last]
    low = np.int64(own[0])
    high = low
    for i in range(own.size):  # from 0, so that no index may count from the end: then it is a loop of vectors
        x = np.int64(own[i])
        low = x if x < low else low
        high = x if x > high else high
    return low, high


@helper
def bounds_of_block(block, indices, found):
    first, last = chunk_ends(block, INDICES_PER_BLOCK, indices.size)
    found[block, 0], found[block, 1] = bounds_of(indices, first, last)


@Kernel
def find_bounds(team, indices, found):
    """``found[block]``: smallest and largest of each block of the 1-D ``indices``."""
    for_each(team, bounds_of_block, found.shape[0], (indices, found))


@Kernel
def copy_indices(team, like, parts, blocks, out, found):
    """Copy 1-D indices, of the type of ``like``, one part after the other to ``out``; ``found[block]``:
    smallest and largest of each block.

    parts: int64 [any number, 3]: of each its address, how many indices it has, and their place in ``out``.
    blocks: int64 [any number, 2], a part, and a number among its blocks.

    Bytes moved: each index read and written once.
    """
    for_each(team, copy_block, blocks.shape[0], (like, parts, blocks, out, found))


@helper
def copy_block(k, like, parts, blocks, out, found):
    """Copy a block of a part, and find the smallest and the largest of it, which are not none."""
    part, block = parts[blocks[k, 0]], blocks[k, 1]
    indices = view(part[0], part[1], like)
    first, last = chunk_ends(block, INDICES_PER_BLOCK, part[1])
    out[part[2] + first : part[2] + last] = indices[first:last]
    found[k, 0], found[k, 1] = bounds_of(indices, first, last)


@helper
def block_of(words, block, blocks):
    """Where a block of the words begins and ends."""
    return block * words.size // blocks, (block + 1) * words.size // blocks


@helper
def count_block(block, is_first, indices, position_bits, words, shift, counts):
    """How often each digit occurs in a block. Before the first is counted, each word becomes an index above
    its position."""
    first, last = block_of(words, block, counts.shape[0])
    mask, own, own_words = np.uint64(counts.shape[1] - 1), counts[block], words[first:last]
    own[:] = 0
    if is_first:
        bits, own_indices = np.uint64(position_bits), indices[first:last]
        for i in range(own_indices.size):
            index = np.uint64(own_indices[i])
            own_words[i] = (index << bits) | np.uint64(first + i)
            own[index & mask] += np.uint32(1)
    else:
        for i in range(own_words.size):
            own[(own_words[i] >> shift) & mask] += np.uint32(1)


@helper
def move_words(block, words, scratch, shift, all_places):
    """Move each word to the place of its digit, and the place on by one."""
    first, last = block_of(words, block, all_places.shape[0])
    mask, places = np.uint64(all_places.shape[1] - 1), all_places[block]
    for i in range(first, last):
        word = words[np.uint64(i)]
        digit = (word >> shift) & mask
        place = places[digit]
        scratch[np.uint64(place)] = word
        places[digit] = place + np.uint32(1)


@helper
def counts_to_places(counts):
    """From counts of [block, digit] to the place of the first of each."""
    before = np.uint32(0)
    for digit in range(counts.shape[1]):
        for block in range(counts.shape[0]):
            count = counts[block, digit]
            counts[block, digit] = before
            before += count


@helper
def mark_heads(block, words, position_bits, order, heads, all_found):
    """Split words into positions, and list where a new key starts; ``all_found[block + 1]``: how many do."""
    first, last = block_of(words, block, all_found.size - 1)
    bits = np.uint64(position_bits)
    mask = (np.uint64(1) << bits) - np.uint64(1)
    own, own_order, own_heads = words[first:last], order[first:last], heads[first:last]
    key = ~np.uint64(0)
    if first:
        key = words[first - 1] >> bits
    found = np.uint64(0)
    for i in range(own.size):
        word = own[i]
        own_order[i] = np.int32(word & mask)
        own_heads[found] = np.uint64(first + i)
        found += np.uint64((word >> bits) != key)
        key = word >> bits
    all_found[block + 1] = found


@helper
def unpack_heads(block, words, heads, all_found, position_bits, starts, rows):
    """Write down the starts and keys of a block's segments, ``all_found[block]`` of which are in earlier
    blocks."""
    first, _ = block_of(words, block, all_found.size - 1)
    before, until = all_found[block], all_found[block + 1]
    own_starts, own_rows, own_heads = starts[before:until], rows[before:until], heads[first:]
    bits = np.uint64(position_bits)
    for k in range(own_rows.size):
        head = own_heads[k]
        own_starts[k] = np.int32(head)
        own_rows[k] = np.int64(words[head] >> bits)


@Kernel
def find_segments(team, indices, position_bits, words, scratch, counts, passes, found, order, starts, rows):
    """Sort the positions of ``indices`` by them, least significant digit first, and find where each distinct
    one starts; ``found[-1]`` is how many there are.

    words, scratch: uint64, as large as indices; counts: [blocks, digits].

    Bytes moved: 8 an index for each pass over the words, three for each digit.
    """
    blocks = counts.shape[0]
    digit_bits = 0
    while (1 << digit_bits) < counts.shape[1]:
        digit_bits += 1
    for digit in range(passes):
        shift = np.uint64(position_bits + digit * digit_bits)
        for_each(team, count_block, blocks, (digit == 0, indices, position_bits, words, shift, counts))
        counts_to_places(counts)
        for_each(team, move_words, blocks, (words, scratch, shift, counts))
        words, scratch = scratch, words
    for_each(team, mark_heads, blocks, (words, position_bits, order, scratch, found))
    for block in range(blocks):
        found[block + 1] += found[block]
    for_each(team, unpack_heads, blocks, (words, scratch, found, position_bits, starts, rows))
    starts[found[blocks]] = indices.size


def check_bounds(indices: np.ndarray) -> tuple[int, int]:
    """Smallest and largest of the 1-D ``indices``, which are not empty."""
    found = np.empty((-(-indices.size // INDICES_PER_BLOCK), 2), np.int64)
    find_bounds(indices.size, indices, found)
    return int(found[:, 0].min()), int(found[:, 1].max())


def segments_together(parts: Sequence[tuple[np.ndarray, int]]) -> list[Segments]:
    """The segments of the indices of each part, (1-D indices, rows of its table), each in [0, rows)."""
    size = sum(indices.size for indices, _ in parts)
    all_rows = sum(rows for _, rows in parts)
    key_bits = max(all_rows - 1, 1).bit_length()
    position_bits = max(size - 1, 1).bit_length()
    if key_bits + position_bits > 64 or size >= 2**31:
        raise ValueError(
            f"{size} indices of tables of {all_rows} rows are too many at once: "
            "expected them to take 64 bits together, split the batch"
        )
    words, scratch = empty(size, np.uint64), empty(size, np.uint64)
    passes = -(-key_bits // DIGIT_BITS)
    blocks = max(1, min(-(-size // INDICES_PER_BLOCK), 4 * thread_count()))
    counts = np.empty((blocks, 1 << -(-key_bits // passes)), np.uint32)
    order, starts, rows_of = empty(size, np.int32), empty(size + 1, np.int32), empty(size, np.int64)
    found = np.zeros(blocks + 1, np.int64)
    keys = parts[0][0] if len(parts) == 1 else _keys(parts, size)
    find_segments(size, keys, position_bits, words, scratch, counts, passes, found, order, starts, rows_of)
    distinct = int(found[-1])
    segments = Segments(rows_of[:distinct], order, starts[: distinct + 1])
    return [segments] if len(parts) == 1 else _split(parts, segments)


def _keys(parts: Sequence[tuple[np.ndarray, int]], size: int) -> np.ndarray:
    keys = empty(size, np.int64)
    first, first_row = 0, 0
    for indices, rows in parts:
        np.add(indices, first_row, out=keys[first : first + indices.size], dtype=np.int64)
        first += indices.size
        first_row += rows
    return keys


def _split(parts: Sequence[tuple[np.ndarray, int]], segments: Segments) -> list[Segments]:
    """The segments of each part."""
    first_rows = np.cumsum([0, *(rows for _, rows in parts)])
    firsts = np.searchsorted(segments.rows, first_rows)
    split = []
    first_position = 0
    for k, (indices, _) in enumerate(parts):
        first, last = int(firsts[k]), int(firsts[k + 1])
        split.append(
            Segments(
                segments.rows[first:last],
                segments.order,
                segments.starts[first : last + 1],
                int(first_rows[k]),
                first_position,
            )
        )
        first_position += indices.size
    return split
