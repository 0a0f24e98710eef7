"""The memory that a launch may touch."""

import bisect

import numpy as np


class Memory:
    """The allocations that kernels may touch: addresses of this process."""

    def __init__(self) -> None:
        self._sizes: dict[int, tuple[int, bool]] = {}
        self._table: np.ndarray | None = None

    def add(self, address: int, nbytes: int, writeable: bool = True) -> None:
        if nbytes > 0:
            self._sizes[int(address)] = int(nbytes), bool(writeable)
            self._table = None

    def remove(self, address: int) -> None:
        if self._sizes.pop(int(address), None) is not None:
            self._table = None

    def table(self, more: tuple[tuple[int, int, bool], ...] = ()) -> np.ndarray:
        """Rows of first bytes, ends and whether one may write, of allocations and ``more``, by address."""
        if self._table is None:
            self._table = _sorted(self._sizes)
        if not more:
            return self._table
        return _sorted({**self._sizes, **{address: (size, writeable) for address, size, writeable in more}})

    def nearest(self, address: int) -> str:
        """Where an address lies, for a message."""
        starts = [int(a) for a in self.table()[0]]
        at = bisect.bisect(starts, address)
        near = []
        for k in (at - 1, at):
            if 0 <= k < len(starts):
                first, end, writeable = (int(x) for x in self.table()[:, k])
                distance = first - address if address < first else max(0, address - end + 1)
                how = "" if writeable else "read-only "
                near.append((distance, f"{how}{end - first} bytes from {first:#x}"))
        if not self._sizes:
            return "there are no allocations"
        distance, text = min(near)
        return f"in {text}" if not distance else f"{distance} bytes from the nearest allocation, {text}"


def _sorted(sizes: dict[int, tuple[int, bool]]) -> np.ndarray:
    if not sizes:
        return np.zeros((3, 1), np.uint64)  # one that holds nothing
    first = np.fromiter(sizes, np.uint64, len(sizes))
    rest = np.array([*sizes.values()], np.uint64).T
    table = np.stack([first, first + rest[0], rest[1]])[:, np.argsort(first)]
    if (table[0, 1:] < table[1, :-1]).any():
        k = np.flatnonzero(table[0, 1:] < table[1, :-1])[0]
        raise ValueError(f"allocations at {int(table[0, k]):#x} and {int(table[0, k + 1]):#x} overlap")
    return np.ascontiguousarray(table)
