"""The records of races, which stay from launch to launch: fresh memory costs more than a launch."""

import numpy as np

from . import checked as m

MOST_KEPT = 1 << 20  # units of global memory: 160 MiB, of which only what is used is real
_free: list["Records"] = []


class Records:
    """Of one launch at a time: a hash table for units of global memory, and an array for those of shared."""

    def __init__(self) -> None:
        self.keys, self.records = np.zeros(4096, np.uint64), np.zeros((4096, m.WIDTH), np.int32)
        self.shared = np.zeros((1, m.WIDTH), np.int32)
        self._global = self._shared = 0

    def start(self, layout: np.ndarray) -> None:
        """A launch begins: forget the last one's."""
        self._global += 1
        if self._global >> (64 - m.KEY_BITS):
            self.keys[:], self.records[:], self._global = 0, 0, 1
        layout[m.USED], layout[m.GLOBAL_GENERATION] = 0, self._global

    def start_blocks(self, layout: np.ndarray, units: int) -> None:
        """Other blocks begin, with ``units`` of shared memory in all."""
        if units > len(self.shared):
            self.shared = np.zeros((units, m.WIDTH), np.int32)
        self._shared = self._shared % ((1 << 31) - 1) + 1
        layout[m.SHARED_GENERATION] = self._shared

    def reserve(self, layout: np.ndarray, units: int) -> bool:
        """Room for so many units more. Whether the table is another now."""
        size = self.keys.size
        while 2 * (layout[m.USED] + units) > size:
            size *= 4
        if size == self.keys.size:
            return False
        keys, records = np.zeros(size, np.uint64), np.zeros((size, m.WIDTH), np.int32)
        m.move_records(self.keys, self.records, keys, records, layout)
        self.keys, self.records = keys, records
        return True


def take() -> Records:
    """Records that no other launch uses."""
    try:
        return _free.pop()
    except IndexError:
        return Records()


def give_back(records: Records) -> None:
    if records.keys.size <= MOST_KEPT:
        _free.append(records)
