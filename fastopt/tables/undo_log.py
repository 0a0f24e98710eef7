"""The undo log: what the rows that changed since a flush held before.

A file of a head and a record for each block of rows: their numbers, then the rows of each array. The head
says where the last record ends; rows change only after it does. So a shorter file was cut, and what follows
that end is a record whose writing did not end, and whose rows are as they were.
"""

import functools
import math
import os
import struct
import weakref
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastopt._core.files import sync
from fastopt.kernels.at_once import at_once
from fastopt.tables.files import open_file, write, write_file

LOG_BYTES = 1 << 20  # of a record at most, unless a row is larger: small enough to stay in the cache
_HEAD = struct.Struct("<8s36s?qqI")  # magic, boot id, whether all is on the disk, generation, end, CRC
_HEAD_MAGIC = b"fastlog2"
_FIRST_HEAD = struct.Struct("<8s36s?I")  # that of the first format, which does not say where the records end
_FIRST_MAGIC = b"fastlog1"
_RECORD = struct.Struct("<8sqqII")  # magic, rows, bytes that follow, CRC of those, CRC of these
_RECORD_MAGIC = b"undorows"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class UndoLog:
    """Rows of arrays [rows, ...] as they were at a flush.

    Args:
        path: of the file. Where ``expected``, a flush left it there.
        generation: the number of the flush.
        arrays: those that are logged.
    """

    def __init__(
        self, path: Path, generation: int, arrays: Sequence[np.ndarray], *, expected: bool = True
    ) -> None:
        self.path = path
        self._generation = generation
        self._arrays = arrays
        self._expected = expected
        self._rows = len(arrays[0])
        self._row_bytes = 8 + sum(array.nbytes // self._rows for array in arrays)
        # A bit for each row; zeros come from the system unread, so they cost what is touched of them.
        self._kept = np.zeros((self._rows + 7) // 8, np.uint8)
        self._descriptor = -1  # of the file
        self._end = _HEAD.size
        self._sealed = False
        self._found_sealed = True  # the file of an earlier run, once it was read

    @property
    def begun(self) -> bool:
        """Whether rows were kept."""
        return self._descriptor >= 0

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Those of the rows that are not kept yet, sorted, each once."""
        new = np.sort(rows[(self._kept[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 == 0])
        if new.size > 1 and not (new[1:] > new[:-1]).all():
            new = np.unique(new)
        return new

    def kept_rows(self) -> np.ndarray:
        """All rows that are kept."""
        octets = np.flatnonzero(self._kept)
        bits = np.unpackbits(self._kept[octets], bitorder="little").reshape(-1, 8)
        at, bit = np.nonzero(bits)
        return octets[at] * 8 + bit

    def keep(self, rows: np.ndarray | None) -> None:
        """Log what rows hold, as :meth:`missing` returned them; None for all.

        After an exception the log is as it was, but for whole records that were written before it.
        """
        step = max(1, LOG_BYTES // self._row_bytes)
        if rows is None:
            for first in range(0, self._rows, step):
                self._append(self.missing(np.arange(first, min(first + step, self._rows))))
            return
        for first in range(0, rows.size, step):
            self._append(rows[first : first + step])

    def seal(self) -> None:
        """Say that all of it is on the disk, once :meth:`syncing` was."""
        if self.begun:
            self._sealed = True  # as it may be from here on
            self._write_head(sealed=True)

    def unseal(self) -> None:
        """Say that records may follow that are not on the disk."""
        if self._sealed:
            self._write_head(sealed=False)
            self._sealed = False

    def syncing(self) -> tuple[partial[None], ...]:
        """The calls that bring the records to the disk."""
        return (partial(os.fsync, self._descriptor),) if self.begun else ()

    def close(self) -> None:
        """Release the file and the arrays."""
        if self.begun:
            self._release()
        self._descriptor, self._arrays = -1, []

    def reset(self) -> None:
        """Say in the file of an earlier run that its rows are restored, and on the disk."""
        if not self._expected and not _is_current(self.path):
            self.path.unlink()
            return
        descriptor = open_file(self.path, os.O_RDWR)
        try:
            write(descriptor, memoryview(_head(self._generation, _HEAD.size, sealed=True)), 0)
            os.fsync(descriptor)
            os.ftruncate(descriptor, _HEAD.size)
        finally:
            os.close(descriptor)

    def _append(self, rows: np.ndarray) -> None:
        """Log a block of rows, which are sorted and not kept yet."""
        if not rows.size:
            return
        if not self.begun:
            self._begin()
        record = np.empty(_RECORD.size + rows.size * self._row_bytes, np.uint8)
        payload = record[_RECORD.size :]
        numbers, *parts = self._parts(payload, rows.size)
        numbers[:] = rows
        for array, part in zip(self._arrays, parts, strict=True):
            np.take(array, rows, axis=0, out=part, mode="clip")  # which needs no second buffer
        header = _stamped(_RECORD, _RECORD_MAGIC, rows.size, payload.size, zlib.crc32(payload.data))
        record[: _RECORD.size] = np.frombuffer(header, np.uint8)
        write(self._descriptor, record.data, self._end)
        end = self._end + record.size
        octets = rows >> 3
        starts = np.flatnonzero(np.diff(octets, prepend=-1))
        bits = np.bitwise_or.reduceat(np.left_shift(1, rows & 7).astype(np.uint8), starts)
        octets = octets[starts]
        # The head is within one page, so that a kill can't come between its bytes.
        at_once(
            (
                partial(os.pwrite, self._descriptor, _head(self._generation, end, sealed=False), 0),
                partial(setattr, self, "_end", end),
                partial(self._kept.__setitem__, octets, self._kept[octets] | bits),
            )
        )

    def _begin(self) -> None:
        """Say on the disk, before the first row changes, that rows may have changed."""
        descriptor = open_file(self.path, os.O_RDWR | os.O_CREAT)
        release = weakref.finalize(self, os.close, descriptor)
        try:
            write(descriptor, memoryview(_head(self._generation, _HEAD.size, sealed=False)), 0)
            os.fsync(descriptor)
            sync(self.path.parent)
        except BaseException:
            release()
            raise
        self._release, self._end = release, _HEAD.size
        self._descriptor = descriptor

    def _write_head(self, *, sealed: bool) -> None:
        write(self._descriptor, memoryview(_head(self._generation, self._end, sealed=sealed)), 0)
        os.fsync(self._descriptor)

    def _parts(self, payload: np.ndarray, count: int) -> Iterator[np.ndarray]:
        """Views of a record's bytes: the row numbers, then the rows of each array."""
        at = 0
        for shape, dtype in ((), np.dtype(np.int64)), *((a.shape[1:], a.dtype) for a in self._arrays):
            end = at + count * math.prod(shape) * dtype.itemsize
            yield payload[at:end].view(dtype).reshape(count, *shape)
            at = end

    # Reading

    def check(self) -> bool:
        """Whether the file is other than that of a flush which no row was kept after.

        Raises:
            RuntimeError: it is damaged, cut short or missing, or of a machine that stopped.
        """
        seen = np.zeros(self._rows, bool)
        empty = True
        for rows, *_ in self.records():
            empty = False
            if rows[0] < 0 or rows[-1] >= self._rows or not (rows[1:] > rows[:-1]).all() or seen[rows].any():
                raise self._damaged(f"a record holds rows twice, or others than 0 to {self._rows - 1}")
            seen[rows] = True
        return not (empty and self._found_sealed)

    def records(self) -> Iterator[list[np.ndarray]]:
        """The row numbers and the rows of each array, record by record."""
        if not self.path.exists():
            if self._expected:
                raise self._damaged("it is missing")
            return
        with open(open_file(self.path, os.O_RDONLY), "rb") as file:
            at, end = self._extent(file.read(_HEAD.size), os.fstat(file.fileno()).st_size)
            file.seek(at)
            while end is None or at < end:
                header = file.read(_RECORD.size)
                if len(header) < _RECORD.size:
                    if end is None:
                        return
                    raise self._damaged("a record is cut short")
                magic, count, length, crc, header_crc = _RECORD.unpack(header)
                if magic != _RECORD_MAGIC or header_crc != zlib.crc32(header[:-4]):
                    raise self._damaged("the head of a record is not as it was written")
                if count < 1 or length != count * self._row_bytes:
                    raise self._damaged(f"a record of {count} rows has {length} bytes")
                left = os.fstat(file.fileno()).st_size - at - _RECORD.size
                if length > left and end is None:
                    return  # cut by a kill; its rows were not changed yet
                # Not by np.fromfile, which takes the exception of a signal handler for one of its own.
                payload = np.empty(min(length, left), np.uint8)
                file.readinto(payload.data)
                if crc != zlib.crc32(payload.data):
                    raise self._damaged("a record is not as it was written")
                at += _RECORD.size + length
                yield list(self._parts(payload, count))

    def _extent(self, head: bytes, size: int) -> tuple[int, int | None]:
        """Where the records begin, and where they end; in the first format, None: where the file does."""
        self._found_sealed = False
        if not self._expected and size < _FIRST_HEAD.size:
            return 0, 0  # a kill came before the head was written
        end: int | None = None
        if head[:8] == _FIRST_MAGIC and not self._expected:
            layout, head = _FIRST_HEAD, head[: _FIRST_HEAD.size]
            _, boot, sealed, crc = layout.unpack(head)
        elif head[:8] == _HEAD_MAGIC and len(head) == _HEAD.size:
            layout = _HEAD
            _, boot, sealed, generation, end, crc = layout.unpack(head)
        else:
            raise self._damaged("it has no head")
        if crc != zlib.crc32(head[:-4]):
            raise self._damaged("its head is not as it was written")
        if end is not None:
            if generation != self._generation:
                raise self._damaged(f"it is that of flush {generation}, not {self._generation}")
            if not layout.size <= end <= size:
                raise self._damaged(f"it has {size} bytes, expected {end}: it was cut")
        if boot != _boot() and not sealed:
            raise RuntimeError(
                f"{self.path.parent} was in use when the machine stopped: it can't be trusted, restore a "
                "copy of it"
            )
        self._found_sealed = sealed
        return layout.size, end

    def _damaged(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"{self.path} is damaged: {what}; the table can't be trusted, restore a copy of it"
        )


def write_empty(path: Path, generation: int) -> None:
    """Write the file of a flush that no row was kept after."""
    write_file(path, _head(generation, _HEAD.size, sealed=True))


def _head(generation: int, end: int, *, sealed: bool) -> bytes:
    return _stamped(_HEAD, _HEAD_MAGIC, _boot(), sealed, generation, end)


def _is_current(path: Path) -> bool:
    with open(open_file(path, os.O_RDONLY), "rb") as file:
        return file.read(8) == _HEAD_MAGIC


def checked_rows(rows: Any, count: int) -> np.ndarray:
    """Row numbers as a caller passes them, in int64."""
    if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "iu":
        got = f"dtype {rows.dtype}" if isinstance(rows, np.ndarray) else f"type {type(rows).__name__}"
        raise TypeError(f"rows has {got}: expected an array of whole numbers, as np.int64")
    if rows.ndim != 1:
        raise ValueError(f"rows has shape {rows.shape}: expected one dimension")
    for row in (rows.min(), rows.max()) if rows.size else ():
        if not 0 <= row < count:
            raise ValueError(f"rows holds {row}: expected row numbers from 0 to {count - 1}")
    return rows.astype(np.int64, copy=False)


def _stamped(layout: struct.Struct, *fields: Any) -> bytes:
    """The fields, then the CRC of them."""
    content = layout.pack(*fields, 0)[:-4]
    return content + zlib.crc32(content).to_bytes(4, "little")


def _boot() -> bytes:
    """What differs from one start of the machine to the next, where the system tells."""
    return _boot_id(_BOOT_ID)


@functools.cache  # each record that is logged writes a head with it
def _boot_id(path: Path) -> bytes:
    try:
        return path.read_bytes().strip()[:36].ljust(36)
    except OSError:
        return b"unknown".ljust(36)
