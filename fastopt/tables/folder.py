"""The folder of a table: its lock, and the names of its files."""

import errno
import fcntl
import os
import re
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path

from fastopt.tables.files import check_file, open_file
from fastopt.tables.mapped import Mapped, fill
from fastopt.tables.meta import Slot

META, WEIGHTS, LOCK = "meta.json", "weights", "lock"
_OWN = re.compile(r"(undo-\d+|sums-\d+|meta-\d+\.json|state-\w+)")  # what may be left over from earlier


class Paths:
    """The files of the table in the folder ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def state(self, name: str) -> Path:
        return self.path / f"state-{name}"

    def meta(self, generation: int) -> Path:
        return self.path / f"meta-{generation}.json"

    def undo(self, generation: int) -> Path:
        return self.path / f"undo-{generation}"

    def sums(self, generation: int) -> Path:
        return self.path / f"sums-{generation}"


class Folder(Paths):
    """A table's folder, locked until :meth:`release`, until nobody refers to it, or the process ends.

    Raises:
        ValueError: a file of a table is no regular one.
        BlockingIOError: it is locked already.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._process = os.getpid()
        self._lock = open_file(path / LOCK, os.O_RDWR | os.O_CREAT)
        self._close = weakref.finalize(self, os.close, self._lock)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = "the table is open already, here or in another process: close it there"
            raise BlockingIOError(errno.EWOULDBLOCK, message, str(path)) from error
        for entry in os.scandir(path):
            if entry.name in (META, WEIGHTS) or _OWN.fullmatch(entry.name):
                check_file(path / entry.name, entry.stat(follow_symlinks=False))

    @property
    def is_own(self) -> bool:
        """Whether this process opened it, and is no forked child."""
        return os.getpid() == self._process

    def release(self) -> None:
        """Unlock it; a forked child lets go of it and leaves it locked for its parent."""
        if self._close.alive and self.is_own:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._close()

    def make_state(self, slots: Mapping[str, Slot], values: Mapping[str, float]) -> dict[str, Mapped]:
        """New state arrays, each filled with its value, in place of what an interrupted call may have left;
        after an error there are none."""
        try:
            for name, slot in slots.items():
                self.state(name).unlink(missing_ok=True)
                fill(self.state(name), slot, values[name])
            return {name: Mapped(self.state(name), slot) for name, slot in slots.items()}
        except BaseException:
            self.drop_state(slots)
            raise

    def drop_state(self, names: Iterable[str]) -> None:
        for name in names:
            self.state(name).unlink(missing_ok=True)

    def clean(self, generation: int, state: Iterable[str]) -> None:
        """Delete what neither the flush of this number nor the one before needs."""
        needed = {self.meta(generation - 1)}
        needed.update(kind(n) for kind in (self.undo, self.sums) for n in (generation, generation - 1))
        needed.update(self.state(name) for name in state)
        for path in self.path.iterdir():
            if _OWN.fullmatch(path.name) and path not in needed:
                path.unlink(missing_ok=True)
