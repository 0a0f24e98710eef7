"""Memory that is used again: large arrays of a size are needed at every step, and getting them
from the system costs more, page by page, than what is done with them."""

import os
import threading
from typing import Any

import numpy as np

SMALLEST = 1 << 16  # bytes; below, NumPy's own allocation is as fast
KEPT = 4  # arrays of a size class that wait for their next use

_waiting: dict[int, list[np.ndarray]] = {}
_lock = threading.RLock()  # a collection of garbage may come while it is held


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # another thread may have held it


os.register_at_fork(after_in_child=_after_fork)


class _Loan:
    """Owner of an array's memory, which is given back when the last view of it goes."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        with _lock:
            waiting = _waiting.setdefault(self.memory.size, [])
            if len(waiting) < KEPT:
                waiting.append(self.memory)


def empty(size: int, dtype: Any) -> np.ndarray:
    """As ``np.empty(size, dtype)``, from memory used before where there is some."""
    dtype = np.dtype(dtype)
    needed = size * dtype.itemsize
    if needed < SMALLEST:
        return np.empty(size, dtype)
    capacity = 1 << (needed - 1).bit_length()
    with _lock:
        waiting = _waiting.get(capacity)
        memory = waiting.pop() if waiting else np.empty(capacity, np.uint8)
    return np.asarray(_Loan(memory))[:needed].view(dtype)
