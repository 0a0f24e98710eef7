"""Memory that is used again: large arrays of a size are needed at every step, and getting them
from the system costs more, page by page, than what is done with them."""

import math
import os
import threading
from typing import Any

import numpy as np

SMALLEST = 1 << 16  # bytes; below, NumPy's own allocation is as fast
MOST_WAITING = 1 << 28  # bytes that wait for their next use
ALIGNMENT = 64  # bytes, a cache line: a row that begins elsewhere takes one more

_waiting: dict[int, list[np.ndarray]] = {}
_waiting_bytes = 0
_lock = threading.RLock()  # a collection of garbage may come while it is held


def _after_fork() -> None:
    """Begin anew: another thread may have held the lock, and changed half of what it guards."""
    global _lock, _waiting_bytes
    _lock = threading.RLock()
    _waiting.clear()
    _waiting_bytes = 0


os.register_at_fork(after_in_child=_after_fork)


class _Loan:
    """Owner of an array's memory, which is given back when the last view of it goes."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        global _waiting_bytes
        with _lock:
            if _waiting_bytes + self.memory.size > MOST_WAITING:  # sizes that are no longer needed, too
                _waiting.clear()
                _waiting_bytes = 0
            if self.memory.size <= MOST_WAITING:
                _waiting.setdefault(self.memory.size, []).append(self.memory)
                _waiting_bytes += self.memory.size


def aligned(memory: np.ndarray, size: int) -> np.ndarray:
    """The first ``size`` bytes of ``memory``, uint8, that begin with a cache line."""
    first = -memory.__array_interface__["data"][0] % ALIGNMENT
    return memory[first : first + size]


def empty(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """As ``np.empty(shape, dtype)``, from memory used before where there is some."""
    global _waiting_bytes
    dtype = np.dtype(dtype)
    needed = (shape if isinstance(shape, int) else math.prod(shape)) * dtype.itemsize
    if needed < SMALLEST:
        return np.empty(shape, dtype)
    eighth = 1 << max(needed.bit_length() - 4, 0)
    capacity = -(-needed // eighth) * eighth
    with _lock:
        waiting = _waiting.get(capacity)
        if waiting:
            _waiting_bytes -= capacity  # first: a collection of garbage may clear what waits
            memory = waiting.pop()
        else:
            memory = aligned(np.empty(capacity + ALIGNMENT, np.uint8), capacity)
    return np.asarray(_Loan(memory))[:needed].view(dtype).reshape(shape)
