"""What a table holds: its arrays in their files, and what is found out from them for a flush."""

import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from fastopt.kernels.at_once import at_once
from fastopt.tables.files import write_file
from fastopt.tables.folder import WEIGHTS, Folder, Paths
from fastopt.tables.mapped import Mapped, blocks
from fastopt.tables.meta import Meta, Slot
from fastopt.tables.sums import Sums
from fastopt.tables.undo_log import UndoLog, write_empty


class Flushed(NamedTuple):
    """The flush that a table is at: replaced as a whole, so that no interrupt leaves the log of one with the
    meta file of another.

    former: of the flush before. log: of what follows. sums: None where an earlier version made the table.
    prepared: what a commit makes of it. due: a commit, perhaps of several tables, has begun and must end.
    """

    meta: Meta
    former: Meta | None
    log: UndoLog
    sums: Sums | None
    prepared: "Flushed | None" = None
    due: bool = False


class Contents:
    """The weights and the state arrays.

    Attributes:
        weights; state: by name.
    """

    def __init__(self, folder: Folder, meta: Meta) -> None:
        self._folder = folder
        self.weights = Mapped(folder.path / WEIGHTS, meta.weights)
        self.state = {name: Mapped(folder.state(name), slot) for name, slot in meta.slots.items()}
        self._first: Mapping[str, float] = {}  # of state that was made here: the value of all elements

    @property
    def all(self) -> list[Mapped]:
        return [self.weights, *self.state.values()]

    @property
    def slots(self) -> dict[str, Slot]:
        return {name: mapped.slot for name, mapped in self.state.items()}

    def make_state(self, slots: Mapping[str, Slot], first: Mapping[str, float], kept: np.ndarray) -> None:
        """Make the state arrays; the rows ``kept`` may change without being kept anew."""
        made = self._folder.make_state(slots, first)
        try:
            for mapped in made.values():
                mapped.reserve(kept)
        except OSError:
            self._folder.drop_state(made)
            raise
        at_once((partial(setattr, self, "_first", first), partial(setattr, self, "state", made)))

    def drop_state(self, slots: Mapping[str, Slot]) -> None:
        """Leave only what an earlier flush had."""
        self.state = {name: self.state[name] for name in slots}

    def syncing(self) -> list[Callable[[], object]]:
        """The calls that bring it to the disk."""
        return [call for mapped in self.all for call in mapped.syncing()]

    def at(self, meta: Meta, former: Meta | None) -> Flushed:
        """The flush ``meta``, as its files tell."""
        sums = None
        if meta.sums is not None:
            path = self._folder.sums(meta.generation)
            sums = Sums.read(path, meta.rows, 1 + len(meta.slots), meta.sums)
        return Flushed(meta, former, self.log_of(meta), sums)

    def log_of(self, meta: Meta) -> UndoLog:
        """The log of what follows the flush ``meta``; state newer than that is discarded as a whole."""
        logged = [self.weights.array, *(self.state[name].array for name in meta.slots)]
        path = self._folder.undo(meta.generation)
        return UndoLog(path, meta.generation, logged, expected=meta.logged)

    def restore(self, flushed: Flushed) -> None:
        """Put the rows back that the log tells of; damage shows before anything is written."""
        log = flushed.log
        if log.check():
            for rows, *parts in log.records():
                for mapped, part in zip(self.all, parts, strict=True):
                    mapped.restore(rows, part)
            for call in self.syncing():
                call()
            log.reset()
        self._folder.clean(flushed.meta.generation, flushed.meta.slots)

    def sums_after(self, flushed: Flushed) -> Sums | None:
        """The checksums, now that the rows have changed that the log tells of."""
        if flushed.sums is None:
            return None
        sums = flushed.sums.with_arrays(len(self.all))
        fresh = [name for name in self.state if name not in flushed.meta.slots]
        for number, name in enumerate(fresh, len(self.all) - len(fresh)):
            for first, last in blocks(self.state[name].slot) if self._first[name] else ():
                rows = np.arange(first, last)
                sums.add(number, rows, self._as_made(name, rows))
        for rows, *parts in flushed.log.records() if flushed.log.begun else ():
            before = [*parts, *(self._as_made(name, rows) for name in fresh)]
            for number, (mapped, was) in enumerate(zip(self.all, before, strict=True)):
                sums.add(number, rows, mapped.array[rows], was)
        return sums

    def _as_made(self, name: str, rows: np.ndarray) -> np.ndarray:
        slot = self.state[name].slot
        return np.full((len(rows), *slot.shape[1:]), self._first[name], slot.dtype)


def write_beside(paths: Paths, meta: Meta, sums: Sums | None) -> Meta:
    """Write what belongs to a flush beside its meta file, and return what this is to hold."""
    if sums is not None:
        content = sums.content()
        write_file(paths.sums(meta.generation), content)
        meta = meta._replace(sums=zlib.crc32(content))
    write_empty(paths.undo(meta.generation), meta.generation)
    return meta
