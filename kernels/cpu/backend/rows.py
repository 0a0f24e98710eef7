"""Launches over tables: the rows that gradients name, and rows that catch up with steps they missed."""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from fastopt.kernels.cpu import norms
from fastopt.kernels.cpu.backend.addresses import address
from fastopt.kernels.cpu.backend.indices import distinct_rows
from fastopt.kernels.cpu.backend.parts import PARTS_PER_THREAD, equal_parts
from fastopt.kernels.cpu.catch_up import catch_up as catch_up_rows
from fastopt.kernels.cpu.memory import scratch
from fastopt.kernels.cpu.rows import block_of, update_tables
from fastopt.kernels.cpu.stored_rows import decoded
from fastopt.kernels.cpu.threads import thread_count
from fastopt.kernels.formats import formats
from fastopt.kernels.layout import table_row
from fastopt.kernels.work import RowSteps, Segments, Spec, StoredTable, TableGradient, TableWork

CACHE_LINES = 32  # elements: a multiple of it is whole cache lines


class RowsLaunch:
    """A kernel and what it is called with."""

    def __init__(self, kernel: Any, work: int, arguments: tuple, types: Hashable, alive: Any) -> None:
        self._kernel = kernel
        self._work = work
        self._arguments = arguments
        self._types = types
        self._alive = alive  # the arrays whose addresses are among the arguments

    def prepare(self) -> Sequence[Callable[[], object]]:
        """The call that does the work, its machine code ready."""
        return [self._kernel.ready(self._work, self._arguments, self._types)] if self._work else []


def update_rows(spec: Spec, works: Sequence[TableWork], factor: None = None) -> RowsLaunch:
    """Update the rows of tables that their gradients name, all that share ``spec`` in one launch. There is no
    ``factor``, since norms are at hand at once."""
    amounts = [_work_of(work.gradient) for work in works]
    parts = equal_parts(amounts)
    kinds = formats(*spec.formats)
    dims = {work.stored.table.shape[1] for work in works}
    size = spec.compute.itemsize
    won = _won(work.gradient for work in works)
    limited = any(work.limit != math.inf for work in works)
    arguments = (
        spec.mode,
        won,
        *spec.typed,
        spec.compute.type(0),
        kinds,
        np.array([_row_of_work(work) for work in works], np.int64),
        np.array([work.numbers for work in works], np.float64),
        np.array([work.limit for work in works]) if limited else None,
        parts,
        _memory(len(parts), max(block_of(dim * size) * dim for dim in dims), spec.compute),
        _memory(len(parts), decoded(kinds) * max(dims), spec.compute),
    )
    return RowsLaunch(update_tables, sum(amounts), arguments, (*spec.key, won, limited), works)


def catch_up(
    spec: Spec, stored: StoredTable, row_steps: RowSteps, step: int, segments: Segments | None
) -> RowsLaunch:
    """Have rows, those of ``segments`` or all, take the steps up to ``step`` that they missed."""
    columns = {**stored.columns(address), **row_steps.columns(address), "step": step + 1}
    row = np.array(table_row(stored.state.places(address), columns), np.int64)
    count, dim = stored.table.shape
    listed = np.empty(0, np.int64) if segments is None else distinct_rows(segments)
    count = count if segments is None else listed.size
    kinds = formats(*spec.formats)
    parts = max(1, min(PARTS_PER_THREAD * thread_count(), count))
    buffers = _memory(parts, decoded(kinds) * dim, spec.compute)
    like = spec.compute.type(0)
    arguments = spec.mode, *spec.typed, like, kinds, row, listed, count, buffers
    return RowsLaunch(catch_up_rows, count * dim, arguments, spec.key, (stored, row_steps))


def sum_squares_rows(gradients: Sequence[TableGradient], scale: float) -> float:
    """The sum of squares of the gradients of all rows, of tables of one dtype, times ``scale**2``."""
    described = ({"parameter": address(g.values), **_of_gradient(g)} for g in gradients)
    rows = np.array([table_row([], columns) for columns in described], np.int64)
    counts = [-(-gradient.segments.rows.size // norms.SEGMENTS_PER_BLOCK) for gradient in gradients]
    blocks = np.array([(t, block) for t, count in enumerate(counts) for block in range(count)], np.int64)
    partials = np.zeros(len(blocks))
    work = sum(map(_work_of, gradients))
    like = gradients[0].values.dtype.type(0)
    norms.sum_squares_tables(work, _won(gradients), like, rows, blocks.reshape(-1, 2), scale, partials)
    return float(partials.sum())


def _won(gradients: Iterable[TableGradient]) -> bool | None:
    """See :func:`~fastopt.kernels.cpu.segments.gradient_of`."""
    return True if any(gradient.winners is not None for gradient in gradients) else None


def _work_of(gradient: TableGradient) -> int:
    """How many elements are added up."""
    starts = gradient.segments.starts
    return int(starts[-1] - starts[0]) * gradient.values.shape[1]


def _row_of_work(work: TableWork) -> list[int]:
    columns = {**_of_gradient(work.gradient), **work.stored.columns(address), "step": work.step}
    if work.row_steps is not None:
        columns.update(work.row_steps.columns(address))
    return table_row(work.stored.state.places(address), columns)


def _of_gradient(gradient: TableGradient) -> dict[str, int]:
    segments = gradient.segments
    order = address(segments.order)
    columns = {
        "dim": gradient.values.shape[1],
        "values": address(gradient.values),
        "values_stride": gradient.values.strides[0],
        "order": order,
        "first_position": segments.first_position,
        "rows": address(segments.rows),
        "first_row": segments.first_row,
        "starts": address(segments.starts),
        "segments": segments.rows.size,
        "skipped": gradient.skipped,
    }
    if gradient.source is None:
        columns |= {"source": order, "source_base": segments.first_position}
    else:
        columns |= {"source": address(gradient.source), "source_origin": int(segments.starts[0])}
    if gradient.weights is not None:
        columns["weights"] = address(gradient.weights)
    if gradient.winners is not None:
        columns["winners"] = address(gradient.winners)
    return columns


def _memory(parts: int, size: int, compute: np.dtype) -> np.ndarray:
    """Memory for so many elements for each part, whole cache lines, to which no two parts write."""
    return scratch((parts, -(-size // CACHE_LINES) * CACHE_LINES), compute)
