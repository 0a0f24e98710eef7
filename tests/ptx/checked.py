"""Loads, stores and atomics of many threads, each checked on its own.

Global memory is this process's own; shared and local memory are arrays of the launch. An access has to lie in
an allocation and be aligned to its size, may not write what is read only, may not read shared memory that
nothing has written, and may not race with another.

A race is looked for as follows. Each unit of memory has a record for plain reads, plain writes and atomic
accesses. Two accesses race if at least one writes, they are not both atomic, and neither a barrier of their
block nor, within a warp, a bar.warp.sync lies between. A record keeps, of those who touched the unit: the
last; another of the same warp; one of another warp of the same block; and one of another block. Whoever would
race with anybody who ever touched the unit races with one of these, or one of these has raced before.

All compiled code that calls itself is in this one file: Numba's cache does not see changes of another.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

GLOBAL, SHARED, LOCAL, GENERIC = 0, 1, 2, 3
FINE, OUTSIDE, MISALIGNED, READ_ONLY, RACE, UNINITIALISED = range(6)
# what ``layout`` holds
(SHARED_BASE, SHARED_SIZE, SHARED_STRIDE, LOCAL_BASE, LOCAL_SIZE, LOCAL_STRIDE, PER_BLOCK, SHARED_UNIT,
 GLOBAL_UNIT, USED, GLOBAL_GENERATION, SHARED_GENERATION) = range(12)  # fmt: skip
LAYOUT = 12
# what ``threads`` holds: of each its block, counted from the first that runs, its number in the grid, and how
# many barriers its block and its warp have passed
BLOCK, NUMBER, EPOCH, WARP_EPOCH = range(4)
READ, WRITE, ATOMIC = range(3)
LAST, SAME_WARP, SAME_BLOCK, OTHER = 0, 3, 6, 9  # thread + 1 and its two epochs, for each
RECORD = 12
GENERATION = 3 * RECORD  # where a record holds the launch that it is of
OWNER = GENERATION + 1  # and the thread, plus one, if it alone has touched the unit
WIDTH = GENERATION + 4
KEY_BITS = 48  # of an address
WRITTEN, CHANGED = WRITE * RECORD, ATOMIC * RECORD  # who, if anybody, last wrote, and last was atomic there


@intrinsic
def peek(context, address, like):
    """The number of the type of ``like`` at an address."""

    def generate(context, builder, signature, arguments):
        kind = context.get_data_type(like)
        return builder.load(builder.inttoptr(arguments[0], ir.PointerType(kind)), align=1)

    return like(types.uint64, like), generate


@intrinsic
def poke(context, address, value):
    def generate(context, builder, signature, arguments):
        kind = context.get_data_type(value)
        builder.store(arguments[1], builder.inttoptr(arguments[0], ir.PointerType(kind)), align=1)
        return context.get_dummy_value()

    return types.void(types.uint64, value), generate


@njit(cache=True, error_model="numpy")
def _unordered(records, row, at, thread, epoch, warp_epoch, per_block):
    """Whether the access that is kept at ``at``, another thread's, and this one are not ordered."""
    other = records[row, at] - 1
    if other // per_block != thread // per_block:
        return True
    if records[row, at + 1] != epoch:
        return False
    return other % per_block // 32 != thread % per_block // 32 or records[row, at + 2] == warp_epoch


@njit(cache=True, error_model="numpy")
def _make_room(records, row, first, thread, per_block):
    """Who touched a unit last moves to where it still says something beside this thread."""
    last = records[row, first] - 1
    if last // per_block != thread // per_block:
        to = OTHER
    elif last % per_block // 32 != thread % per_block // 32:
        to = SAME_BLOCK
    else:
        to = SAME_WARP
    for k in range(3):
        records[row, first + to + k] = records[row, first + k]
    for level in range(SAME_WARP, to, 3):
        records[row, first + level] = 0


@njit(cache=True, error_model="numpy")
def touch(records, row, generation, how, thread, epoch, warp_epoch, per_block):
    """Note an access to a unit; the thread, plus one, that it races with, or 0."""
    first = how * RECORD
    if records[row, GENERATION] != generation:  # left by another launch
        records[row, GENERATION], records[row, OWNER] = generation, thread + 1
        for at in range(0, GENERATION, 3):
            records[row, at] = 0
    elif records[row, OWNER] != thread + 1:
        records[row, OWNER] = 0
        for other in range(3):
            if (how == READ and other == READ) or (how == ATOMIC and other == ATOMIC):
                continue
            for at in range(other * RECORD, (other + 1) * RECORD, 3):
                if records[row, at] == 0 or records[row, at] == thread + 1:
                    continue
                if _unordered(records, row, at, thread, epoch, warp_epoch, per_block):
                    return records[row, at]
        if records[row, first] != 0 and records[row, first] != thread + 1:
            _make_room(records, row, first, thread, per_block)
    records[row, first], records[row, first + 1], records[row, first + 2] = thread + 1, epoch, warp_epoch
    return 0


@njit(cache=True, error_model="numpy")
def _slot(keys, unit, layout):
    """The place in the table of a unit of global memory, which gets one if it has none.

    Neighbours are beside each other. A key holds the launch, so that what others have left counts as empty.
    """
    mask, generation = np.uint64(keys.size - 1), np.uint64(layout[GLOBAL_GENERATION])
    key = (generation << np.uint64(KEY_BITS)) | unit
    group = (unit >> np.uint64(6)) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(20)
    at = ((group << np.uint64(6)) | (unit & np.uint64(63))) & mask
    while keys[at] != key:
        if keys[at] >> np.uint64(KEY_BITS) != generation:
            keys[at] = key
            layout[USED] += 1
            break
        at = (at + np.uint64(64)) & mask
    return at


@njit(cache=True, error_model="numpy")
def move_records(keys, records, more, rows, layout):
    """Take what is known into an empty table that is larger."""
    layout[USED] = 0
    for i in range(keys.size):
        if keys[i] >> np.uint64(KEY_BITS) == np.uint64(layout[GLOBAL_GENERATION]):
            unit = keys[i] & np.uint64((1 << KEY_BITS) - 1)
            rows[_slot(more, unit, layout)] = records[i]


@njit(cache=True, error_model="numpy")
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


@njit(cache=True, error_model="numpy")
def _check(i, address, size, space, how, reads, writes, table, last, layout, threads, keys, records, shared):
    """(fault, where it is in this process, detail, allocation) of one access."""
    block, thread = threads[BLOCK, i], threads[NUMBER, i]
    epoch, warp_epoch = threads[EPOCH, i], threads[WARP_EPOCH, i]
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
            generation = layout[SHARED_GENERATION]
            if reads and (
                shared[first, GENERATION] != generation
                or not (shared[first, WRITTEN] or shared[first, CHANGED])
            ):
                return UNINITIALISED, address, 0, last
            found = touch(shared, first, generation, how, thread, epoch, warp_epoch, layout[PER_BLOCK])
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
        row = _slot(keys, (address + np.uint64(step)) // np.uint64(unit), layout)
        generation = layout[GLOBAL_GENERATION]
        found = touch(records, row, generation, how, thread, epoch, warp_epoch, layout[PER_BLOCK])
        if found:
            return RACE, address, found - 1, last
    return FINE, address, 0, last


@njit(cache=True, error_model="numpy")
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
):
    """``count`` numbers of ``size`` bytes each, for active threads, into rows of ``out``; what went wrong."""
    last = 0
    for i in range(active.size):
        if not active[i]:
            continue
        fault, at, detail, last = _check(
            i, addresses[i] + move, size * count, space, how, True, False, table, last, layout, threads,
            keys, records, shared,
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


@njit(cache=True, error_model="numpy")
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
):
    last = 0
    for i in range(active.size):
        if not active[i]:
            continue
        fault, at, detail, last = _check(
            i, addresses[i] + move, size * count, space, how, False, True, table, last, layout, threads,
            keys, records, shared,
        )  # fmt: skip
        if fault:
            return fault, i, at, detail
        for k in range(count):
            _put(at + np.uint64(k * size), size, values[k, i])
    return FINE, 0, np.uint64(0), 0


@njit(cache=True, error_model="numpy")
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


@njit(cache=True, error_model="numpy")
def _signed(x, size):
    return np.int64(np.int32(np.uint32(x))) if size == 4 else np.int64(x)


@njit(cache=True, error_model="numpy")
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
    if what in (MIN, MAX):
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


@njit(cache=True, error_model="numpy")
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
):
    """One after the other in the order of the threads; ``out`` gets what was there before."""
    last = 0
    for i in range(active.size):
        if not active[i]:
            continue
        fault, at, detail, last = _check(
            i, addresses[i] + move, size, space, ATOMIC, True, True, table, last, layout, threads,
            keys, records, shared,
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
