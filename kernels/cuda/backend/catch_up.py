"""Rows of tables that catch up with the steps that they missed, and what is known of these steps."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastopt.kernels.cuda.array import DeviceArray, empty, upload
from fastopt.kernels.cuda.backend.counts import CountTables
from fastopt.kernels.cuda.backend.history import History
from fastopt.kernels.cuda.backend.placed import place
from fastopt.kernels.cuda.backend.tables import of_segments, rows_aligned
from fastopt.kernels.cuda.catch_up import WARPS, catch_up_rows
from fastopt.kernels.cuda.catch_up_loop import takes_whole_rows
from fastopt.kernels.cuda.driver import driver
from fastopt.kernels.cuda.elements import code_of
from fastopt.kernels.cuda.row_vectors import row_vectors
from fastopt.kernels.cuda.segments import DeviceSegments
from fastopt.kernels.layout import table_row
from fastopt.kernels.rule import Loop, Rule
from fastopt.kernels.work import CountFold, RowSteps, Spec, StoredTable

MOST_BLOCKS = 2**20  # of a launch, each of which then takes several groups of rows
BLOCKS_WITH_MEMORY = 8  # for each multiprocessor, where each warp needs memory


class CatchUp:
    """What a backend knows of missed steps (see ``fastopt._core.backend``)."""

    device: int
    host: Any

    def History(self, rule: Rule, decay: type, options: dict[str, Any], base: int) -> History:
        """The steps of a table since some of its rows are behind."""
        return History(self.device, self.host.History(rule, decay, options, base))

    def catch_up(
        self,
        spec: Spec,
        stored: StoredTable,
        row_steps: RowSteps,
        step: int,
        segments: DeviceSegments | None,
    ) -> "CatchUpLaunch":
        """Have the rows of segments, or all, take the steps up to ``step`` that they missed."""
        return CatchUpLaunch(self.device, spec, stored, row_steps, step, segments, step)

    def counted_steps(
        self, counts: DeviceArray, segments: DeviceSegments, fold: CountFold, steps: int
    ) -> RowSteps:
        """What a launch needs where rows count their own updates; none has had more than ``steps``."""
        return self._count_tables.of_rows(counts, fold, steps)

    @functools.cached_property
    def _count_tables(self) -> CountTables:
        return CountTables(self.device)


class CatchUpLaunch:
    """Rows take the steps up to ``step`` that they missed.

    Args:
        mark: the step that these rows are then up to date with: ``step``, or the next, if an update follows.
        skipped: a row that is left as it is, or -1.
    """

    def __init__(
        self,
        device: int,
        spec: Spec,
        stored: StoredTable,
        row_steps: RowSteps,
        step: int,
        segments: DeviceSegments | None,
        mark: int,
        skipped: int = -1,
    ) -> None:
        self._device, self._code, self._kind = device, code_of(spec), type(spec.mode)
        rows, self._dim = stored.table.shape
        self._most = rows if segments is None else segments.positions
        columns = {**stored.columns(place), **row_steps.columns(place), "step": step + 1, "skipped": skipped}
        bounds = 0
        if segments is not None:
            columns |= of_segments(segments)
            bounds = segments.own_bounds
        table = table_row(stored.state.places(place), columns)
        row = np.array(table, np.int64)
        h, _ = spec.typed
        numbers = np.array(h, spec.compute)
        self._table = upload(device, np.concatenate([row.view(np.uint8), numbers.view(np.uint8)]))
        aligned = rows_aligned(row_vectors(spec.formats, spec.compute), table)
        own = self._table.address
        self._given = own, own + row.nbytes, bounds, rows, rows, int(aligned), mark
        whole = self._kind is Loop and takes_whole_rows(spec.rule)
        self._of_warp = (1 + len(spec.rule.state_slots)) * self._dim * spec.compute.itemsize if whole else 0
        self._alive = stored, row_steps, segments

    def prepare(self) -> Sequence[Callable[[], object]]:
        """The call that does it, its machine code ready."""
        if not self._most or not self._dim:
            return ()
        grid = min(-(-self._most // WARPS), MOST_BLOCKS)
        memory = 0
        if self._of_warp:
            grid = min(grid, BLOCKS_WITH_MEMORY * driver().multiprocessors(self._device))
            self._memory = empty(self._device, grid * WARPS * self._of_warp, np.uint8)
            memory = self._memory.address
        given = *self._given, memory, self._of_warp
        return (catch_up_rows(self._code, self._kind).ready(self._device, grid, *given),)
