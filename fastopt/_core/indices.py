"""Indices checked, copied and sorted into segments by row: what lookups and updates of a table start from."""

import operator
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from fastopt._core import arrays
from fastopt._core.backend import Backend, backend_of
from fastopt._core.collate import let_torch_collate
from fastopt._core.options import is_flag
from fastopt.kernels.work import Array, Segments

MOST_ROWS = 2**40


class IndexPlan:
    """Indices of one table, sorted by row: made once, ahead if you like, used for lookup and update.

    Wherever ``indices`` are taken (:func:`fastopt.embedding`, :func:`fastopt.embedding_bag`,
    :class:`fastopt.IndexedSlices`, :class:`fastopt.BagGradient`) a plan serves in their place, and
    saves checking and sorting them again. It holds a copy of the indices, and can be pickled, so
    that a data loader's worker can build it. torch's ``default_collate`` takes plans: that of one item stays
    as it is, those of several, for one table, become the plan of their indices, one after the other.

    Args:
        indices: int32 or int64 array of any shape, each in [0, rows); of NumPy, torch or a CUDA device.
        rows: how many rows the table has, at most 2**40.
        check_indices: False leaves out the check of indices on a CUDA device, for which the host waits:
            those out of range are then left out of updates, and lookups of them give zeros. On the CPU they
            are checked all the same.

    Attributes:
        indices: the copy, of the shape given, read-only, where the indices given lie.
        rows: as given.
        distinct: int64 array of the different indices, ascending, read-only.
        counts: how often each of them occurs.

    Raises:
        ValueError: an index out of range, or too many indices for one sort (2**31, or more than
            64 bits hold together with the rows).
        TypeError: another dtype.

    The sort is a stable radix sort: positions of equal indices keep their order, so that sums
    over them are the same for any number of threads.
    """

    def __init__(self, indices: Any, rows: int, *, check_indices: bool = True) -> None:
        if isinstance(rows, bool) or not hasattr(rows, "__index__"):
            raise TypeError(f"rows is {rows!r}: expected a whole number")
        self.rows = operator.index(rows)
        if not 0 <= self.rows <= MOST_ROWS:
            raise ValueError(f"rows is {rows!r}: expected a whole number from 0 to 2**40")
        checked = checked_indices(indices, "indices", self.rows, check_indices)
        self._indices = checked.copy()
        flat = self._indices.reshape(-1)
        [self._segments] = backend_of(flat).segments_of([(flat, self.rows)])
        let_torch_collate(IndexPlan, _joined)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        let_torch_collate(IndexPlan, _joined)

    @property
    def indices(self) -> Array:
        return _read_only(self._indices)

    @property
    def distinct(self) -> Array:
        return _read_only(backend_of(self._indices).distinct_rows(self._segments))

    @property
    def counts(self) -> Array:
        return backend_of(self._indices).counts(self._segments)

    def __repr__(self) -> str:
        sizes = f"{self.indices.size:,} indices, {self.distinct.size:,} distinct, of {self.rows:,} rows"
        return f"IndexPlan({sizes})"


def _joined(plans: Sequence[IndexPlan]) -> IndexPlan:
    """The plan of the indices of several, one after the other along the first axis, or the only one.

    Raises:
        TypeError, ValueError: they are not for one table, or their indices can't stand in one array.
    """
    if len(plans) == 1:
        return plans[0]
    for k, plan in enumerate(plans):
        if not isinstance(plan, IndexPlan):
            kind = arrays.article(type(plan).__name__)
            raise TypeError(f"batch[{k}] is {kind} and batch[0] an IndexPlan: expected a plan in each item")
        if plan.rows != plans[0].rows:
            raise ValueError(
                f"batch[{k}] is a plan for {plan.rows} rows and batch[0] for {plans[0].rows}: expected plans "
                "for one table, keep those of each table under a key of their own, or pass a collate_fn"
            )
    parts = [plan._indices.reshape(plan._indices.shape or 1) for plan in plans]
    for k, part in enumerate(parts):
        arrays.check_beside(part, f"batch[{k}].indices", part, parts[0], "batch[0].indices")
        if part.shape[1:] != parts[0].shape[1:]:
            raise ValueError(
                f"batch[{k}].indices has shape {part.shape} and batch[0].indices {parts[0].shape}: expected "
                "shapes that differ in the first axis alone, to put one after the other, or pass a collate_fn"
            )
    return IndexPlan(one_after_the_other(parts), plans[0].rows)


def one_after_the_other(parts: Sequence[Array]) -> Array:
    """A new array of whole numbers with those of several along the first axis, beside which they lie."""
    bounds = list(accumulate((len(part) for part in parts), initial=0))
    dtype = np.result_type(*(part.dtype for part in parts))
    out = backend_of(parts[0]).empty((bounds[-1], *parts[0].shape[1:]), dtype)
    for part, (first, last) in zip(parts, pairwise(bounds), strict=True):
        out[first:last] = part
    return out


def _read_only(array: Array) -> Array:
    """A view that can't be written: a plan is not checked again."""
    if not isinstance(array, np.ndarray):
        return array.read_only()
    view = array.view()
    view.flags.writeable = False
    return view


def _whole(array: Array, value: Any, label: str) -> str:
    """What to do about an array of another dtype: numbers that are not whole, or a mask, are no indices."""
    if array.dtype == bool:
        return ", not a mask; pass np.flatnonzero(mask)" if array.ndim == 1 else ", not a mask"
    if array.dtype.kind not in "iu":
        return ""
    return "; " + arrays.READ.changed(value, label, "{}.astype(np.int64)", "{}.long()")


def checked_indices(indices: Any, label: str, rows: int | None, check: bool = True) -> Array:
    """``indices`` as an array, every one in [0, rows); ``check``: whether those of a device are looked at."""
    array = _whole_numbers(indices, label, check)
    if array.size and (check or isinstance(array, np.ndarray)):
        backend = backend_of(array)
        check_bounds(backend.bounds(backend.contiguous(array).reshape(-1)), label, rows)
    return array


def check_bounds(found: tuple[int, int], label: str, rows: int | None) -> None:
    """Refuse indices of which these are the smallest and the largest, if not all are in [0, rows)."""
    low, high = found
    if low < 0 or (rows is not None and high >= rows):
        bad = low if low < 0 else high
        limit = "not negative" if rows is None else f"in [0, {rows}), the rows of the table"
        raise ValueError(f"{label} holds {bad}: expected every index {limit}")


def _whole_numbers(indices: Any, label: str, check: Any) -> Array:
    """``indices`` as an array of integers that kernels take."""
    if not is_flag(check):
        raise TypeError(f"check_indices is {check!r}: expected True or False")
    array = arrays.array_view(indices, label)
    if array.dtype not in (np.int32, np.int64):
        raise TypeError(
            f"{label} has dtype {array.dtype}: expected int32 or int64{_whole(array, indices, label)}"
        )
    return array


class Indices:
    """Checked indices of one table: a plan's, or an array's, which are sorted into segments when needed.

    Attributes:
        unseen: the array, which kernels may be given that look at the bounds themselves, and say what they
            found to :meth:`see`. rows: of the table.
    """

    def __init__(
        self, array: Array, rows: int, segments: Segments | None = None, label: str | None = None
    ) -> None:
        """``label``: what the array is called, if nobody has looked whether its indices are in [0, rows)."""
        self.unseen = array
        self.rows = rows
        self._segments = segments
        self._label = label

    @property
    def array(self) -> Array:
        """The array, every index of which is in [0, rows).

        Raises:
            ValueError: one is not.
        """
        if self._label is not None:
            self.see(backend_of(self.unseen).bounds(self.unseen.reshape(-1)))
        return self.unseen

    def see(self, bounds: tuple[int, int]) -> None:
        """Take in the smallest and the largest index; raises as ``array``."""
        if self._label is not None:
            check_bounds(bounds, self._label, self.rows)
            self._label = None

    @classmethod
    def checked(cls, given: Any, label: str, rows: int | None, check: bool = True) -> "Indices":
        """Of what a caller gave, for a table of so many rows; None: of a table that is not known. ``check``:
        whether those of a device are looked at."""
        if isinstance(given, Indices):
            return given
        if isinstance(given, IndexPlan):
            if rows is not None and given.rows != rows:
                raise ValueError(
                    f"{label} is a plan for a table of {given.rows} rows: expected one for {rows} rows"
                )
            return cls(given._indices, given.rows, given._segments)
        array = checked_indices(given, label, rows, check)
        backend = backend_of(array)
        array = backend.contiguous(array)
        if rows is None:
            rows = backend.bounds(array.reshape(-1))[1] + 1 if array.size else 0
        return cls(array, rows)

    @classmethod
    def unchecked(cls, given: Any, label: str, rows: int, check: bool = True) -> "Indices":
        """The same, but for the bounds of those in the host's memory, which are looked at later."""
        if isinstance(given, Indices | IndexPlan):
            return cls.checked(given, label, rows)
        array = _whole_numbers(given, label, check)
        if not isinstance(array, np.ndarray) or not array.size:
            return cls.checked(given, label, rows, check)
        return cls(backend_of(array).contiguous(array), rows, label=label)

    @classmethod
    def of_all(cls, rows: int, backend: Backend) -> "Indices":
        """Every row once, in order, which needs no sorting."""
        array, segments = backend.all_rows(rows)
        return cls(array, rows, segments)

    @property
    def flat(self) -> Array:
        return self.array.reshape(-1)

    @property
    def segments(self) -> Segments:
        if self._segments is None:
            sort_together([self])
        assert self._segments is not None
        return self._segments


def copied_together(parts: Sequence[tuple[Array, int]]) -> list[Indices | None]:
    """Copies of indices, int32 or int64, of tables, given with how many rows each has, all of a device copied
    and looked at at once; None of those that are empty, or name rows that there are not."""
    found: list[Indices | None] = [None] * len(parts)
    alike: dict[Backend, list[int]] = {}
    for k, (indices, _) in enumerate(parts):
        if indices.size:
            alike.setdefault(backend_of(indices), []).append(k)
    for backend, own in alike.items():
        copies = backend.copies([parts[k][0] for k in own])
        for k, (copy, low, high) in zip(own, copies, strict=True):
            if low >= 0 and high < parts[k][1]:
                found[k] = Indices(copy, parts[k][1])
    return found


def sort_together(many: list[Indices]) -> None:
    """Sort, all at once, those that are not sorted into segments yet."""
    alike: dict[Backend, list[Indices]] = {}
    for indices in many:
        if indices._segments is None:
            alike.setdefault(backend_of(indices.array), []).append(indices)
    for backend, missing in alike.items():
        found = backend.segments_of([(indices.flat, indices.rows) for indices in missing])
        for indices, segments in zip(missing, found, strict=True):
            indices._segments = segments
