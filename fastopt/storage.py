"""Embedding tables larger than memory, in memory-mapped files that survive a crash.

A table is a folder:

    meta.json     sizes, dtypes, the caller's progress, and G, how many flushes there were
    weights       the rows, one after the other
    state-NAME    the same for each state array
    undo-G        the undo log: what the rows changed after flush G held before
    meta-G.json   meta.json as it was at flush G; after ``prepare``, the next one too
    lock          locked while the table is open

Rows are changed in place, in the page cache, after the log holds what they were. Opening a table that was
not closed puts the logged rows back, so that it is as at its last flush.
"""

import contextlib
import errno
import fcntl
import json
import math
import mmap
import os
import re
import shutil
import struct
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from fastopt import arrays
from fastopt.checkpoint import TEMPORARY, _sync

FORMAT = 1
FILL_BYTES = 8 << 20  # of the blocks in which new files are filled
LOG_BYTES = 1 << 20  # of a record at most, unless a row is larger: small enough to stay in the cache
_META = "meta.json"
_WEIGHTS = "weights"
_LOCK = "lock"
_OWN = re.compile(r"(undo-\d+|meta-\d+\.json|state-\w+)")  # what may be left over from earlier
_HEAD = struct.Struct("<8s36s?I")  # magic, boot id, whether all records are on the disk, CRC of these
_HEAD_MAGIC = b"fastlog1"
_RECORD = struct.Struct("<8sqqII")  # magic, rows, bytes that follow, CRC of those, CRC of these
_RECORD_MAGIC = b"undorows"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_SLOT_DTYPES = np.dtype(np.int64), np.dtype(np.uint8), arrays.LOW_DTYPES[1]
Slots = Mapping[str, tuple[tuple[int, ...], np.dtype, float]]


class _Slot(NamedTuple):
    """Shape and dtype of a state array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"


class _Meta(NamedTuple):
    """What meta.json holds."""

    rows: int
    dim: int
    dtype: np.dtype
    slots: dict[str, _Slot]
    generation: int
    progress: dict[str, Any] | None

    @property
    def weights(self) -> _Slot:
        return _Slot((self.rows, self.dim), self.dtype)

    def text(self) -> str:
        slots = {name: {"shape": slot.shape, "dtype": _text(slot.dtype)} for name, slot in self.slots.items()}
        return json.dumps({"format": FORMAT, **self._asdict(), "dtype": self.dtype.str, "slots": slots})


class _Mapped(NamedTuple):
    """A file and an array that is its content."""

    path: Path
    map: mmap.mmap
    array: np.ndarray


def open_table(
    path: Any,
    rows: int | None = None,
    dim: int | None = None,
    dtype: DTypeLike | None = None,
    *,
    init: Callable[[int, int], Any] | None = None,
) -> "Table":
    """Open the table in the folder ``path``, or create it.

    Args:
        path: the folder. A new one is built beside its place and renamed, so that a crash leaves none.
        rows: rows of the table, at least 1; needed for a new one.
        dim: elements of a row, at least 1; needed for a new one.
        dtype: float32, the default of a new table, or float64.
        init: ``init(first, last)`` returns the rows from first to last of a new table, an array of shape
            [last - first, dim]; it is called for blocks of about 8 MiB. Without it all weights are 0, and
            the files take no space on the disk where nothing was written.

    Returns:
        The table as at its last flush.

    Raises:
        ValueError, TypeError: an argument does not fit, or differs from what is stored; or the folder holds
            no table.
        BlockingIOError: the table is open already, here or in another process.
        RuntimeError: the table was in use when the machine stopped, or its undo log is damaged; its content
            can't be trusted.
        OSError: it can't be read or written.
    """
    for name, size in (("rows", rows), ("dim", dim)):
        if size is not None:
            _check_size(size, name)
    dtype = None if dtype is None else _checked_dtype(dtype, "dtype")
    target = Path(os.path.realpath(path))
    if not target.exists():
        if rows is None or dim is None:
            raise ValueError(
                f"rows is {rows} and dim is {dim}: expected both, for there is no table {target} yet"
            )
        _create(target, _Meta(int(rows), int(dim), dtype or arrays.DTYPES[0], {}, 0, None), init)
    if not (target / _META).is_file():
        raise ValueError(f"{target} holds no table: expected a folder that open_table made, or none yet")
    lock = _lock(target)
    try:
        meta = _read_meta(target / _META)
        for name, got in (("rows", rows), ("dim", dim), ("dtype", dtype)):
            stored = getattr(meta, name)
            if got is not None and got != stored:
                raise ValueError(
                    f"{name} is {got} but {target} holds {meta.rows} rows of {meta.dim} {meta.dtype}: "
                    f"pass {stored}, or no {name}"
                )
        return Table(target, meta, lock)
    except BaseException:
        os.close(lock)
        raise


class Table(arrays.InFiles):
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

    def __init__(self, path: Path, meta: _Meta, lock: int) -> None:
        self.path = path
        self.shape = meta.rows, meta.dim
        self.dtype = meta.dtype
        self._meta = meta
        self._next: _Meta | None = None
        self._log: _Log | None = None
        self._unsynced = False
        self.owner: Any = None
        self._kept = _bits(meta.rows)
        self._weights: _Mapped | None = _map(path / _WEIGHTS, meta.weights)
        self._state = {name: _map(self._slot_path(name), slot) for name, slot in meta.slots.items()}
        former = self._meta_path(meta.generation - 1)
        self._former = _read_meta(former) if former.exists() else None
        self._recover()
        self._owner = os.getpid()
        self._lock = lock
        self._release = weakref.finalize(self, os.close, lock)

    @property
    def changed(self) -> bool:
        """Whether rows were kept for changing since the last flush."""
        return self._log is not None

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
        checked = {name: self._checked_slot(name, entry) for name, entry in slots.items()}
        if self._state:
            stored = {name: _Slot(m.array.shape, m.array.dtype) for name, m in self._state.items()}
            if stored != checked:
                raise ValueError(
                    f"slots is {_listed(checked)} but {self.path} holds the state {_listed(stored)}: "
                    "open it with the optimizer it was made with"
                )
            return {name: self._state[name].array for name in slots}
        new: dict[str, _Mapped] = {}
        try:
            for name, slot in checked.items():
                _fill(self._slot_path(name), slot, float(slots[name][2]))
                new[name] = _map(self._slot_path(name), slot)
        except BaseException:
            for name in checked:
                self._slot_path(name).unlink(missing_ok=True)
            raise
        self._state = new
        return {name: mapped.array for name, mapped in new.items()}

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
        count = self.shape[0]
        step = _rows_of(LOG_BYTES, self._row_bytes())
        if rows is None:
            self._withdraw()
            for first in range(0, count, step):
                self._keep(self._not_kept(np.arange(first, min(first + step, count))))
            return
        if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "iu":
            got = f"dtype {rows.dtype}" if isinstance(rows, np.ndarray) else f"type {type(rows).__name__}"
            raise TypeError(f"rows has {got}: expected an array of whole numbers, as np.int64")
        if rows.ndim != 1:
            raise ValueError(f"rows has shape {rows.shape}: expected one dimension")
        if not rows.size:
            return
        for row in (rows.min(), rows.max()):
            if not 0 <= row < count:
                raise ValueError(f"rows holds {row}: expected row numbers from 0 to {count - 1}")
        self._withdraw()
        rows = rows.astype(np.int64, copy=False)
        new = np.sort(self._not_kept(rows))  # in the order of the pages
        for first in range(0, new.size, step):
            self._keep(new[first : first + step])

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
        # missing where an earlier call was interrupted right after renaming it
        with contextlib.suppress(FileNotFoundError):
            os.replace(self._meta_path(self._next.generation), self.path / _META)
        self._advance()
        _sync(self.path)
        self._clean()

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
        if self._log is not None:
            raise ValueError(
                f"rows of {self.path} were kept since its last flush: close it and open it again first"
            )
        try:
            # from here the later flush is an unfinished one, for a crash too
            os.replace(self._meta_path(self._former.generation), self.path / _META)
            _sync(self.path)
            self._meta, self._former, self._next = self._former, None, None
            self._state = {name: self._state[name] for name in self._meta.slots}
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
        if self._log is not None:
            self._log.close()
            self._log = None
        self._weights = None
        self._state = {}
        self.owner = None
        if os.getpid() == self._owner:  # a forked child must not unlock its parent's table
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._release()

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

    # Files

    def _slot_path(self, name: str) -> Path:
        return self.path / f"state-{name}"

    def _meta_path(self, generation: int) -> Path:
        return self.path / f"meta-{generation}.json"

    def _undo_path(self, generation: int) -> Path:
        return self.path / f"undo-{generation}"

    def _opened(self) -> _Mapped:
        if self._weights is None:
            raise ValueError(f"the table {self.path} is closed: open it again with open_table")
        return self._weights

    def _sync_data(self) -> None:
        for mapped in (self._opened(), *self._state.values()):
            mapped.map.flush()
            _sync(mapped.path)

    def _clean(self) -> None:
        """Delete what neither this flush nor the one before needs."""
        g = self._meta.generation
        needed = {self._undo_path(g), self._undo_path(g - 1), self._meta_path(g - 1)}
        needed.update(mapped.path for mapped in self._state.values())
        for path in self.path.iterdir():
            if _OWN.fullmatch(path.name) and path not in needed:
                path.unlink()

    def _checked_slot(self, name: Any, entry: Any) -> _Slot:
        label = f"slots[{name!r}]"
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"slots has the name {name!r}: expected an identifier")
        if not isinstance(entry, tuple) or len(entry) != 3:
            raise TypeError(f"{label} is {entry!r}: expected a tuple of shape, dtype and first value")
        shape, dtype, first = entry
        if not isinstance(shape, tuple) or not shape or shape[0] != self.shape[0]:
            raise ValueError(f"{label} has shape {shape!r}: expected {self.shape[0]} rows")
        for size in shape:
            _check_size(size, f"a size of {label}")
        if not isinstance(first, int | float | np.integer | np.floating):
            raise TypeError(f"{label} has the first value {first!r}: expected a number")
        return _Slot(tuple(map(int, shape)), _slot_dtype(dtype, label))

    # Flush

    def _prepare(self, progress: dict[str, Any] | None) -> None:
        if self._unsynced:
            # the system takes pages for written after it failed to write them: trying again would not
            raise RuntimeError(
                f"{self.path} could not be written to the disk before: close it and open it again, which "
                "goes back to the last flush"
            )
        self._withdraw()
        self._unsynced = True
        self._sync_data()
        if self._log is not None:
            self._log.seal()
        self._unsynced = False
        slots = {name: _Slot(m.array.shape, m.array.dtype) for name, m in self._state.items()}
        following = self._meta._replace(slots=slots, generation=self._meta.generation + 1, progress=progress)
        for meta in (self._meta, following):
            _write(self._meta_path(meta.generation), meta.text())
        _sync(self.path)
        self._next = following

    def _withdraw(self) -> None:
        """Take back a prepare that no commit followed."""
        if self._next is not None:
            try:
                self._meta_path(self._next.generation).unlink()
            except FileNotFoundError:  # a commit was interrupted right after renaming it
                self._advance()
            self._next = None
        if self._log is not None:
            self._log.unseal()

    def _advance(self) -> None:
        """Begin the interval after the flush that was prepared."""
        assert self._next is not None
        self._former, self._meta, self._next = self._meta, self._next, None
        if self._log is not None:
            self._log.close()
            self._log = None
        self._kept = _bits(self.shape[0])

    # Undo log

    def _logged(self) -> list[np.ndarray]:
        """The arrays whose rows are logged; state newer than the last flush is discarded as a whole."""
        return [self.weights, *(self._state[name].array for name in self._meta.slots)]

    def _row_bytes(self) -> int:
        return 8 + sum(array.nbytes // self.shape[0] for array in self._logged())

    def _parts(self, payload: np.ndarray, count: int) -> Iterator[np.ndarray]:
        """Views of a record's bytes: the row numbers, then the rows of each logged array."""
        at = 0
        kinds = [((), np.dtype(np.int64)), *((a.shape[1:], a.dtype) for a in self._logged())]
        for shape, dtype in kinds:
            end = at + count * math.prod(shape) * dtype.itemsize
            yield payload[at:end].view(dtype).reshape(count, *shape)
            at = end

    def _not_kept(self, rows: np.ndarray) -> np.ndarray:
        return rows[(self._kept[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 == 0]

    def _keep(self, rows: np.ndarray) -> None:
        """Log a block of rows, which are sorted and not kept yet."""
        if not rows.size:
            return
        if self._log is None:
            self._log = _Log(self._undo_path(self._meta.generation))
        record = np.empty(_RECORD.size + rows.size * self._row_bytes(), np.uint8)
        numbers, *parts = self._parts(record[_RECORD.size :], rows.size)
        numbers[:] = rows
        for array, part in zip(self._logged(), parts, strict=True):
            np.take(array, rows, axis=0, out=part, mode="clip")  # which needs no second buffer
        self._log.append(record, rows.size)
        octets = rows >> 3
        starts = np.flatnonzero(np.diff(octets, prepend=-1))
        bits = np.left_shift(1, rows & 7).astype(np.uint8)
        self._kept[octets[starts]] |= np.bitwise_or.reduceat(bits, starts)

    def _recover(self) -> None:
        """Put the arrays back to the flush that meta.json tells of, and delete what is left over."""
        path = self._undo_path(self._meta.generation)
        if path.exists():
            for _ in self._records(path):  # damage shows before anything is written
                pass
            for rows, *parts in self._records(path):
                for array, part in zip(self._logged(), parts, strict=True):
                    array[rows] = part
            self._sync_data()
            path.unlink()
            _sync(self.path)
        self._clean()

    def _records(self, path: Path) -> Iterator[list[np.ndarray]]:
        """The whole records of a log; one cut short is the last, and its rows were not changed yet."""
        damaged = RuntimeError(f"{path} is damaged: the table can't be trusted, restore a copy of it")
        row_bytes = self._row_bytes()
        with open(path, "rb") as file:
            left = os.fstat(file.fileno()).st_size - _HEAD.size
            if left < 0:
                return
            head = file.read(_HEAD.size)
            magic, boot, sealed, crc = _HEAD.unpack(head)
            if magic != _HEAD_MAGIC or crc != zlib.crc32(head[:-4]):
                raise damaged
            if boot != _boot() and not sealed:
                raise RuntimeError(
                    f"{self.path} was in use when the machine stopped: it can't be trusted, restore a copy "
                    "of it"
                )
            while left >= _RECORD.size:
                header = file.read(_RECORD.size)
                magic, count, length, crc, header_crc = _RECORD.unpack(header)
                if magic != _RECORD_MAGIC or header_crc != zlib.crc32(header[:-4]):
                    raise damaged
                left -= _RECORD.size + length
                if left < 0:
                    return
                payload = np.fromfile(file, np.uint8, length)
                if length != count * row_bytes or crc != zlib.crc32(payload.data):
                    raise damaged
                yield list(self._parts(payload, count))


class _Log:
    """The undo log of one interval, while it is written.

    Raises:
        OSError: from any method; what was appended before is as it was.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self.close = weakref.finalize(self, os.close, self._descriptor)
        self._sealed = False
        self._end = _HEAD.size
        self._torn = False
        try:
            self._write_head(sealed=False)
            _sync(path.parent)
        except BaseException:
            self.close()
            raise

    def append(self, record: np.ndarray, count: int) -> None:
        """Write a record, whose rows are in place; its header is filled in here."""
        payload = record[_RECORD.size :]
        header = _RECORD.pack(_RECORD_MAGIC, count, payload.size, zlib.crc32(payload.data), 0)[:-4]
        record[: _RECORD.size] = np.frombuffer(header + zlib.crc32(header).to_bytes(4, "little"), np.uint8)
        if self._torn:
            os.ftruncate(self._descriptor, self._end)
        self._torn = True
        self._write(record.data, self._end)
        self._end += record.size
        self._torn = False

    def seal(self) -> None:
        """Bring the log to the disk, and only then say so in it."""
        os.fsync(self._descriptor)
        self._sealed = True
        self._write_head(sealed=True)

    def unseal(self) -> None:
        """Say that records may follow that are not on the disk."""
        if self._sealed:
            self._write_head(sealed=False)
            self._sealed = False

    def _write_head(self, *, sealed: bool) -> None:
        head = _HEAD.pack(_HEAD_MAGIC, _boot(), sealed, 0)[:-4]
        self._write(memoryview(head + zlib.crc32(head).to_bytes(4, "little")), 0)
        os.fsync(self._descriptor)

    def _write(self, content: memoryview, at: int) -> None:
        while content:
            written = os.pwrite(self._descriptor, content, at)
            content, at = content[written:], at + written


def _create(target: Path, meta: _Meta, init: Callable[[int, int], Any] | None) -> None:
    """Build a table beside ``target``, bring it to the disk, and rename it."""
    try:
        outer = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=TEMPORARY, dir=target.parent))
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(target)) from error
    try:
        folder = outer / target.name
        folder.mkdir()  # with the permissions of a new folder; the temporary one is private
        if init is None:
            _fill(folder / _WEIGHTS, meta.weights, 0.0)
        else:
            _fill_by(folder / _WEIGHTS, meta.weights, init)
        _sync(folder / _WEIGHTS)
        _write(folder / _META, meta.text())
        _sync(folder)
        os.rename(folder, target)
    finally:
        shutil.rmtree(outer, ignore_errors=True)
    _sync(target.parent)


def _fill(path: Path, slot: _Slot, value: float) -> None:
    """Write a new file whose elements all are ``value``; 0 takes no space on the disk."""
    with open(path, "xb") as file:
        if not value:
            file.truncate(slot.nbytes)
            return
        rows = slot.shape[0]
        step = _rows_of(FILL_BYTES, slot.nbytes // rows)
        block = np.full((min(step, rows), *slot.shape[1:]), value, slot.dtype)
        for first in range(0, rows, step):
            file.write(block[: rows - first].data)


def _fill_by(path: Path, slot: _Slot, init: Callable[[int, int], Any]) -> None:
    rows, dim = slot.shape
    step = _rows_of(FILL_BYTES, slot.nbytes // rows)
    with open(path, "xb") as file:
        for first in range(0, rows, step):
            last = min(first + step, rows)
            label = f"init({first}, {last})"
            block = arrays.host_array(init(first, last), label)
            if block.shape != (last - first, dim):
                raise ValueError(f"{label} has shape {block.shape}: expected {(last - first, dim)}")
            if not np.can_cast(block.dtype, slot.dtype, "same_kind"):
                raise TypeError(f"{label} has dtype {block.dtype}: expected {slot.dtype}")
            with np.errstate(over="ignore"):
                block = np.ascontiguousarray(block, slot.dtype)
            if not np.isfinite(block).all():
                raise ValueError(f"{label} holds NaN or infinity in {slot.dtype}: expected finite numbers")
            file.write(block.data)


def _map(path: Path, slot: _Slot) -> _Mapped:
    with open(path, "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if size != slot.nbytes:
            raise ValueError(f"{path} has {size} bytes: expected {slot.nbytes}, of {slot}")
        map_ = mmap.mmap(file.fileno(), slot.nbytes)
    if hasattr(map_, "madvise"):
        map_.madvise(mmap.MADV_RANDOM)  # reading ahead would fetch rows that nobody asked for
    return _Mapped(path, map_, np.ndarray(slot.shape, slot.dtype, map_))


def _lock(folder: Path) -> int:
    """A descriptor with the table's lock, which the system drops when the process ends."""
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise BlockingIOError(
            errno.EWOULDBLOCK, "the table is open already, here or in another process: close it there",
            str(folder),
        ) from error  # fmt: skip
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _read_meta(path: Path) -> _Meta:
    text = path.read_text(encoding="utf-8")
    try:
        stored = json.loads(text)
        if stored["format"] != FORMAT:
            raise ValueError(f"it has format {stored['format']}, expected {FORMAT}")
        slots = {
            name: _Slot(tuple(slot["shape"]), _slot_dtype(slot["dtype"], f"the state {name!r}"))
            for name, slot in stored["slots"].items()
        }
        dtype = _checked_dtype(stored["dtype"], "it")
        return _Meta(stored["rows"], stored["dim"], dtype, slots, stored["generation"], stored["progress"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not as open_table wrote it: {error!r}") from error


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _boot() -> bytes:
    """What differs from one start of the machine to the next, where the system tells."""
    try:
        return _BOOT_ID.read_bytes().strip()[:36].ljust(36)
    except OSError:
        return b"unknown".ljust(36)


def _bits(rows: int) -> np.ndarray:
    """A bit for each row; zeros come from the system unread, so it costs what is touched of it."""
    return np.zeros((rows + 7) // 8, np.uint8)


def _rows_of(size: int, row_bytes: int) -> int:
    return max(1, size // row_bytes)


def _check_size(value: Any, label: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{label} is {value!r}: expected a whole number, at least 1")


def _checked_dtype(value: Any, label: str) -> np.dtype:
    try:
        dtype = np.dtype(value)
    except TypeError as error:
        raise TypeError(f"{label} has dtype {value!r}: expected float32 or float64") from error
    if dtype not in arrays.DTYPES:
        raise TypeError(f"{label} has dtype {dtype}: expected float32 or float64")
    return dtype


def _slot_dtype(value: Any, label: str) -> np.dtype:
    """float32, float64 or bfloat16, int64 for counters, or uint8 for codes."""
    found = [dtype for dtype in _SLOT_DTYPES if value == dtype]
    return found[0] if found else _checked_dtype(value, label)


def _text(dtype: np.dtype) -> str:
    """A dtype in words that NumPy knows; the letters of bfloat16 it does not."""
    return dtype.name if dtype in arrays.LOW_DTYPES else dtype.str


def _listed(slots: Mapping[str, _Slot]) -> str:
    return ", ".join(f"{name} {slot}" for name, slot in slots.items()) or "none"
