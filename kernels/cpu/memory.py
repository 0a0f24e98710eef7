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

# Many processors tell by the place in a page alone whether a load may need an earlier store, and then wait
# for it. Loops over several arrays load what comes next and store what was: no load waits where elements of
# one index have the same place in their pages, many do where the array that is stored to is a little ahead.
PAGE = 4096  # bytes
SMALLEST_PLACED = 1 << 18  # bytes; of these a page is a trifle

_waiting: dict[int, list[np.ndarray]] = {}
_waiting_bytes = 0
_lock: Any = threading.RLock()  # a collection of garbage may come while it is held


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
        if _lock is None:  # the interpreter ends, and has cleared this module
            return
        with _lock:
            if _waiting_bytes + self.memory.size > MOST_WAITING:  # sizes that are no longer needed, too
                _waiting.clear()
                _waiting_bytes = 0
            if self.memory.size <= MOST_WAITING:
                _waiting.setdefault(self.memory.size, []).append(self.memory)
                _waiting_bytes += self.memory.size


def _from(memory: np.ndarray, size: int, place: int, modulus: int) -> np.ndarray:
    """The first ``size`` bytes of ``memory``, uint8, whose address is ``place`` modulo ``modulus``."""
    first = (place - memory.__array_interface__["data"][0]) % modulus
    return memory[first : first + size]


def zeros_at(shape: tuple[int, ...], dtype: np.dtype, place: int, modulus: int) -> np.ndarray:
    """Zeros whose address is ``place`` modulo ``modulus``; they come from the system unread."""
    size = math.prod(shape) * dtype.itemsize
    return _from(np.zeros(size + modulus, np.uint8), size, place, modulus).view(dtype).reshape(shape)


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
            memory = _from(np.empty(capacity + ALIGNMENT, np.uint8), capacity, 0, ALIGNMENT)
    return np.asarray(_Loan(memory))[:needed].view(dtype).reshape(shape)


def scratch(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """As :func:`empty`, from the beginning of a cache line on: loads have to wait for a store across two."""
    size = math.prod(shape) * dtype.itemsize
    return _from(empty(size + ALIGNMENT, np.uint8), size, 0, ALIGNMENT).view(dtype).reshape(shape)
