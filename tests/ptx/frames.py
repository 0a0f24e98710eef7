"""The registers and whatever else threads have of their own, kept from launch to launch of a kernel."""

from collections.abc import Callable

import numpy as np

from . import checked as m
from .program import Program

WORDS = 8  # that one instruction may load or store
EVERY = np.uint64(0xFFFFFFFF)


class Frame:
    """Of ``count`` blocks of ``block`` threads that run at once."""

    def __init__(self, program: Program, block: int, count: int):
        self.threads = block * count
        self._block = block
        self.tid, self.blocks = np.tile(np.arange(block), count), np.repeat(np.arange(count), block)
        self.lanes = self.tid % 32
        self.of_threads = np.zeros((4, self.threads), np.int64)  # rows of checked.py
        self.of_threads[m.BLOCK] = self.blocks
        self.words = np.zeros((WORDS, self.threads), np.uint64)
        self._low: dict[tuple[int, np.dtype], np.ndarray] = {}
        self._columns = program.columns
        self._file = program.columns.file(self.threads)
        self.columns: list | None = None

    def start(self, first: int, grid: int, params: np.ndarray) -> None:
        """Blocks from ``first`` on begin."""
        file = self._file
        file.special, file.params = self._special(first, grid), params
        if self.columns is None:
            self.columns = self._columns.fill(file)
        else:
            file.clear()
            self._columns.refill(file, self.columns)
        self.of_threads[m.NUMBER] = self.tid + (self.blocks + first) * self._block
        self.of_threads[m.EPOCH :] = 1

    def low(self, row: int, dtype: np.dtype) -> np.ndarray:
        """A row of ``words`` as numbers of a type, their low parts."""
        key = row, dtype
        if key not in self._low:
            self._low[key] = self.words[row].view(dtype)[:: 8 // dtype.itemsize]
        return self._low[key]

    def _special(self, first: int, grid: int) -> Callable[[str], np.ndarray]:
        """What special registers hold."""

        def special(name: str) -> np.ndarray:
            one = np.uint64(1) << self.lanes.astype(np.uint64)
            values = {
                "%tid.x": self.tid,
                "%ctaid.x": self.blocks + first,
                "%ntid.x": self._block,
                "%nctaid.x": grid,
                "%laneid": self.lanes,
                "%warpid": self.tid // 32,
                "%nwarpid": -(-self._block // 32),
                "%lanemask_eq": one,
                "%lanemask_lt": one - np.uint64(1),
                "%lanemask_le": (one << np.uint64(1)) - np.uint64(1),
                "%lanemask_ge": EVERY ^ (one - np.uint64(1)),
                "%lanemask_gt": EVERY ^ ((one << np.uint64(1)) - np.uint64(1)),
            }
            alone = int(name.startswith("%n"))  # grids and blocks have one dimension
            return np.array(np.broadcast_to(values.get(name, alone), self.threads))

        return special


def take(program: Program, block: int, count: int) -> Frame:
    """A frame that no other launch uses."""
    try:
        return program.frames[block, count].pop()
    except (KeyError, IndexError):
        return Frame(program, block, count)


def give_back(program: Program, block: int, count: int, frame: Frame) -> None:
    program.frames.setdefault((block, count), []).append(frame)
