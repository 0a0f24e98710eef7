"""The undo log: what the rows that changed since a flush held before.

A file of a head and a record for each block of rows: their numbers, then the rows of each array.
"""

import math
import os
import struct
import weakref
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastopt._core.files import sync

LOG_BYTES = 1 << 20  # of a record at most, unless a row is larger: small enough to stay in the cache
_HEAD = struct.Struct("<8s36s?I")  # magic, boot id, whether all records are on the disk, CRC of these
_HEAD_MAGIC = b"fastlog1"
_RECORD = struct.Struct("<8sqqII")  # magic, rows, bytes that follow, CRC of those, CRC of these
_RECORD_MAGIC = b"undorows"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class UndoLog:
    """Rows of arrays [rows, ...] as they were at a flush; the file is begun when the first one is kept."""

    def __init__(self, path: Path, arrays: Sequence[np.ndarray]) -> None:
        self.path = path
        self._arrays = arrays
        self._rows = len(arrays[0])
        self._row_bytes = 8 + sum(array.nbytes // self._rows for array in arrays)
        # A bit for each row; zeros come from the system unread, so they cost what is touched of them.
        self._kept = np.zeros((self._rows + 7) // 8, np.uint8)
        self._descriptor = -1  # of the file
        self._end = 0
        self._sealed = self._torn = False

    @property
    def begun(self) -> bool:
        """Whether rows were kept."""
        return self._descriptor >= 0

    def keep(self, rows: np.ndarray | None) -> None:
        """Log what rows hold (row numbers in any order, each once; None for all), each only the first time.

        After an ``OSError`` the log is as it was, but for whole records that were written before it.
        """
        step = max(1, LOG_BYTES // self._row_bytes)
        if rows is None:
            for first in range(0, self._rows, step):
                self._append(self._not_kept(np.arange(first, min(first + step, self._rows))))
            return
        new = np.sort(self._not_kept(rows))  # in the order of the pages
        for first in range(0, new.size, step):
            self._append(new[first : first + step])

    def seal(self) -> None:
        """Bring the log to the disk, and only then say so in it."""
        if self.begun:
            os.fsync(self._descriptor)
            self._sealed = True
            _write_head(self._descriptor, sealed=True)

    def unseal(self) -> None:
        """Say that records may follow that are not on the disk."""
        if self._sealed:
            _write_head(self._descriptor, sealed=False)
            self._sealed = False

    def close(self) -> None:
        """Release the file and the arrays."""
        if self.begun:
            self._release()
        self._descriptor, self._arrays = -1, []

    def restore(self) -> None:
        """Put the arrays back to what the file of an earlier run holds; if damaged, raise RuntimeError."""
        for _ in self._records():  # damage shows before anything is written
            pass
        for rows, *parts in self._records():
            for array, part in zip(self._arrays, parts, strict=True):
                array[rows] = part

    def _not_kept(self, rows: np.ndarray) -> np.ndarray:
        return rows[(self._kept[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 == 0]

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
        if self._torn:
            os.ftruncate(self._descriptor, self._end)
        self._torn = True
        _write(self._descriptor, record.data, self._end)
        self._end += record.size
        self._torn = False
        octets = rows >> 3
        starts = np.flatnonzero(np.diff(octets, prepend=-1))
        bits = np.left_shift(1, rows & 7).astype(np.uint8)
        self._kept[octets[starts]] |= np.bitwise_or.reduceat(bits, starts)

    def _begin(self) -> None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        release = weakref.finalize(self, os.close, descriptor)
        try:
            _write_head(descriptor, sealed=False)
            sync(self.path.parent)
        except BaseException:
            release()
            raise
        self._release, self._descriptor, self._end = release, descriptor, _HEAD.size

    def _parts(self, payload: np.ndarray, count: int) -> Iterator[np.ndarray]:
        """Views of a record's bytes: the row numbers, then the rows of each array."""
        at = 0
        for shape, dtype in ((), np.dtype(np.int64)), *((a.shape[1:], a.dtype) for a in self._arrays):
            end = at + count * math.prod(shape) * dtype.itemsize
            yield payload[at:end].view(dtype).reshape(count, *shape)
            at = end

    def _records(self) -> Iterator[list[np.ndarray]]:
        """The parts of the whole records; one cut short is the last, and its rows were not changed yet."""
        damaged = RuntimeError(f"{self.path} is damaged: the table can't be trusted, restore a copy of it")
        with open(self.path, "rb") as file:
            left = os.fstat(file.fileno()).st_size - _HEAD.size
            if left < 0:
                return
            head = file.read(_HEAD.size)
            magic, boot, sealed, crc = _HEAD.unpack(head)
            if magic != _HEAD_MAGIC or crc != zlib.crc32(head[:-4]):
                raise damaged
            if boot != _boot() and not sealed:
                raise RuntimeError(
                    f"{self.path.parent} was in use when the machine stopped: it can't be trusted, restore a "
                    "copy of it"
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
                if length != count * self._row_bytes or crc != zlib.crc32(payload.data):
                    raise damaged
                yield list(self._parts(payload, count))


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


def _write_head(descriptor: int, *, sealed: bool) -> None:
    _write(descriptor, memoryview(_stamped(_HEAD, _HEAD_MAGIC, _boot(), sealed)), 0)
    os.fsync(descriptor)


def _write(descriptor: int, content: memoryview, at: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, at)
        content, at = content[written:], at + written


def _stamped(layout: struct.Struct, *fields: Any) -> bytes:
    """The fields, then the CRC of them."""
    content = layout.pack(*fields, 0)[:-4]
    return content + zlib.crc32(content).to_bytes(4, "little")


def _boot() -> bytes:
    """What differs from one start of the machine to the next, where the system tells."""
    try:
        return _BOOT_ID.read_bytes().strip()[:36].ljust(36)
    except OSError:
        return b"unknown".ljust(36)
