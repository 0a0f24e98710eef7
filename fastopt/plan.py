"""Indices checked, copied and sorted by row: what lookups and updates of a table start from."""

import operator
from typing import Any

import numpy as np

from fastopt import arrays
from fastopt.kernels.cpu.index import Segments, check_bounds, segments_of

MOST_ROWS = 2**40
SMALL = 4096  # indices; below, NumPy finds their bounds as fast as a kernel


class IndexPlan:
    """Indices of one table, sorted by row: made once, ahead if you like, used for lookup and update.

    Wherever ``indices`` are taken (:func:`fastopt.embedding`, :func:`fastopt.embedding_bag`,
    :class:`fastopt.IndexedSlices`, :class:`fastopt.BagGradient`) a plan serves in their place, and
    saves checking and sorting them again. It holds a copy of the indices, and can be pickled, so
    that a data loader's worker can build it.

    Args:
        indices: int32 or int64 array of any shape, each in [0, rows); NumPy or torch, CPU.
        rows: how many rows the table has, at most 2**40.

    Attributes:
        indices: the copy, of the shape given, read-only.
        rows: as given.
        distinct: int64 array of the different indices, ascending, read-only.
        counts: how often each of them occurs.

    Raises:
        ValueError: an index out of range, or too many indices for one sort (2**31, or more than
            64 bits hold together with the rows).
        TypeError: another dtype.

    They are sorted by a stable radix sort: positions of equal indices keep their order, so that sums
    over them are the same for any number of threads.
    """

    def __init__(self, indices: Any, rows: int) -> None:
        if isinstance(rows, bool) or not hasattr(rows, "__index__"):
            raise TypeError(f"rows is {rows!r}: expected a whole number")
        self.rows = operator.index(rows)
        if not 0 <= self.rows <= MOST_ROWS:
            raise ValueError(f"rows is {rows!r}: expected a whole number from 0 to 2**40")
        self._indices = np.array(checked_indices(indices, "indices", self.rows), order="C")
        [self._segments] = segments_of([(self._indices.reshape(-1), self.rows)])

    @property
    def indices(self) -> np.ndarray:
        return _read_only(self._indices)

    @property
    def distinct(self) -> np.ndarray:
        return _read_only(self._segments.rows)

    @property
    def counts(self) -> np.ndarray:
        return np.diff(self._segments.starts)

    def __repr__(self) -> str:
        sizes = f"{self.indices.size:,} indices, {self.distinct.size:,} distinct, of {self.rows:,} rows"
        return f"IndexPlan({sizes})"


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view that can't be written: a plan is not checked again."""
    view = array.view()
    view.flags.writeable = False
    return view


def checked_indices(indices: Any, label: str, rows: int | None) -> np.ndarray:
    """``indices`` as a NumPy array, every one in [0, rows)."""
    array = arrays.host_array(indices, label)
    if array.dtype not in (np.int32, np.int64):
        raise TypeError(
            f"{label} has dtype {array.dtype}: expected int32 or int64, pass {label}.astype(np.int64)"
        )
    if array.size:
        if array.size < SMALL or not array.flags.c_contiguous:
            low, high = int(array.min()), int(array.max())
        else:
            low, high = check_bounds(array.reshape(-1))
        if low < 0 or (rows is not None and high >= rows):
            bad = low if low < 0 else high
            limit = "not negative" if rows is None else f"in [0, {rows}), the rows of the table"
            raise ValueError(f"{label} holds {bad}: expected every index {limit}")
    return array


class Indices:
    """Checked indices of one table: a plan's, or an array's, whose segments are found when needed."""

    def __init__(self, given: Any, label: str, rows: int | None) -> None:
        self._segments: Segments | None = None
        if isinstance(given, IndexPlan):
            if rows is not None and given.rows != rows:
                raise ValueError(
                    f"{label} is a plan for a table of {given.rows} rows: expected one for {rows} rows"
                )
            self.array, self.rows, self._segments = given._indices, given.rows, given._segments
            return
        array = checked_indices(given, label, rows)
        self.array = np.asarray(array, order="C")
        self.rows = rows if rows is not None else int(array.max()) + 1 if array.size else 0

    @classmethod
    def of_all(cls, rows: int) -> "Indices":
        """Every row once, in order, which needs no sorting."""
        self = cls.__new__(cls)
        self.array, self.rows = np.arange(rows), rows
        self._segments = Segments(
            self.array, np.arange(rows, dtype=np.int32), np.arange(rows + 1, dtype=np.int32)
        )
        return self

    @classmethod
    def of_rows(cls, array: np.ndarray) -> "Indices":
        """Positions that need no check and have no segments."""
        self = cls.__new__(cls)
        self.array, self.rows, self._segments = array, array.size + 1, None
        return self

    @property
    def flat(self) -> np.ndarray:
        return self.array.reshape(-1)

    @property
    def segments(self) -> Segments:
        if self._segments is None:
            [self._segments] = segments_of([(self.flat, self.rows)])
        return self._segments


def find_segments_of(many: list[Indices]) -> None:
    """Find, in one sort, the segments of those that have none yet."""
    missing = [indices for indices in many if indices._segments is None]
    if missing:
        found = segments_of([(indices.flat, indices.rows) for indices in missing])
        for indices, segments in zip(missing, found, strict=True):
            indices._segments = segments
