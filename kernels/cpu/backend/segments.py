"""The segments that the indices of tables are sorted into: of all tables at once, or of each apart."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from fastopt.kernels.cpu.backend.addresses import address
from fastopt.kernels.cpu.index import segments_together
from fastopt.kernels.cpu.memory import empty
from fastopt.kernels.cpu.sort_apart import find_segments_apart
from fastopt.kernels.cpu.threads import runs_serial, thread_count
from fastopt.kernels.work import Segments

MOST_DIGIT_BITS = 12  # whose counters fit the first-level cache
MOST_COUNTERS = 1 << 17  # these fit the second
COUNTERS_PER_INDEX = 4  # at most, where each row has one, which costs less than a pass over the indices
WORK_PER_INDEX = 4  # in elements of an update by one thread


def segments_of(parts: Sequence[tuple[np.ndarray, int]]) -> list[Segments]:
    """The segments of the indices of each part, (1-D indices, rows of its table), each in [0, rows)."""
    work = WORK_PER_INDEX * sum(indices.size for indices, _ in parts)
    turns = 1 if runs_serial(work) else min(thread_count(), len(parts))
    return _segments_apart(parts, work, turns) if _suit_apart(parts, turns) else segments_together(parts)


def _suit_apart(parts: Sequence[tuple[np.ndarray, int]], turns: int) -> bool:
    """Whether to sort the indices of each part apart: no part is more than its share of so many turns, and
    two digits are enough."""
    sizes = [indices.size for indices, _ in parts]
    return (
        len(parts) > 1
        and max(sizes) * turns <= sum(sizes) < 2**31
        and len({indices.dtype for indices, _ in parts}) == 1
        and max(rows for _, rows in parts) <= 1 << (2 * MOST_DIGIT_BITS)
    )


def _segments_apart(parts: Sequence[tuple[np.ndarray, int]], work: int, turns: int) -> list[Segments]:
    sizes = [indices.size for indices, _ in parts]
    firsts = [*accumulate(sizes, initial=0)]
    table = np.empty((len(parts), 6), np.int64)
    for k, (indices, rows) in enumerate(parts):
        digit_bits = -(-max(rows - 1, 1).bit_length() // 2)
        counters = 1 << digit_bits
        if rows <= min(MOST_COUNTERS, COUNTERS_PER_INDEX * sizes[k]):
            digit_bits, counters = 0, rows
        table[k] = k, address(indices), firsts[k], sizes[k], counters, digit_bits
    size = firsts[-1]
    words = empty((turns, 2 * max(sizes)), np.uint64)
    counts = empty((turns, 2 * int(table[:, 4].max())), np.int32)
    order, starts = empty(size, np.int32), empty(size + len(parts), np.int32)
    rows_of, found = empty(size + len(parts), np.int64), np.empty(len(parts), np.int64)
    by_cost = table[np.argsort(-table[:, 3], kind="stable")]
    like = parts[0][0].dtype.type(0)
    find_segments_apart(work, like, by_cost, words, counts, found, order, starts, rows_of)
    segments = []
    for k, (first, distinct) in enumerate(zip(firsts, found.tolist(), strict=False)):
        own = slice(first + k, first + k + distinct)
        order_of = order[first : first + sizes[k]]
        segments.append(Segments(rows_of[own], order_of, starts[own.start : own.stop + 1]))
    return segments
