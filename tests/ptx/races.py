"""Who touched what: whether two threads touch the same bytes with nothing that orders them.

Each unit of memory has a record for plain reads, plain writes and atomic accesses. Two accesses race if at
least one writes, they are not both atomic, and neither a barrier of their block nor, within a warp, a
bar.warp.sync lies between. A record keeps, of those who touched it: the last; another of the same warp and
the same stretch between barriers; one of another warp; and one of another block. Whoever would race with
anybody who ever touched the unit races with one of these or has made one of these race before.
"""

from numba import njit

READ, WRITE, ATOMIC = 0, 1, 2
LAST, SAME_WARP, SAME_BLOCK, OTHER = 0, 3, 6, 9  # thread + 1 and its two epochs, for each
RECORD = 12
WIDTH = 3 * RECORD


@njit(cache=True, inline="always")
def _unordered(record, at, thread, warp, block, epoch, warp_epoch, per_block, per_warp):
    """Whether the access that is kept at ``at`` and this one are not ordered."""
    other = record[at] - 1
    if other < 0 or other == thread:
        return False
    if other // per_block != block:
        return True
    if record[at + 1] != epoch:
        return False
    return (other % per_block) // per_warp != warp or record[at + 2] == warp_epoch


@njit(cache=True)
def _against(record, first, thread, warp, block, epoch, warp_epoch, per_block):
    """The thread, plus one, that races with this one among those of a class; 0 if none does."""
    for at in range(first, first + RECORD, 3):
        if _unordered(record, at, thread, warp, block, epoch, warp_epoch, per_block, 32):
            return record[at]
    return 0


@njit(cache=True)
def _keep(record, first, thread, warp, block, epoch, warp_epoch, per_block):
    last = record[first] - 1
    if last >= 0 and last != thread:
        if last // per_block != block:
            to = OTHER
        elif (last % per_block) // 32 != warp:
            to = SAME_BLOCK
        else:
            to = SAME_WARP
        for k in range(3):
            record[first + to + k] = record[first + k]
        for level in range(SAME_WARP, to, 3):
            record[first + level] = 0
    record[first], record[first + 1], record[first + 2] = thread + 1, epoch, warp_epoch


@njit(cache=True)
def touch(record, how, thread, epoch, warp_epoch, per_block):
    """Note an access; the thread, plus one, that it races with, or 0."""
    block, warp = thread // per_block, (thread % per_block) // 32
    for other in range(3):
        if (how == READ and other == READ) or (how == ATOMIC and other == ATOMIC):
            continue
        found = _against(record, other * RECORD, thread, warp, block, epoch, warp_epoch, per_block)
        if found:
            return found
    _keep(record, how * RECORD, thread, warp, block, epoch, warp_epoch, per_block)
    return 0
