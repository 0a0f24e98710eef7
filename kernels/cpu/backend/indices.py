"""Indices, the segments they are sorted into, and offsets of bags."""

from collections.abc import Sequence
from itertools import accumulate, islice
from typing import Any

import numpy as np

from fastopt.kernels.cpu.backend.addresses import address
from fastopt.kernels.cpu.index import INDICES_PER_BLOCK, check_bounds, copy_indices
from fastopt.kernels.cpu.memory import empty
from fastopt.kernels.cpu.offsets import OFFSETS_PER_BLOCK, copy_offsets
from fastopt.kernels.work import Segments

SMALL = 4096  # indices; below, NumPy finds their bounds as fast as a kernel


def bounds(indices: np.ndarray) -> tuple[int, int]:
    """Smallest and largest of 1-D indices, which are not empty."""
    if indices.size < SMALL:
        return int(indices.min()), int(indices.max())
    return check_bounds(indices)


def copies(parts: Sequence[np.ndarray]) -> list[tuple[np.ndarray, int, int]]:
    """C-contiguous copies of indices of any shapes, none of which is empty, each with its smallest and
    largest."""
    found: list[Any] = [None] * len(parts)
    for dtype in {part.dtype for part in parts}:
        own = [k for k, part in enumerate(parts) if part.dtype == dtype]
        given = [np.ascontiguousarray(parts[k]) for k in own]
        lasts = list(accumulate(part.size for part in given))
        out = empty(lasts[-1], dtype)
        firsts = [0, *lasts[:-1]]
        table = [(address(part), part.size, first) for part, first in zip(given, firsts, strict=True)]
        counts = [-(-part.size // INDICES_PER_BLOCK) for part in given]
        blocks = np.array([(k, block) for k, count in enumerate(counts) for block in range(count)], np.int64)
        bounds_of = np.empty((len(blocks), 2), np.int64)
        copy_indices(lasts[-1], dtype.type(0), np.array(table, np.int64), blocks, out, bounds_of)
        of_blocks = iter(bounds_of.tolist())
        for k, first, last, count in zip(own, firsts, lasts, counts, strict=True):
            lows, highs = zip(*islice(of_blocks, count), strict=True)
            found[k] = out[first:last].reshape(parts[k].shape), min(lows), max(highs)
    return found


def all_rows(rows: int) -> tuple[np.ndarray, Segments]:
    """The indices that name every row once, in order, which need no sorting, and their segments."""
    indices, starts = np.arange(rows), np.arange(rows + 1, dtype=np.int32)
    return indices, Segments(indices, starts[:-1], starts)


def distinct_rows(segments: Segments) -> np.ndarray:
    """The different rows, ascending, as their table counts them."""
    return segments.rows - segments.first_row if segments.first_row else segments.rows


def counts(segments: Segments) -> np.ndarray:
    """How many indices there are of each of the different rows."""
    return np.diff(segments.starts)


def bag_offsets(
    offsets: np.ndarray, size: int, with_last: bool, check: bool = True
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """int64 [bags + 1]: a copy of ``offsets``, followed by ``size`` unless they come ``with_last``. They are
    looked at in any case: the first and the last, and the position of the first that is larger than the next,
    or -1."""
    given = np.ascontiguousarray(offsets)
    own, found = empty(given.size + (not with_last), np.int64), np.empty(3, np.int64)
    falls = np.empty(-(-given.size // OFFSETS_PER_BLOCK), np.int64)
    copy_offsets(given.size, given.dtype.type(0), address(given), given.size, size, own, falls, found)
    first, last, falls_at = found.tolist()
    return own, (first, last, falls_at)


def regular_offsets(bags: int, width: int) -> np.ndarray:
    """int64 [bags + 1]: the offsets of bags of ``width`` indices each."""
    offsets = np.arange(bags + 1, dtype=np.int64)
    offsets *= width
    return offsets
