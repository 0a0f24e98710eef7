"""Kernels for tables, with what they are to be called with: all tables that are alike at once."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastopt import arrays
from fastopt.gradients import RowGradient
from fastopt.kernels import layout
from fastopt.kernels.cpu import norms
from fastopt.kernels.cpu.catch_up import catch_up
from fastopt.kernels.cpu.jit import Kernel
from fastopt.kernels.cpu.memory import empty
from fastopt.kernels.cpu.norms import SEGMENTS_PER_BLOCK
from fastopt.kernels.cpu.rows import update_tables
from fastopt.kernels.cpu.stored_rows import buffer_rows
from fastopt.kernels.cpu.threads import runs_serial, thread_count
from fastopt.kernels.formats import Format, formats
from fastopt.tables import Tracking

APART = 32  # elements: a multiple of a cache line, so that parts do not write to the same one
PARTS_PER_THREAD = 8  # of a launch, so that threads that are held up do not hold up the others


class Launch(NamedTuple):
    """A kernel and what it is to be called with."""

    kernel: Kernel
    work: int
    arguments: tuple
    alive: Any = None  # what the arguments point to

    def run(self) -> None:
        if self.work:
            self.kernel(self.work, *self.arguments)

    def compile(self) -> None:
        """Have the kernel compiled, by a call with empty arrays, if it has not been for such types."""
        if not self.work:
            return
        key = self.kernel, runs_serial(self.work), tuple(map(_kind, self.arguments))
        if key not in _compiled:
            self.kernel(self.work, *map(_emptied, self.arguments))
            _compiled.add(key)


_compiled: set[tuple] = set()


def _kind(value: Any) -> Any:
    """What a kernel's machine code depends on, of an argument."""
    if isinstance(value, np.ndarray):
        return value.dtype, value.ndim, value.flags.writeable
    if type(value) is tuple:
        return tuple(map(_kind, value))
    return type(value)


def _emptied(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value[:0]
    return tuple(map(_emptied, value)) if type(value) is tuple else value


class Stored(NamedTuple):
    """How a table and its state are stored.

    like: the dtype that is computed with. members: formats of parameter, gradient and slots. state: the
    rule's slots, each with its scales or None, then those of one element a row. position, key: of random
    bits.
    """

    like: np.dtype
    members: tuple[Format, ...]
    state: tuple[tuple[np.ndarray, np.ndarray | None], ...]
    master: np.ndarray | None
    position: int
    key: int

    def describe(self, row: np.ndarray) -> np.ndarray:
        """``row``, the columns of the gradient and the table, with those of the state."""
        row = np.concatenate([row, np.zeros(2 * len(self.state), np.int64)])
        wide = [slot for slot, _ in self.state if slot.ndim == 2]
        row[layout.TABLE_STATE_STRIDE] = wide[0].strides[0] // wide[0].itemsize if wide else 0
        for k, (slot, scales) in enumerate(self.state):
            row[layout.TABLE_STATE + 2 * k] = arrays.address(slot)
            row[layout.TABLE_STATE + 2 * k + 1] = 0 if scales is None else arrays.address(scales)
        row[layout.TABLE_MASTER] = 0 if self.master is None else arrays.address(self.master)
        row[layout.TABLE_POSITION], row[layout.TABLE_KEY] = self.position, self.key
        return row


class RowUpdate(NamedTuple):
    """One table's share of a launch.

    limit: largest norm of a row's gradient.
    row_steps: int64 [rows], or None. numbers: for PerRow, what the rule folds at each count.
    tracking: for rows="dense".
    """

    mode: Any
    h: Any
    c: Any
    table: np.ndarray
    gradient: RowGradient
    limit: float
    step: int
    row_steps: np.ndarray | None
    numbers: np.ndarray | None
    tracking: Tracking | None
    stored: Stored

    def describe(self) -> np.ndarray:
        """The row of numbers that kernels see (see kernels/layout.py)."""
        row = self.stored.describe(self.gradient.describe(self.table))
        row[layout.TABLE_STEP] = self.step
        if self.tracking is not None:
            count = self.gradient.indices.segments.rows.size
            _describe_tracking(row, self.tracking, count, self.stored.like)
        elif self.row_steps is not None and self.numbers is not None:
            row[layout.TABLE_ROW_STEPS] = arrays.address(self.row_steps)
            _describe_history(row, self.numbers)
        return row


def _describe_history(row: np.ndarray, history: np.ndarray) -> None:
    row[layout.TABLE_HISTORY] = arrays.address(history)
    row[layout.TABLE_HISTORY_ROWS], row[layout.TABLE_HISTORY_COLUMNS] = history.shape


def _describe_tracking(row: np.ndarray, tracking: Tracking, rows: int, dtype: np.dtype) -> None:
    history = tracking.history
    row[layout.TABLE_ROW_STEPS] = arrays.address(tracking.last_step)
    _describe_history(row, history.steps)
    row[layout.TABLE_HISTORY_BASE], row[layout.TABLE_HISTORY_WINDOW] = history.base, history.window
    tabulated = tracking.tabulated(rows, dtype)
    row[layout.TABLE_TABULATED] = arrays.address(tabulated)
    row[layout.TABLE_TABULATED_COLUMNS] = tabulated.shape[1]
    row[layout.TABLE_TABULATED_FROM] = history.now - len(tabulated) + 1


def catch_up_launch(
    tracking: Tracking, table: np.ndarray, stored: Stored, h: Any, c: Any, step: int, rows: np.ndarray | None
) -> Launch:
    """Have rows, the different ones of ``rows`` or all, take the steps up to ``step`` that they missed."""
    row = np.zeros(layout.TABLE_STATE, np.int64)
    row[layout.TABLE_PARAMETER], row[layout.TABLE_DIM] = arrays.address(table), table.shape[1]
    row = stored.describe(row)
    row[layout.TABLE_STEP] = step + 1
    count = table.shape[0] if rows is None else rows.size
    _describe_tracking(row, tracking, count, stored.like)
    listed = np.empty(0, np.int64) if rows is None else rows
    kinds, like = formats(*stored.members), stored.like.type(0)
    work = count * table.shape[1]
    parts = max(1, min(PARTS_PER_THREAD * thread_count(), count))
    buffers = _buffers(parts, kinds, table.shape[1], stored.like)
    given = tracking.history.kind(), h, c, like, kinds, row, listed, count, buffers
    return Launch(catch_up, work, given, (table, stored, tracking))


def _buffers(parts: int, kinds: Any, dim: int, like: np.dtype) -> np.ndarray:
    """Memory for rows, for each part, a multiple of cache lines."""
    return empty((parts, -(-buffer_rows(kinds) * dim // APART) * APART), like)


def row_launches(updates: Sequence[RowUpdate]) -> list[Launch]:
    """One launch for all the tables that share a rule, kind of weight decay, dtype and mode."""
    bundles: dict[tuple, list[RowUpdate]] = {}
    for update in updates:
        key = type(update.mode), type(update.h), type(update.c), update.stored.like, update.stored.members
        bundles.setdefault(key, []).append(update)
    return [_row_launch(bundle) for bundle in bundles.values()]


def _row_launch(updates: list[RowUpdate]) -> Launch:
    first = updates[0]
    dtype = first.stored.like.type
    works = [update.gradient.work for update in updates]
    parts = shares(works)
    kinds = formats(*first.stored.members)
    return Launch(
        update_tables,
        sum(works),
        (
            first.mode,
            first.h,
            first.c,
            dtype(0),
            kinds,
            np.stack([update.describe() for update in updates]),
            np.array([update.h for update in updates], dtype),
            np.array([update.c for update in updates], dtype),
            np.array([update.limit for update in updates]),
            parts,
            _buffers(len(parts), kinds, max(u.table.shape[1] for u in updates), first.stored.like),
        ),
        updates,
    )


def shares(works: list[int]) -> np.ndarray:
    """[table, part, how many parts the table has] of parts of about equal work."""
    goal = max(1, sum(works) // (PARTS_PER_THREAD * thread_count()))
    return np.array(
        [
            (t, part, parts)
            for t, work in enumerate(works)
            for parts in [-(-work // goal)]
            for part in range(parts)
        ],
        np.int64,
    ).reshape(-1, 3)


def sums_of_squares(gradients: list[RowGradient], scale: float) -> float:
    """Of the summed gradients of all rows of tables of one dtype, times ``scale**2``, in one launch."""
    rows = np.stack([gradient.describe(gradient.values) for gradient in gradients])
    counts = [-(-int(n) // SEGMENTS_PER_BLOCK) for n in rows[:, layout.TABLE_SEGMENTS]]
    blocks = np.array([(t, block) for t, count in enumerate(counts) for block in range(count)], np.int64)
    partials = np.zeros(len(blocks))
    work = sum(gradient.work for gradient in gradients)
    like = gradients[0].values.dtype.type(0)
    norms.sum_squares_tables(work, like, rows, blocks.reshape(-1, 2), scale, partials)
    return float(partials.sum())
