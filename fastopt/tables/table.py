"""Table: weights and state in memory-mapped files, flushed as a whole."""

import contextlib
import json
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np

from fastopt._core import arrays
from fastopt._core.files import sync
from fastopt.tables.folder import META, WEIGHTS, Folder, Mapped, map_file
from fastopt.tables.meta import Meta, Slot, checked_slot, listed
from fastopt.tables.undo_log import UndoLog, checked_rows

Slots = Mapping[str, tuple[tuple[int, ...], np.dtype, float]]


class Table(arrays.TableInFiles):
    """A table of weights and its optimizer's state, in memory-mapped files; made by :func:`open_table`.

    Only the pages that are touched are read and written, and the system takes them out of memory as it needs.
    A table is for one thread at a time, and open in one process at a time. A forked child shares the maps and
    the lock.

    Attributes:
        path: the folder.
        shape: rows and elements of a row.
        dtype: float32 or float64.
        owner: the optimizer that updates the table, whose ``flush`` is the table's, or None.

    What a crash leaves:

    - A process that ends in any way, ``kill -9`` too, leaves the table as at its last flush: the next
      :func:`open_table` undoes what came later, in the rows passed to :meth:`keep` before they were changed
      and in state arrays that were new. Of two flushes the later one counts once its :meth:`commit` renamed
      the meta file; before, the earlier one does.
    - A machine that stops (a power failure) leaves a table as at its last flush if no row was kept since, or
      between :meth:`prepare` and :meth:`commit`. Otherwise pages may be on the disk that the log is not yet:
      :func:`open_table` raises ``RuntimeError``, and a copy has to be restored.
    - What the caller writes to :attr:`weights` without :meth:`keep` is on the disk after the next flush, but
      is not undone by opening.
    - A disk too full for a page of a sparse file ends the process by SIGBUS; opening recovers the table.
    """

    ndim = 2

    def __init__(self, folder: Folder, meta: Meta) -> None:
        self.path = folder.path
        self.shape = meta.rows, meta.dim
        self.dtype = meta.dtype
        self.owner: Any = None
        self._folder = folder
        self._meta = meta
        self._next: Meta | None = None
        self._unsynced = False
        self._weights: Mapped | None = map_file(self.path / WEIGHTS, meta.weights)
        self._state = {name: map_file(folder.state(name), slot) for name, slot in meta.slots.items()}
        former = folder.meta(meta.generation - 1)
        self._former = Meta.read(former) if former.exists() else None
        self._log = self._log_of(meta)
        self._recover()

    @property
    def changed(self) -> bool:
        """Whether rows were kept for changing since the last flush."""
        return self._log.begun

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._weights is None

    @property
    def weights(self) -> np.ndarray:
        """The weights, an array [rows, dim]; writing to it writes to the file."""
        return self._opened().array

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self._meta.weights.nbytes

    @property
    def progress(self) -> dict[str, Any] | None:
        """What the last flush was given, None before the first."""
        return self._meta.progress

    @property
    def has_previous(self) -> bool:
        """Whether :meth:`roll_back` can go before the last flush."""
        return self._former is not None

    @property
    def previous(self) -> dict[str, Any] | None:
        """What the flush before the last one was given, None if there was none."""
        return None if self._former is None else self._former.progress

    def state(self, slots: Slots) -> dict[str, np.ndarray]:
        """Memory-mapped state arrays, created if there are none yet.

        They last from the next flush on; until then opening the table discards them.

        Args:
            slots: for each name, an identifier, the shape (its first size is ``rows``), the dtype (float32,
                float64, bfloat16, int64 or uint8), and the first value of all elements. Those of value 0
                take no space until written.

        Returns:
            The arrays by name, in the order of ``slots``.

        Raises:
            ValueError, TypeError: an entry does not fit, or differs from what is stored.
            OSError: a file can't be written; there are no new arrays then.
        """
        self._opened()
        checked = {name: checked_slot(name, entry, self.shape[0]) for name, entry in slots.items()}
        if not self._state:
            values = {name: float(first) for name, (_, _, first) in slots.items()}
            self._state = self._folder.make_state(checked, values)
        stored = self._slots()
        if stored != checked:
            raise ValueError(
                f"slots is {listed(checked)} but {self.path} holds the state {listed(stored)}: "
                "open it with the optimizer it was made with"
            )
        return {name: self._state[name].array for name in slots}

    def keep(self, rows: np.ndarray | None) -> None:
        """Log what rows hold, in the weights and each state array, before they are changed.

        A row is logged once between two flushes. After a :meth:`prepare` without :meth:`commit` this takes
        the former back.

        Args:
            rows: row numbers in any order, each once, an integer array [n]; None for every row.

        Raises:
            ValueError, TypeError: the rows do not fit.
            OSError: the log can't be written; the rows must not be changed then.
        """
        self._opened()
        if rows is not None:
            rows = checked_rows(rows, self.shape[0])
            if not rows.size:
                return
        self._withdraw()
        self._log.keep(rows)

    def prepare(self, progress: Mapping[str, Any]) -> None:
        """The first half of a flush: bring everything to the disk, but keep what opening goes back to.

        Several tables are flushed together by a ``prepare`` of each, then a ``commit`` of each. Where a crash
        comes between the commits, some tables have the new :attr:`progress` and the others' is their
        :attr:`previous`: these are rolled back.

        Args:
            progress: a dict of anything that JSON holds, to be found again in :attr:`progress`.

        Raises:
            TypeError: JSON can't hold ``progress``.
            OSError: the files can't be written; the former flush counts.
            RuntimeError: writing failed before; what is on the disk is unknown.
        """
        self._opened()
        if not isinstance(progress, Mapping):
            raise TypeError(f"progress is of type {type(progress).__name__}: expected a dict")
        try:
            stored = json.loads(json.dumps(dict(progress)))
        except (TypeError, ValueError) as error:
            raise TypeError(f"progress holds what JSON can't: {error}") from error
        self._prepare(stored)

    def commit(self) -> None:
        """The second half of a flush: what :meth:`prepare` brought to the disk is what counts.

        After an ``OSError`` it may be called again.

        Raises:
            OSError: the meta file can't be renamed; the former flush counts.
            RuntimeError: nothing is prepared.
        """
        self._opened()
        if self._next is None:
            raise RuntimeError(f"commit of {self.path} without a prepare: call prepare(progress) first")
        # It is missing where an earlier call was interrupted right after renaming it.
        with contextlib.suppress(FileNotFoundError):
            os.replace(self._folder.meta(self._next.generation), self.path / META)
        self._advance()
        sync(self.path)
        self._folder.clean(self._meta.generation, self._state)

    def flush(self, progress: Mapping[str, Any] | None = None) -> None:
        """Bring everything to the disk: what opening goes back to from now on.

        Args:
            progress: as for :meth:`prepare`; by default that of the optimizer that updates the table,
                which then flushes all its tables, or, without one, what it was.

        Raises:
            TypeError, OSError, RuntimeError: as :meth:`prepare` and :meth:`commit` do.
        """
        self._opened()
        if progress is not None:
            self.prepare(progress)
        elif self.owner is not None:
            self.owner.flush()
            return
        else:
            self._prepare(self.progress)
        self.commit()

    def roll_back(self) -> None:
        """Go back to the flush before the last one; once, and before rows are kept for changing.

        Arrays change in place. State arrays that the earlier flush did not have are gone: call :meth:`state`
        again.

        Raises:
            ValueError: there is no such flush, or rows were kept since the last one.
            OSError: a file can't be read or written; the table is closed then, and opening finishes the work.
        """
        self._opened()
        if self._former is None:
            raise ValueError(f"{self.path} has no flush before the last one to go back to")
        if self._log.begun:
            raise ValueError(
                f"rows of {self.path} were kept since its last flush: close it and open it again first"
            )
        try:
            # From here on the later flush is an unfinished one, for a crash too.
            os.replace(self._folder.meta(self._former.generation), self.path / META)
            sync(self.path)
            self._meta, self._former, self._next = self._former, None, None
            self._state = {name: self._state[name] for name in self._meta.slots}
            self._log = self._log_of(self._meta)
            self._recover()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the files, without a flush: the next opening undoes what came after the last one.

        Arrays that the caller still holds stay mapped; writing to them is an error that nothing notices.
        """
        if self._weights is None:
            return
        self._log.close()
        self._weights = None
        self._state = {}
        self.owner = None
        self._folder.release()

    def __enter__(self) -> "Table":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Flush, unless an exception ends the block or the table is closed already, and close."""
        try:
            if kind is None and self._weights is not None:
                self.flush()
        finally:
            self.close()

    def __reduce__(self) -> Any:
        raise TypeError(f"{self!r} can't be copied or pickled: open it where it is needed")

    def __repr__(self) -> str:
        closed = ", closed" if self._weights is None else ""
        state = f", state {', '.join(self._state)}" if self._state else ""
        size = f"{self.shape[0]:,} rows of {self.shape[1]} {self.dtype}"
        return f"Table({str(self.path)!r}, {size}{state}{closed})"

    def _opened(self) -> Mapped:
        if self._weights is None:
            raise ValueError(f"the table {self.path} is closed: open it again with open_table")
        return self._weights

    def _slots(self) -> dict[str, Slot]:
        return {name: mapped.slot for name, mapped in self._state.items()}

    def _sync_data(self) -> None:
        for mapped in (self._opened(), *self._state.values()):
            mapped.sync()

    def _log_of(self, meta: Meta) -> UndoLog:
        """The log of what follows the flush ``meta``; state newer than that is discarded as a whole."""
        logged = [self.weights, *(self._state[name].array for name in meta.slots)]
        return UndoLog(self._folder.undo(meta.generation), logged)

    def _recover(self) -> None:
        """Put the arrays back to the flush that meta.json tells of, and delete what is left over."""
        if self._log.path.exists():
            self._log.restore()
            self._sync_data()
            self._log.path.unlink()
            sync(self.path)
        self._folder.clean(self._meta.generation, self._state)

    def _prepare(self, progress: dict[str, Any] | None) -> None:
        if self._unsynced:
            # The system takes pages for written after it failed to write them; trying again would not.
            raise RuntimeError(
                f"{self.path} could not be written to the disk before: close it and open it again, which "
                "goes back to the last flush"
            )
        self._withdraw()
        self._unsynced = True
        self._sync_data()
        self._log.seal()
        self._unsynced = False
        number = self._meta.generation + 1
        following = self._meta._replace(slots=self._slots(), generation=number, progress=progress)
        for meta in (self._meta, following):
            meta.write(self._folder.meta(meta.generation))
        sync(self.path)
        self._next = following

    def _withdraw(self) -> None:
        """Take back a prepare that no commit followed."""
        if self._next is not None:
            try:
                self._folder.meta(self._next.generation).unlink()
            except FileNotFoundError:  # a commit was interrupted right after renaming it
                self._advance()
            self._next = None
        self._log.unseal()

    def _advance(self) -> None:
        """Begin the interval after the flush that was prepared."""
        assert self._next is not None
        log, following = self._log, self._log_of(self._next)
        # An interrupt must not leave the log of one flush with the meta file of another.
        self._former, self._meta, self._next, self._log = self._meta, self._next, None, following
        log.close()
