"""The memory that a launch may touch, and its loads, stores and atomics, checked one by one.

Global memory is this process's own; shared and local memory are arrays of the launch. An access has to lie in
an allocation and be aligned to its size, may not write what is read only, may not read shared memory that
nothing has written, and may not race (``races``).
"""

import bisect

import numpy as np
from numba import njit

from .races import ATOMIC, touch
from .raw import peek, poke

GLOBAL, SHARED, LOCAL, GENERIC = 0, 1, 2, 3
FINE, OUTSIDE, MISALIGNED, READ_ONLY, RACE, UNINITIALISED = range(6)
# what ``layout`` holds
(SHARED_BASE, SHARED_SIZE, SHARED_STRIDE, LOCAL_BASE, LOCAL_SIZE, PER_BLOCK, SHARED_UNIT, GLOBAL_UNIT, USED, FIRST_BLOCK,
 LOCAL_STRIDE) = range(11)  # fmt: skip
LAYOUT = 11


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
        """[first, end, writeable] of all allocations, and of ``more``, by address."""
        if more:
            rows = [(a, a + n, w) for a, n, w in (*((a, *x) for a, x in self._sizes.items()), *more)]
            return np.array(sorted(rows), np.uint64).T.copy()
        if self._table is None:
            rows = [(a, a + n, w) for a, (n, w) in sorted(self._sizes.items())] or [(0, 0, False)]
            self._table = np.array(rows, np.uint64).reshape(-1, 3).T.copy()
        return self._table

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
        if not near:
            return "there are no allocations"
        distance, text = min(near)
        return f"in {text}" if not distance else f"{distance} bytes from the nearest allocation, {text}"


@njit(cache=True)
def _slot(keys, key, layout):
    """The place of a key in the table of global units, which is made if need be."""
    mask = keys.size - 1
    at = np.int64((key * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(20)) & mask
    while keys[at] != key:
        if keys[at] == 0:
            keys[at] = key
            layout[USED] += 1
            break
        at = (at + 1) & mask
    return at


@njit(cache=True)
def grown(keys, records):
    """The table twice as large."""
    more = np.zeros(2 * keys.size, keys.dtype)
    rows = np.zeros((2 * keys.size, records.shape[1]), records.dtype)
    used = np.zeros(LAYOUT, np.int64)
    for i in range(keys.size):
        if keys[i]:
            rows[_slot(more, keys[i], used)] = records[i]
    return more, rows


@njit(cache=True)
def _find(table, address, size, last):
    """The allocation that holds an access, or -1; ``last`` is tried first."""
    if table[0, last] <= address and address + np.uint64(size) <= table[1, last]:
        return last
    low, high = 0, table.shape[1]
    while low < high:
        middle = (low + high) // 2
        if table[0, middle] <= address:
            low = middle + 1
        else:
            high = middle
    if low == 0 or address + np.uint64(size) > table[1, low - 1]:
        return -1
    return low - 1


@njit(cache=True)
def _check(
    i, address, size, space, how, reads, writes, table, last, layout, threads, keys, records, shared, known
):
    """(fault, where it is in this process, detail, allocation) of one access."""
    block, thread, epoch, warp_epoch = threads[0, i], threads[1, i], threads[2, i], threads[3, i]
    if space == GENERIC:
        space = np.int64(address >> np.uint64(60))
        if space > LOCAL:
            return OUTSIDE, address, 0, last
        address &= np.uint64((1 << 60) - 1)
    if address % np.uint64(size) != 0:
        return MISALIGNED, address, 0, last
    if space == LOCAL:
        if address >= np.uint64(layout[LOCAL_SIZE]) or address + np.uint64(size) > np.uint64(
            layout[LOCAL_SIZE]
        ):
            return OUTSIDE, address, LOCAL, last
        return FINE, np.uint64(layout[LOCAL_BASE] + i * layout[LOCAL_STRIDE]) + address, 0, last
    if space == SHARED:
        if address >= np.uint64(layout[SHARED_SIZE]) or address + np.uint64(size) > np.uint64(
            layout[SHARED_SIZE]
        ):
            return OUTSIDE, address, SHARED, last
        at = block * layout[SHARED_STRIDE] + np.int64(address)
        unit = layout[SHARED_UNIT]
        for first in range(at // unit, (at + size) // unit):
            if reads and not known[first]:
                return UNINITIALISED, address, 0, last
            if writes:
                known[first] = 1
            found = touch(shared[first], how, thread, epoch, warp_epoch, layout[PER_BLOCK])
            if found:
                return RACE, address, found - 1, last
        return FINE, np.uint64(layout[SHARED_BASE] + at), 0, last
    last = _find(table, address, size, last)
    if last < 0:
        return OUTSIDE, address, GLOBAL, 0
    if table[2, last] == 0:
        if writes:
            return READ_ONLY, address, 0, last
        return FINE, address, 0, last
    unit = layout[GLOBAL_UNIT]
    for step in range(0, size, unit):
        record = records[_slot(keys, (address + np.uint64(step)) // np.uint64(unit), layout)]
        found = touch(record, how, thread, epoch, warp_epoch, layout[PER_BLOCK])
        if found:
            return RACE, address, found - 1, last
    return FINE, address, 0, last


@njit(cache=True)
def load(
    active,
    addresses,
    move,
    size,
    count,
    out,
    space,
    how,
    table,
    layout,
    threads,
    keys,
    records,
    shared,
    known,
):
    """``count`` numbers of ``size`` bytes each for the active threads, into rows of ``out``; what went wrong."""
    last = 0
    for i in range(active.size):
        if not active[i]:
            continue
        fault, at, detail, last = _check(
            i, addresses[i] + move, size * count, space, how, True, False, table, last, layout, threads, keys, records,
            shared, known,
        )  # fmt: skip
        if fault:
            return fault, i, at, detail
        for k in range(count):
            place = at + np.uint64(k * size)
            if size == 4:
                out[k, i] = peek(place, np.uint32(0))
            elif size == 8:
                out[k, i] = peek(place, np.uint64(0))
            elif size == 2:
                out[k, i] = peek(place, np.uint16(0))
            else:
                out[k, i] = peek(place, np.uint8(0))
    return FINE, 0, np.uint64(0), 0


@njit(cache=True)
def store(
    active,
    addresses,
    move,
    size,
    count,
    values,
    space,
    how,
    table,
    layout,
    threads,
    keys,
    records,
    shared,
    known,
):
    last = 0
    for i in range(active.size):
        if not active[i]:
            continue
        fault, at, detail, last = _check(
            i, addresses[i] + move, size * count, space, how, False, True, table, last, layout, threads, keys, records,
            shared, known,
        )  # fmt: skip
        if fault:
            return fault, i, at, detail
        for k in range(count):
            _put(at + np.uint64(k * size), size, values[k, i])
    return FINE, 0, np.uint64(0), 0


@njit(cache=True)
def _put(at, size, value):
    if size == 4:
        poke(at, np.uint32(value))
    elif size == 8:
        poke(at, np.uint64(value))
    elif size == 2:
        poke(at, np.uint16(value))
    else:
        poke(at, np.uint8(value))


ADD, MIN, MAX, EXCH, CAS, AND, OR, XOR, INC, DEC = range(10)
UNSIGNED, SIGNED, FLOAT = range(3)


@njit(cache=True)
def _signed(x, size):
    return np.int64(np.int32(np.uint32(x))) if size == 4 else np.int64(x)


@njit(cache=True)
def _combined(what, sort, size, old, x, y):
    """What an atomic leaves behind, all of it as bits."""
    if what == ADD:
        if sort == FLOAT:
            if size == 4:
                total = np.uint32(old).view(np.float32) + np.uint32(x).view(np.float32)
                return np.uint64(np.float32(total).view(np.uint32))
            return np.uint64(
                np.float64(np.uint64(old).view(np.float64) + np.uint64(x).view(np.float64)).view(np.uint64)
            )
        return old + x
    if what == MIN or what == MAX:
        if sort == SIGNED:
            less = _signed(x, size) < _signed(old, size)
        else:
            less = x < old
        return x if less == (what == MIN) else old
    if what == CAS:
        return y if old == x else old
    if what == AND:
        return old & x
    if what == OR:
        return old | x
    if what == XOR:
        return old ^ x
    if what == INC:
        return np.uint64(0) if old >= x else old + np.uint64(1)
    if what == DEC:
        return x if old == 0 or old > x else old - np.uint64(1)
    return x


@njit(cache=True)
def atomic(
    active,
    addresses,
    move,
    size,
    what,
    sort,
    x,
    y,
    out,
    space,
    table,
    layout,
    threads,
    keys,
    records,
    shared,
    known,
):
    """One after the other in the order of the threads; ``out`` gets what was there before."""
    last = 0
    for i in range(active.size):
        if not active[i]:
            continue
        fault, at, detail, last = _check(
            i, addresses[i] + move, size, space, ATOMIC, True, True, table, last, layout, threads, keys, records,
            shared, known,
        )  # fmt: skip
        if fault:
            return fault, i, at, detail
        if size == 4:
            old = np.uint64(peek(at, np.uint32(0)))
        elif size == 8:
            old = peek(at, np.uint64(0))
        else:
            old = np.uint64(peek(at, np.uint16(0)))
        out[i] = old
        _put(at, size, _combined(what, sort, size, old, x[i], y[i]))
    return FINE, 0, np.uint64(0), 0
