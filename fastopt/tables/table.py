"""Table: weights and state in memory-mapped files, flushed as a whole."""

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from fastopt._core import arrays
from fastopt._core.at_once import at_once
from fastopt._core.files import sync
from fastopt.tables.files import write_file
from fastopt.tables.folder import META, WEIGHTS, Folder, Paths
from fastopt.tables.mapped import Mapped, blocks
from fastopt.tables.meta import Meta, Slot, checked_progress, checked_slot, listed
from fastopt.tables.sums import Sums
from fastopt.tables.undo_log import UndoLog, checked_rows, write_empty

Slots = Mapping[str, tuple[tuple[int, ...], np.dtype, float]]


class _Flushed(NamedTuple):
    """The flush that a table is at: replaced as a whole, so that no interrupt leaves the log of one with the
    meta file of another.

    former: of the flush before. log: of what follows. sums: None where an earlier version made the table.
    prepared: what a commit makes of it. due: a commit, perhaps of several tables, has begun and must end.
    """

    meta: Meta
    former: Meta | None
    log: UndoLog
    sums: Sums | None
    prepared: "_Flushed | None" = None
    due: bool = False


class Table(arrays.TableInFiles):
    """A table of weights and its optimizer's state, in memory-mapped files; made by :func:`open_table`.

    Only the pages that are touched are read and written, and the system takes them out of memory as it needs.
    A table is for one thread at a time, and open in one process at a time. A forked child may read the
    weights; all that would write raises ``RuntimeError`` there, and closing leaves the parent's table open.

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
    - A full disk is an ``OSError``: of :meth:`keep`, which reserves blocks for the pages of its rows, of
      :meth:`state` or of a flush, and the last flush counts. Where a sparse file has no block, what the
      caller writes without :meth:`keep` ends the process by SIGBUS then, and on tmpfs so does reading. File
      systems that write each block anew, as btrfs, can't reserve.
    - A log that is cut short, missing or damaged is seen by opening. Changed bits in the rows are not: see
      :meth:`check`.
    """

    ndim = 2

    def __init__(self, folder: Folder, meta: Meta) -> None:
        self.path = folder.path
        self.shape = meta.rows, meta.dim
        self.dtype = meta.dtype
        self.owner: Any = None
        self._folder = folder
        self._unsynced = False
        self._weights: Mapped | None = Mapped(self.path / WEIGHTS, meta.weights)
        self._state = {name: Mapped(folder.state(name), slot) for name, slot in meta.slots.items()}
        self._first: dict[str, float] = {}  # values of state arrays that the last flush did not have
        path = folder.meta(meta.generation - 1)
        former = Meta.read(path) if path.exists() else None
        if former is not None:
            meta.check_former(former, path)
        self._flushed = _Flushed(meta, former, self._log_of(meta), self._sums_of(meta))
        self._recover()

    @property
    def changed(self) -> bool:
        """Whether rows were kept for changing since the last flush."""
        return self._flushed.log.begun

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._weights is None

    @property
    def weights(self) -> np.ndarray:
        """The weights, an array [rows, dim]; writing to it writes to the file."""
        return self._mapped().array

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self._flushed.meta.weights.nbytes

    @property
    def progress(self) -> dict[str, Any] | None:
        """What the last flush was given, None before the first."""
        return self._flushed.meta.progress

    @property
    def has_previous(self) -> bool:
        """Whether :meth:`roll_back` can go before the last flush."""
        return self._flushed.former is not None

    @property
    def previous(self) -> dict[str, Any] | None:
        """What the flush before the last one was given, None if there was none."""
        return None if self._flushed.former is None else self._flushed.former.progress

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
        self._check_usable()
        checked = {name: checked_slot(name, entry, self.shape[0]) for name, entry in slots.items()}
        if checked and not self._state:
            values = {name: float(first) for name, (_, _, first) in slots.items()}
            made = self._folder.make_state(checked, values)
            if self.changed:  # rows that are kept may be changed already
                self._reserve(made, self._flushed.log.kept_rows())
            at_once((partial(setattr, self, "_first", values), partial(setattr, self, "_state", made)))
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
            OSError: the log can't be written, or the disk has no room for the rows; they must not be changed
                then.
        """
        self._check_usable()
        if rows is not None:
            rows = checked_rows(rows, self.shape[0])
            if not rows.size:
                return
        self._withdraw()
        log = self._flushed.log
        if rows is not None:
            rows = log.missing(rows)
            if not rows.size:
                return
        for mapped in self._all():
            mapped.reserve(rows)
        log.keep(rows)

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
        self._check_usable()
        self._prepare(checked_progress(progress))

    def commit(self) -> None:
        """The second half of a flush: what :meth:`prepare` brought to the disk is what counts.

        After an exception it may be called again.

        Raises:
            OSError: the meta file can't be renamed; the former flush counts.
            RuntimeError: nothing is prepared.
        """
        commit([self])

    def flush(self, progress: Mapping[str, Any] | None = None) -> None:
        """Bring everything to the disk: what opening goes back to from now on.

        Args:
            progress: as for :meth:`prepare`; by default that of the optimizer that updates the table,
                which then flushes all its tables, or, without one, what it was.

        Raises:
            TypeError, OSError, RuntimeError: as :meth:`prepare` and :meth:`commit` do.
        """
        self._check_usable()
        if progress is not None:
            self.prepare(progress)
        elif self.owner is not None:
            self.owner.flush()
            return
        else:
            self._prepare(self.progress)
        self.commit()

    def check(self) -> None:
        """Compare what the files hold with the checksums of the last flush, which is not done by opening.

        It reads all of the table. A flush brings the checksums up to date from the rows that were kept, so
        weights written without :meth:`keep` differ.

        Raises:
            ValueError: rows differ, the message names the file and which; or rows were kept since the last
                flush; or a version without checksums made the table.
        """
        self._check_usable()
        if self.changed:
            raise ValueError(f"rows of {self.path} were kept since its last flush: flush it first")
        sums = self._flushed.sums
        if sums is None:
            raise ValueError(f"{self.path} has no checksums: the version that made it had none")
        sums.check([self._mapped(), *(self._state[name] for name in self._flushed.meta.slots)])

    def roll_back(self) -> None:
        """Go back to the flush before the last one; once, and before rows are kept for changing.

        Arrays change in place. State arrays that the earlier flush did not have are gone: call :meth:`state`
        again.

        Raises:
            ValueError: there is no such flush, or rows were kept since the last one.
            RuntimeError: its undo log is damaged.
            OSError: a file can't be read or written. After this or an interrupt the table is closed; opening
                finishes the work.
        """
        self._check_usable()
        former = self._flushed.former
        if former is None:
            raise ValueError(f"{self.path} has no flush before the last one to go back to")
        if self.changed:
            raise ValueError(
                f"rows of {self.path} were kept since its last flush: close it and open it again first"
            )
        log, sums = self._log_of(former), self._sums_of(former)
        log.check()
        weights, self._weights = self._weights, None  # closed until all is done
        try:
            # From here on the later flush is an unfinished one, for a crash too.
            os.replace(self._folder.meta(former.generation), self.path / META)
            sync(self.path)
            self._state = {name: self._state[name] for name in former.slots}
            self._flushed = _Flushed(former, None, log, sums)
            self._first = {}
            self._restore([weights, *self._state.values()])
            self._weights = weights
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the files, without a flush: the next opening undoes what came after the last one.

        Arrays that the caller still holds stay mapped; writing to them is an error that nothing notices.
        """
        self._weights = None
        self._flushed.log.close()
        self._state = {}
        self.owner = None
        self._folder.release()

    def __enter__(self) -> "Table":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Flush, unless an exception ends the block or the table is closed already, and close.

        A forked child's copy is closed, and a block that ends without an exception raises RuntimeError.
        """
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

    def _mapped(self) -> Mapped:
        if self._weights is None:
            raise ValueError(f"the table {self.path} is closed: open it again with open_table")
        return self._weights

    def _all(self) -> list[Mapped]:
        return [self._mapped(), *self._state.values()]

    def _check_usable(self) -> None:
        self._mapped()
        if not self._folder.is_own:
            raise RuntimeError(
                f"{self.path} was opened by the process that this one was forked from: use it there, or "
                "close it there and open it here"
            )

    def _slots(self) -> dict[str, Slot]:
        return {name: mapped.slot for name, mapped in self._state.items()}

    def _reserve(self, made: Mapping[str, Mapped], rows: np.ndarray) -> None:
        try:
            for mapped in made.values():
                mapped.reserve(rows)
        except BaseException:
            self._folder.drop_state(made)
            raise

    def _log_of(self, meta: Meta) -> UndoLog:
        """The log of what follows the flush ``meta``; state newer than that is discarded as a whole."""
        logged = [self.weights, *(self._state[name].array for name in meta.slots)]
        path = self._folder.undo(meta.generation)
        return UndoLog(path, meta.generation, logged, expected=meta.logged)

    def _sums_of(self, meta: Meta) -> Sums | None:
        if meta.sums is None:
            return None
        return Sums.read(self._folder.sums(meta.generation), meta.rows, 1 + len(meta.slots), meta.sums)

    def _recover(self) -> None:
        self._restore(self._all())

    def _restore(self, logged: Sequence[Mapped]) -> None:
        """Put the arrays back to the flush that meta.json tells of, and delete what is left over."""
        log, meta = self._flushed.log, self._flushed.meta
        if log.check():  # damage shows before anything is written
            for rows, *parts in log.records():
                for mapped, part in zip(logged, parts, strict=True):
                    mapped.restore(rows, part)
            for mapped in logged:
                at_once(mapped.syncing())
            log.reset()
            sync(self.path)
        self._folder.clean(meta.generation, meta.slots)

    def _prepare(self, progress: dict[str, Any] | None) -> None:
        if self._unsynced:
            # The system takes pages for written after it failed to write them; trying again would not.
            raise RuntimeError(
                f"{self.path} could not be written to the disk before: close it and open it again, which "
                "goes back to the last flush"
            )
        self._withdraw()
        flushed = self._flushed
        try:
            at_once(
                (
                    partial(setattr, self, "_unsynced", True),
                    *(call for mapped in self._all() for call in mapped.syncing()),
                    *flushed.log.syncing(),
                    partial(setattr, self, "_unsynced", False),
                )
            )
        except OSError:
            raise
        except BaseException:  # of a signal handler that a call was left for: the disk did not fail
            self._unsynced = False
            raise
        flushed.log.seal()
        number, sums = flushed.meta.generation + 1, self._new_sums()
        meta = Meta(*self.shape, self.dtype, self._slots(), number, progress)
        meta = write_flush(self._folder, meta, sums)
        for one in (flushed.meta, meta):
            one.write(self._folder.meta(one.generation))
        sync(self.path)
        self._flushed = flushed._replace(prepared=_Flushed(meta, flushed.meta, self._log_of(meta), sums))

    def _new_sums(self) -> Sums | None:
        """The checksums after the rows that the log tells of have changed."""
        flushed = self._flushed
        if flushed.sums is None:
            return None
        everything = self._all()
        everything = self._all()
        sums = flushed.sums.with_arrays(len(everything))
        fresh = {name: value for name, value in self._first.items() if name not in flushed.meta.slots}
        filled: list[_Filled] = []
        for name, value in fresh.items():
            filled.append(_Filled(self._state[name].slot, value))
            filled[-1].add_to(sums, everything.index(self._state[name]))
        for rows, *parts in flushed.log.records() if flushed.log.begun else ():
            before = [*parts, *(one.rows(rows) for one in filled)]
            for number, (mapped, was) in enumerate(zip(everything, before, strict=True)):
                sums.take_out(number, rows, was)
                sums.add(number, rows, mapped.array[rows])
        return sums

    def _prepared(self) -> tuple[_Flushed, _Flushed]:
        """The flush that it is at, and what a commit makes of it."""
        self._check_usable()
        flushed = self._flushed
        if flushed.prepared is None:
            raise RuntimeError(f"commit of {self.path} without a prepare: call prepare(progress) first")
        return flushed, flushed.prepared

    def _withdraw(self) -> None:
        """Take back a prepare that no commit followed, or end a commit that was begun."""
        if self._flushed.prepared is not None:
            if self._flushed.due:
                self.commit()
            else:
                self._flushed = self._flushed._replace(prepared=None)
        self._flushed.log.unseal()


class _Filled(NamedTuple):
    """A state array as it was made, all of one value."""

    slot: Slot
    value: float

    def rows(self, rows: np.ndarray) -> np.ndarray:
        return np.full((len(rows), *self.slot.shape[1:]), self.value, self.slot.dtype)

    def add_to(self, sums: Sums, number: int) -> None:
        for first, last in blocks(self.slot) if self.value else ():
            rows = np.arange(first, last)
            sums.add(number, rows, self.rows(rows))


def write_flush(paths: Paths, meta: Meta, sums: Sums | None) -> Meta:
    """Write what belongs to a flush beside its meta file, and return the meta file's content."""
    if sums is not None:
        content = sums.content()
        write_file(paths.sums(meta.generation), content)
        meta = meta._replace(sums=zlib.crc32(content))
    write_empty(paths.undo(meta.generation), meta.generation)
    return meta


def commit(tables: Sequence[Table]) -> None:
    """Make what each table prepared what counts, with no signal handler run between them.

    Where an error comes between them, those that are left commit before they change again, so that no flush
    can follow that only some have made.
    """
    both = [(table, *table._prepared()) for table in tables]
    calls: list[Callable[[], object]] = [
        partial(setattr, table, "_flushed", was._replace(due=True)) for table, was, _ in both
    ]
    for table, _, following in both:
        prepared = table._folder.meta(following.meta.generation)
        # It is missing where an error was reported of a renaming that was done.
        if prepared.exists() or Meta.read(table.path / META).generation != following.meta.generation:
            calls.append(partial(os.replace, prepared, table.path / META))
        calls.append(partial(setattr, table, "_flushed", following))
    try:
        at_once(calls)
    except OSError:
        if all(table._folder.meta(following.meta.generation).exists() for table, _, following in both):
            for table, was, _ in both:  # none is renamed: going on may take it back
                table._flushed = was
        raise
    for table, was, following in both:
        was.log.close()
        sync(table.path)
        table._folder.clean(following.meta.generation, table._state)
