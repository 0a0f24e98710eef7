"""Arrays that are the content of a file, on blocks of the disk that are reserved before they are written."""

import errno
import mmap
import os
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from fastopt.tables.files import open_file, write
from fastopt.tables.meta import Slot

FILL_BYTES = 8 << 20  # of the blocks in which new files are filled
_UNSUPPORTED = errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL


class Mapped:
    """A file, and an array that is its content.

    A page of a sparse file has no block on the disk until it is written. Where the disk is full then, a write
    by the array ends the process by SIGBUS; so blocks are reserved by a call that returns an error, before.

    Attributes:
        path; array; slot: its shape and dtype.
    """

    def __init__(self, path: Path, slot: Slot) -> None:
        self.path, self.slot = path, slot
        try:
            self._file = open_file(path, os.O_RDWR)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
                raise ValueError(f"{path} is missing: expected {slot}, as meta.json tells") from error
            raise
        weakref.finalize(self, os.close, self._file)
        size = os.fstat(self._file).st_size
        if size != slot.nbytes:
            raise ValueError(f"{path} has {size} bytes: expected {slot.nbytes}, of {slot}")
        self._map = mmap.mmap(self._file, slot.nbytes)
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_RANDOM)  # reading ahead would fetch rows that nobody asked for
        self.array = np.ndarray(slot.shape, slot.dtype, self._map)
        self._row_bytes = slot.nbytes // slot.shape[0]
        # Which pages are known to have blocks, None for all. Zeros cost what is touched of them.
        self._reserved = None if self._is_whole() else np.zeros(-(-slot.nbytes // mmap.PAGESIZE), bool)

    def _is_whole(self) -> bool:
        """Whether the file has no holes, as far as the system tells."""
        try:
            return os.lseek(self._file, 0, os.SEEK_HOLE) >= self.slot.nbytes
        except (AttributeError, OSError):
            return False

    def reserve(self, rows: np.ndarray | None) -> None:
        """Have blocks on the disk for rows (sorted; None for all) that are about to be written.

        Raises:
            OSError: there is no room.
        """
        reserved = self._reserved
        if reserved is None:
            return
        if rows is None:
            self._reserve_all()
            return
        first = rows * self._row_bytes
        last = (first + (self._row_bytes - 1)) // mmap.PAGESIZE
        first //= mmap.PAGESIZE
        # A row's inner pages are reserved with it; the outer ones may have been, with its neighbours.
        known = reserved[first] & reserved[last] & reserved[np.minimum(first + 1, last)]
        if known.all():
            return
        first, last = first[~known], last[~known]
        breaks = np.flatnonzero(first[1:] > last[:-1] + 1)
        starts = first[np.concatenate([[0], breaks + 1])].tolist()
        ends = last[np.concatenate([breaks, [-1]])].tolist()
        for start, end in zip(starts, ends, strict=True):
            self._allocate(start * mmap.PAGESIZE, min((end + 1) * mmap.PAGESIZE, self.slot.nbytes))
            reserved[start : end + 1] = True

    def _reserve_all(self) -> None:
        size = self.slot.nbytes
        disk, used = os.fstatvfs(self._file), os.fstat(self._file).st_blocks * 512
        if size - used > disk.f_bavail * disk.f_frsize:  # which trying would fill up
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._allocate(0, size)
        self._reserved = None

    def _allocate(self, start: int, end: int) -> None:
        try:
            if hasattr(os, "posix_fallocate"):
                try:
                    os.posix_fallocate(self._file, start, end - start)
                    return
                except OSError as error:
                    if error.errno not in _UNSUPPORTED:
                        raise
            for at in range(start, end, FILL_BYTES):  # what is written has blocks too
                content = os.pread(self._file, min(FILL_BYTES, end - at), at)
                write(self._file, memoryview(content), at)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self.path)) from error

    def restore(self, rows: np.ndarray, content: np.ndarray) -> None:
        """Write rows (sorted), by calls that return an error, and of them only what differs: that has blocks
        on the disk already, since it was written."""
        wanted = content.reshape(len(rows), -1).view(np.uint8)
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for start, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
            at, size = int(rows[start]) * self._row_bytes, (end - start) * self._row_bytes
            found = np.frombuffer(self.read(at, size), np.uint8).reshape(end - start, -1)
            differing = found != wanted[start:end]
            for row in np.flatnonzero(differing.any(axis=1)).tolist():
                places = np.flatnonzero(differing[row])
                low, high = int(places[0]), int(places[-1]) + 1
                part = np.ascontiguousarray(wanted[start + row, low:high])
                write(self._file, part.data, at + row * self._row_bytes + low)

    def read(self, at: int, size: int) -> bytes:
        """Bytes of the file, read by calls: reading a hole by the array takes a page of some file systems."""
        parts = []
        while size:
            part = os.pread(self._file, size, at)
            if not part:
                raise ValueError(f"{self.path} became shorter while the table was open")
            parts.append(part)
            at, size = at + len(part), size - len(part)
        return b"".join(parts)

    def syncing(self) -> tuple[Callable[[], object], ...]:
        """The calls that bring it to the disk."""
        return self._map.flush, partial(os.fsync, self._file)


def fill(path: Path, slot: Slot, value: float) -> None:
    """Write a new file whose elements all are ``value``; 0 takes no space on the disk."""
    if value:
        block = np.full((min(_step(slot), slot.shape[0]), *slot.shape[1:]), value, slot.dtype)
        fill_by(path, slot, lambda first, last: block[: last - first])
    else:
        with open(path, "xb") as file:
            file.truncate(slot.nbytes)


def fill_by(path: Path, slot: Slot, block: Callable[[int, int], np.ndarray]) -> None:
    """Write a new file of the rows that ``block(first, last)`` returns."""
    with open(path, "xb") as file:
        for first, last in blocks(slot):
            file.write(block(first, last).data)


def blocks(slot: Slot) -> list[tuple[int, int]]:
    """The rows that are filled, or read, at once."""
    step = _step(slot)
    return [(first, min(first + step, slot.shape[0])) for first in range(0, slot.shape[0], step)]


def _step(slot: Slot) -> int:
    return max(1, FILL_BYTES * slot.shape[0] // slot.nbytes)
