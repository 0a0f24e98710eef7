"""Kernels with what they are to be called with: dense gradients one by one, sparse ones all at once."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastopt import arrays
from fastopt.gradients import RowGradient
from fastopt.kernels.cpu import norms, tables
from fastopt.kernels.cpu.norms import GROUPS_PER_BLOCK
from fastopt.kernels.cpu.rows import catch_up, update_tables
from fastopt.kernels.jit import Kernel, thread_count
from fastopt.kernels.rules import Rule
from fastopt.kernels.scratch import empty
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
        key = self.kernel, self.kernel.runs_serial(self.work), tuple(map(_kind, self.arguments))
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


class RowUpdate(NamedTuple):
    """One table's share of a launch.

    state: the rule's slots, then those of one element a row. limit: largest norm of a row's gradient.
    row_steps: int64 [rows], or None. numbers: for PerRow, what the rule folds at each count.
    tracking: for rows="dense".
    """

    mode: Any
    h: Any
    c: Any
    table: np.ndarray
    gradient: RowGradient
    state: tuple[np.ndarray, ...]
    limit: float
    step: int
    row_steps: np.ndarray | None
    numbers: np.ndarray | None
    tracking: Tracking | None

    def describe(self) -> np.ndarray:
        """The row of numbers that kernels see (see kernels/cpu/tables.py)."""
        row = self.gradient.describe(self.table)
        _describe_state(row, self.state)
        row[tables.STEP] = self.step
        if self.tracking is not None:
            _describe_tracking(row, self.tracking, self.gradient.indices.groups.rows.size, self.table.dtype)
        elif self.row_steps is not None and self.numbers is not None:
            row[tables.ROW_STEPS] = arrays.address(self.row_steps)
            _describe_history(row, self.numbers)
        return row


def _describe_state(row: np.ndarray, state: tuple[np.ndarray, ...]) -> None:
    wide = [slot for slot in state if slot.ndim == 2]
    row[tables.STATE_STRIDE] = wide[0].strides[0] // wide[0].itemsize if wide else 0
    for k, slot in enumerate(state):
        row[tables.STATE + k] = arrays.address(slot)


def _describe_history(row: np.ndarray, history: np.ndarray) -> None:
    row[tables.HISTORY] = arrays.address(history)
    row[tables.HISTORY_ROWS], row[tables.HISTORY_COLUMNS] = history.shape


def _describe_tracking(row: np.ndarray, tracking: Tracking, rows: int, dtype: np.dtype) -> None:
    history = tracking.history
    row[tables.ROW_STEPS] = arrays.address(tracking.last_step)
    _describe_history(row, history.steps)
    row[tables.HISTORY_BASE], row[tables.HISTORY_WINDOW] = history.base, history.window
    tabulated = tracking.tabulated(rows, dtype)
    row[tables.TABULATED] = arrays.address(tabulated)
    row[tables.TABULATED_COLUMNS] = tabulated.shape[1]
    row[tables.TABULATED_FROM] = history.now - len(tabulated) + 1


def catch_up_launch(
    tracking: Tracking,
    table: np.ndarray,
    state: Mapping[str, np.ndarray],
    rule: Rule,
    h: Any,
    c: Any,
    step: int,
    rows: np.ndarray | None,
) -> Launch:
    """Have rows, the different ones of ``rows`` or all, take the steps up to ``step`` that they missed."""
    row = np.zeros(tables.WIDTH, np.int64)
    row[tables.PARAM], row[tables.DIM] = arrays.address(table), table.shape[1]
    _describe_state(row, tuple(state[slot] for slot in (*rule.state_slots, *rule.row_slots)))
    row[tables.STEP] = step + 1
    count = table.shape[0] if rows is None else rows.size
    _describe_tracking(row, tracking, count, table.dtype)
    listed = np.empty(0, np.int64) if rows is None else rows
    like = table.dtype.type(0)
    work = count * table.shape[1]
    return Launch(
        catch_up, work, (tracking.history.kind(), h, c, like, row, listed, count), (table, state, tracking)
    )


def row_launches(updates: Sequence[RowUpdate]) -> list[Launch]:
    """One launch for all the tables that share a rule, kind of weight decay, dtype and mode."""
    bundles: dict[tuple, list[RowUpdate]] = {}
    for update in updates:
        key = type(update.mode), type(update.h), type(update.c), update.table.dtype
        bundles.setdefault(key, []).append(update)
    return [_row_launch(bundle) for bundle in bundles.values()]


def _row_launch(updates: list[RowUpdate]) -> Launch:
    first = updates[0]
    dtype = first.table.dtype.type
    works = [update.gradient.work for update in updates]
    parts = shares(works)
    width = -(-max(update.table.shape[1] for update in updates) // APART) * APART
    return Launch(
        update_tables,
        sum(works),
        (
            first.mode,
            first.h,
            first.c,
            dtype(0),
            np.stack([update.describe() for update in updates]),
            np.array([update.h for update in updates], dtype),
            np.array([update.c for update in updates], dtype),
            np.array([update.limit for update in updates]),
            parts,
            empty((len(parts), width), dtype),
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
    counts = [-(-int(n) // GROUPS_PER_BLOCK) for n in rows[:, tables.GROUPS]]
    blocks = np.array([(t, block) for t, count in enumerate(counts) for block in range(count)], np.int64)
    partials = np.zeros(len(blocks))
    work = sum(gradient.work for gradient in gradients)
    like = gradients[0].values.dtype.type(0)
    norms.sum_squares_tables(work, like, rows, blocks.reshape(-1, 2), scale, partials)
    return float(partials.sum())
