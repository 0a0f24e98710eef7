"""The folder of a table: its lock, the names of its files, and arrays that are the content of a file."""

import errno
import fcntl
import mmap
import os
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastopt._core.files import sync
from fastopt.tables.meta import Slot

META, WEIGHTS = "meta.json", "weights"
FILL_BYTES = 8 << 20  # of the blocks in which new files are filled
_OWN = re.compile(r"(undo-\d+|meta-\d+\.json|state-\w+)")  # what may be left over from earlier


class Folder:
    """A table's folder, locked until :meth:`release`, until nobody refers to it, or the process ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._process = os.getpid()
        self._close = weakref.finalize(self, os.close, self._lock)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException as error:
            self._close()
            if not isinstance(error, BlockingIOError):
                raise
            message = "the table is open already, here or in another process: close it there"
            raise BlockingIOError(errno.EWOULDBLOCK, message, str(path)) from error

    def release(self) -> None:
        """Unlock it; called once."""
        if os.getpid() == self._process:  # a forked child must not unlock its parent's table
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._close()

    def state(self, name: str) -> Path:
        return self.path / f"state-{name}"

    def meta(self, generation: int) -> Path:
        return self.path / f"meta-{generation}.json"

    def undo(self, generation: int) -> Path:
        return self.path / f"undo-{generation}"

    def make_state(self, slots: Mapping[str, Slot], values: Mapping[str, float]) -> "dict[str, Mapped]":
        """New state arrays, each filled with its value; after an exception there are none."""
        try:
            for name, slot in slots.items():
                fill(self.state(name), slot, values[name])
            return {name: map_file(self.state(name), slot) for name, slot in slots.items()}
        except BaseException:
            for name in slots:
                self.state(name).unlink(missing_ok=True)
            raise

    def clean(self, generation: int, state: Iterable[str]) -> None:
        """Delete what neither the flush of this number nor the one before needs."""
        needed = {self.undo(generation), self.undo(generation - 1), self.meta(generation - 1)}
        needed.update(self.state(name) for name in state)
        for path in self.path.iterdir():
            if _OWN.fullmatch(path.name) and path not in needed:
                path.unlink()


class Mapped(NamedTuple):
    """A file and an array that is its content."""

    path: Path
    map: mmap.mmap
    array: np.ndarray

    @property
    def slot(self) -> Slot:
        return Slot(self.array.shape, self.array.dtype)

    def sync(self) -> None:
        self.map.flush()
        sync(self.path)


def map_file(path: Path, slot: Slot) -> Mapped:
    with open(path, "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if size != slot.nbytes:
            raise ValueError(f"{path} has {size} bytes: expected {slot.nbytes}, of {slot}")
        map_ = mmap.mmap(file.fileno(), slot.nbytes)
    if hasattr(map_, "madvise"):
        map_.madvise(mmap.MADV_RANDOM)  # reading ahead would fetch rows that nobody asked for
    return Mapped(path, map_, np.ndarray(slot.shape, slot.dtype, map_))


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
    rows, step = slot.shape[0], _step(slot)
    with open(path, "xb") as file:
        for first in range(0, rows, step):
            file.write(block(first, min(first + step, rows)).data)


def _step(slot: Slot) -> int:
    """How many rows are filled at once."""
    return max(1, FILL_BYTES * slot.shape[0] // slot.nbytes)
