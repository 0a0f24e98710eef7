"""Updates of the rows of tables."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastopt.kernels.cuda.array import empty, upload
from fastopt.kernels.cuda.backend.catch_up import MOST_BLOCKS, CatchUpLaunch
from fastopt.kernels.cuda.backend.placed import place
from fastopt.kernels.cuda.backend.tables import of_segments, rows_aligned
from fastopt.kernels.cuda.elements import code_of
from fastopt.kernels.cuda.lanes import VECTOR_BYTES
from fastopt.kernels.cuda.row_sums import LONG, SLOT, THREADS, WARPS, sum_slots
from fastopt.kernels.cuda.row_vectors import RowVectors, row_vectors
from fastopt.kernels.cuda.rows import ROUNDS, lanes_of, update_rows
from fastopt.kernels.cuda.settings import Settings
from fastopt.kernels.layout import table_row
from fastopt.kernels.rule import Lazy, PerRow
from fastopt.kernels.work import Spec, TableGradient, TableWork


class Rows:
    """The sparse updates of a backend (see ``fastopt._core.backend``)."""

    device: int

    def update_rows(self, spec: Spec, works: Sequence[TableWork], factor: Any = None) -> "RowsLaunch":
        """The update of the rows that gradients name, each once, of tables that share ``spec``."""
        return RowsLaunch(self.device, spec, works, factor)


class RowsLaunch:
    """The update of rows: those that missed steps take these first, in launches of their own."""

    def __init__(self, device: int, spec: Spec, works: Sequence[TableWork], factor: Any) -> None:
        self._device, self._spec, self._factor = device, spec, factor
        self._works = [
            work for work in works if work.gradient.segments.positions and work.gradient.values.shape[1]
        ]

    def prepare(self) -> Sequence[Callable[[], object]]:
        """The calls that do it, their machine code ready."""
        if not self._works:
            return ()
        device, spec, works = self._device, self._spec, self._works
        code, vectors = code_of(spec), row_vectors(spec.formats, spec.compute)
        settings = Settings(device, code, len(works))
        settings.host[...] = [work.numbers for work in works]
        settings.upload()
        slots = [_slots(work.gradient) for work in works]
        sizes = [
            count * work.gradient.values.shape[1] * spec.compute.itemsize
            for count, work in zip(slots, works, strict=True)
        ]
        places = np.cumsum([0, *(-(-size // VECTOR_BYTES) * VECTOR_BYTES for size in sizes)])
        sums = empty(device, int(places[-1]), np.uint8)
        rows, blocks = [], []
        for work, first in zip(works, places, strict=False):
            lane_bits = lanes_of(vectors, work.gradient.values.shape[1])
            rows.append(_row_of(work, vectors, lane_bits, sums.address + int(first) if sums.size else 0))
            of_block = (THREADS >> lane_bits) * ROUNDS
            blocks.append(-(-work.gradient.segments.positions // of_block))
        table = np.array(rows, np.int64)
        bases = np.cumsum([[0, 0], *zip(blocks, slots, strict=True)], axis=0).T.copy()
        given = np.concatenate([table.reshape(-1), bases.reshape(-1)])
        memory = upload(device, given)
        of_blocks = memory.address + table.nbytes
        of_slots = of_blocks + bases[0].nbytes
        columns, count = table.shape[1], len(works)
        calls: list[Callable[[], object]] = self._catch_up()
        if self._factor is not None:
            calls.append(settings.scaled(self._factor))
        total_blocks, total_slots = bases[:, -1].tolist()
        if total_slots:
            grid = min(-(-total_slots // WARPS), MOST_BLOCKS)
            own = memory.address, columns, of_slots, count, total_slots
            calls.append(sum_slots(spec.compute).ready(device, grid, *own))
        limits = any(work.limit != np.inf for work in works)
        mode = PerRow if isinstance(spec.mode, PerRow) else Lazy
        own = memory.address, columns, of_blocks, count, settings.numbers
        kernel = update_rows(code, mode, limits)
        calls.append(kernel.ready(device, min(total_blocks, MOST_BLOCKS), *own))
        self._alive = settings, sums, memory
        return calls

    def _catch_up(self) -> list[Callable[[], object]]:
        """The calls by which rows take the steps that they missed."""
        if isinstance(self._spec.mode, Lazy | PerRow):
            return []
        self._late = [_late(self._device, self._spec, work) for work in self._works]
        return [call for launch in self._late for call in launch.prepare()]


def _late(device: int, spec: Spec, work: TableWork) -> CatchUpLaunch:
    """The missed steps of the rows of a table; they are then up to date with its update."""
    flags = (isinstance(x, bool) for x in spec.h)
    h = (x != 0 if flag else x for flag, x in zip(flags, work.numbers, strict=False))
    own = spec._replace(h=type(spec.h)(*h))
    assert work.row_steps is not None
    gradient, step = work.gradient, work.step
    stored = work.stored._replace(key=work.missed_key)
    given = own, stored, work.row_steps, step - 1, gradient.segments, step, gradient.skipped
    return CatchUpLaunch(device, *given)


def _slots(gradient: TableGradient) -> int:
    """How many slots of sorted positions may be summed up apart."""
    positions = gradient.segments.positions
    return positions // SLOT if positions > LONG and gradient.winners is None else 0


def _row_of(work: TableWork, vectors: RowVectors, lane_bits: int, sums: int) -> list[int]:
    """What kernels are told of a table (see layout.py)."""
    stored, gradient, segments = work.stored, work.gradient, work.gradient.segments
    columns = {
        **stored.columns(place),
        **of_segments(segments),
        "values": place(gradient.values),
        "order": place(segments.order),
        "starts": place(segments.starts),
        "first_position": segments.first_position,
        "weights": place(gradient.weights),
        "winners": place(gradient.winners),
        "skipped": gradient.skipped,
        "step": work.step,
    }
    if gradient.source is None:
        columns |= {"source": place(segments.order), "source_base": segments.first_position}
    else:
        columns |= {"source": place(gradient.source), "source_origin": segments.first_position}
    if work.row_steps is not None:
        columns |= work.row_steps.columns(place)
    shared = table_row(stored.state.places(place), columns)
    aligned = rows_aligned(vectors, shared) and columns["values"] % VECTOR_BYTES == 0
    limit = int(np.float64(work.limit).view(np.int64))
    own = [
        segments.own_bounds,
        segments.table_rows,
        int(aligned),
        lane_bits,
        sums if _slots(gradient) else 0,
        limit,
    ]
    return [*own, *shared]
