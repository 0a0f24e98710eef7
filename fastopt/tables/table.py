"""Table: weights and state in memory-mapped files, flushed as a whole."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np

from fastopt._core import arrays
from fastopt._core.files import sync
from fastopt.kernels.at_once import at_once
from fastopt.tables.contents import Contents, Flushed, write_beside
from fastopt.tables.folder import META, Folder
from fastopt.tables.meta import Meta, checked_progress, checked_slot, listed
from fastopt.tables.undo_log import checked_rows

Slots = Mapping[str, tuple[tuple[int, ...], np.dtype, float]]


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

    What a crash, a full disk and damage leave is told in ``fastopt.tables``.
    """

    ndim = 2

    def __init__(self, folder: Folder, meta: Meta) -> None:
        self.path = folder.path
        self.shape = meta.rows, meta.dim
        self.dtype = meta.dtype
        self.owner: Any = None
        self._folder = folder
        self._unsynced = False
        contents = Contents(folder, meta)
        path = folder.meta(meta.generation - 1)
        former = Meta.read(path) if path.exists() else None
        if former is not None:
            meta.check_former(former, path)
        self._flushed = contents.at(meta, former)
        contents.restore(self._flushed)
        self._contents: Contents | None = contents

    @property
    def changed(self) -> bool:
        """Whether rows were kept for changing since the last flush."""
        return self._flushed.log.begun

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._contents is None

    @property
    def weights(self) -> np.ndarray:
        """The weights, an array [rows, dim]; writing to it writes to the file."""
        return self._opened().weights.array

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
        contents = self._own()
        checked = {name: checked_slot(name, entry, self.shape[0]) for name, entry in slots.items()}
        if checked and not contents.state:
            first = {name: float(value) for name, (_, _, value) in slots.items()}
            contents.make_state(checked, first, self._flushed.log.kept_rows())
        if contents.slots != checked:
            raise ValueError(
                f"slots is {listed(checked)} but {self.path} holds the state {listed(contents.slots)}: "
                "open it with the optimizer it was made with"
            )
        return {name: contents.state[name].array for name in slots}

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
        contents = self._own()
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
        for mapped in contents.all:
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
        self._own()
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
        self._own()
        if progress is None and self.owner is not None:
            self.owner.flush()
            return
        self._prepare(self.progress if progress is None else checked_progress(progress))
        self.commit()

    def check(self) -> None:
        """Compare what the files hold with the checksums of the last flush, which is not done by opening.

        It reads all of the table. A flush brings the checksums up to date from the rows that were kept, so
        weights written without :meth:`keep` differ.

        Raises:
            ValueError: rows differ, the message names the file and which; or rows were kept since the last
                flush; or a version without checksums made the table.
        """
        contents = self._own()
        if self.changed:
            raise ValueError(f"rows of {self.path} were kept since its last flush: flush it first")
        sums = self._flushed.sums
        if sums is None:
            raise ValueError(f"{self.path} has no checksums: the version that made it had none")
        flushed = (contents.state[name] for name in self._flushed.meta.slots)
        sums.check([contents.weights, *flushed])

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
        contents, former = self._own(), self._flushed.former
        if former is None:
            raise ValueError(f"{self.path} has no flush before the last one to go back to")
        if self.changed:
            raise ValueError(
                f"rows of {self.path} were kept since its last flush: close it and open it again first"
            )
        flushed = contents.at(former, None)
        flushed.log.check()
        self._contents = None  # closed until all is done
        try:
            # From here on the later flush is an unfinished one, for a crash too.
            os.replace(self._folder.meta(former.generation), self.path / META)
            sync(self.path)
            contents.drop_state(former.slots)
            self._flushed = flushed
            contents.restore(flushed)
            self._contents = contents
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the files, without a flush: the next opening undoes what came after the last one.

        Arrays that the caller still holds stay mapped; writing to them is an error that nothing notices.
        """
        self._contents = None
        self._flushed.log.close()
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
            if kind is None and self._contents is not None:
                self.flush()
        finally:
            self.close()

    def __reduce__(self) -> Any:
        raise TypeError(f"{self!r} can't be copied or pickled: open it where it is needed")

    def __repr__(self) -> str:
        closed = ", closed" if self._contents is None else ""
        state = (
            f", state {', '.join(self._contents.state)}" if self._contents and self._contents.state else ""
        )
        size = f"{self.shape[0]:,} rows of {self.shape[1]} {self.dtype}"
        return f"Table({str(self.path)!r}, {size}{state}{closed})"

    def _opened(self) -> Contents:
        if self._contents is None:
            raise ValueError(f"the table {self.path} is closed: open it again with open_table")
        return self._contents

    def _own(self) -> Contents:
        """What it holds, for a change of it."""
        contents = self._opened()
        if not self._folder.is_own:
            raise RuntimeError(
                f"{self.path} was opened by the process that this one was forked from: use it there, or "
                "close it there and open it here"
            )
        return contents

    def _prepare(self, progress: dict[str, Any] | None) -> None:
        if self._unsynced:
            # The system takes pages for written after it failed to write them; trying again would not.
            raise RuntimeError(
                f"{self.path} could not be written to the disk before: close it and open it again, which "
                "goes back to the last flush"
            )
        self._withdraw()
        contents, flushed = self._own(), self._flushed
        try:
            at_once(
                (
                    partial(setattr, self, "_unsynced", True),
                    *contents.syncing(),
                    *flushed.log.syncing(),
                    partial(setattr, self, "_unsynced", False),
                )
            )
        except BaseException as error:
            # Others are of a signal handler that a call was left for: the disk did not fail.
            self._unsynced = isinstance(error, OSError)
            raise
        flushed.log.seal()
        sums = contents.sums_after(flushed)
        meta = Meta(*self.shape, self.dtype, contents.slots, flushed.meta.generation + 1, progress)
        meta = write_beside(self._folder, meta, sums)
        for one in (flushed.meta, meta):
            one.write(self._folder.meta(one.generation))
        sync(self.path)
        following = Flushed(meta, flushed.meta, contents.log_of(meta), sums)
        self._flushed = flushed._replace(prepared=following)

    def _withdraw(self) -> None:
        """Take back a prepare that no commit followed, or end a commit that was begun."""
        if self._flushed.due:
            self.commit()
        elif self._flushed.prepared is not None:
            self._flushed = self._flushed._replace(prepared=None)
        self._flushed.log.unseal()


def checksums(table: Table) -> tuple[int | None, int | None]:
    """Those of all rows, of the weights and the state, as of the last flush and of the one before: what has
    equal ones is the same but for one in 2^32. None where there was no flush, or an earlier version made the
    table."""
    flushed = table._flushed
    return flushed.meta.sums, None if flushed.former is None else flushed.former.sums


def commit(tables: Sequence[Table]) -> None:
    """Make what each table prepared what counts, with no signal handler run between them.

    Where an error comes between them, those that are left commit before they change again, so that no flush
    can follow that only some have made.
    """
    both: list[tuple[Table, Flushed, Flushed]] = []
    for table in tables:
        table._own()
        if table._flushed.prepared is None:
            raise RuntimeError(f"commit of {table.path} without a prepare: call prepare(progress) first")
        both.append((table, table._flushed, table._flushed.prepared))
    calls: list[Callable[[], object]] = [
        partial(setattr, table, "_flushed", was._replace(due=True)) for table, was, _ in both
    ]
    for table, _, following in both:
        prepared = table._folder.meta(following.meta.generation)
        # It is missing where an error was reported of a renaming that was done.
        if prepared.exists() or Meta.read(table.path / META).generation != following.meta.generation:
            # As strings: a path is asked for its text by byte code.
            calls.append(partial(os.replace, str(prepared), str(table.path / META)))
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
        table._folder.clean(following.meta.generation, table._opened().state)
