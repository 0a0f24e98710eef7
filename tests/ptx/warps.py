"""What the lanes of a warp do together: shuffles, votes, matches, reductions."""

import numpy as np
from numba import njit

LEFT, STRANGER, DIFFERENT = -1, -2, -3


@njit(cache=True, error_model="numpy")
def meet(arrived, gone, members, lanes, go):
    """Which of those who have arrived may go on: warps whose named lanes are all here. The number of them.

    Less than 0 if a lane is not in its own mask, if lanes are named that have left, or if masks differ.
    """
    n, count, i = arrived.size, 0, 0
    while i < n:  # a warp
        end, here, alike, mask = i, np.uint32(0), True, np.uint32(0)
        while end < n and (end == i or lanes[end] != 0):
            go[end] = False
            if arrived[end]:
                alike &= here == 0 or members[end] == mask
                mask = members[end]
                here |= np.uint32(1) << np.uint32(lanes[end])
            end += 1
        if here and alike and mask == here:
            for k in range(i, end):
                go[k] = arrived[k]
                count += arrived[k]
        elif here:
            fault, more = _meet_in_part(arrived, gone, members, lanes, go, i, end)
            if fault:
                return fault, more
            count += more
        i = end
    return count, 0


@njit(cache=True, error_model="numpy")
def _meet_in_part(arrived, gone, members, lanes, go, first, end):
    """The same, of a warp not all of which is here or of which parts meet: (fault or 0, who or how many)."""
    count = 0
    for i in range(first, end):
        if not arrived[i]:
            continue
        mask, whole = members[i], True
        if not (mask >> np.uint32(lanes[i])) & np.uint32(1):
            return STRANGER, i
        for lane in range(32):
            if (mask >> np.uint32(lane)) & np.uint32(1):
                other = first + lane
                if other >= end or gone[other]:
                    return LEFT, i
                if not arrived[other]:
                    whole = False
                elif members[other] != mask:
                    return DIFFERENT, i
        if whole:
            go[i] = True
            count += 1
    return 0, count


@njit(cache=True, error_model="numpy")
def pass_barrier(go, lanes, epochs):
    """Warps of which some lanes have met at bar.warp.sync: what they do next is ordered after that."""
    n = go.size
    for i in range(n):
        if lanes[i] == 0:
            met = False
            for k in range(i, min(i + 32, n)):
                if k > i and lanes[k] == 0:
                    break
                met |= go[k]
            for k in range(i, min(i + 32, n)):
                if k > i and lanes[k] == 0:
                    break
                epochs[k] += met


UP, DOWN, BFLY, IDX = range(4)


@njit(cache=True, error_model="numpy")
def shuffle(go, values, b, c, members, lanes, mode, out, inside):
    """The first thread that reads a lane that does not take part, or -1."""
    for i in range(go.size):
        if not go[i]:
            continue
        lane, by = lanes[i], np.int64(b[i])
        clamp, segment = np.int64(c[i]) & 31, (np.int64(c[i]) >> 8) & 31
        lowest = lane & segment
        highest = lowest | (clamp & ~segment)
        by &= 31
        if mode == UP:
            source = lane - by
            ok = source >= highest
        elif mode == DOWN:
            source = lane + by
            ok = source <= highest
        elif mode == BFLY:
            source = lane ^ by
            ok = source <= highest
        else:
            source = lowest | (by & ~segment)
            ok = source <= highest
        if not ok:
            source = lane
        if not (members[i] >> np.uint32(source)) & np.uint32(1):
            return i
        out[i], inside[i] = values[i - lane + source], ok
    return -1


ALL, ANY, UNI, BALLOT = range(4)


@njit(cache=True, error_model="numpy")
def vote(go, chosen, members, lanes, mode, out):
    first, mask, ballot = -1, np.uint32(0), np.uint32(0)
    for i in range(go.size):
        if not go[i]:
            continue
        if i - lanes[i] != first or members[i] != mask:
            ballot, first, mask = np.uint32(0), i - lanes[i], members[i]
            for lane in range(32):
                if (mask >> np.uint32(lane)) & np.uint32(1) and chosen[first + lane]:
                    ballot |= np.uint32(1) << np.uint32(lane)
        if mode == ALL:
            out[i] = ballot == members[i]
        elif mode == ANY:
            out[i] = ballot != 0
        elif mode == UNI:
            out[i] = ballot == members[i] or ballot == 0
        else:
            out[i] = ballot


@njit(cache=True, error_model="numpy")
def match(go, values, members, lanes, everybody, out, same):
    """The lanes that hold the same value; with ``everybody`` the mask, or 0 unless all do."""
    for i in range(go.size):
        if not go[i]:
            continue
        equal, first = np.uint32(0), i - lanes[i]
        for lane in range(32):
            if (members[i] >> np.uint32(lane)) & np.uint32(1) and values[first + lane] == values[i]:
                equal |= np.uint32(1) << np.uint32(lane)
        same[i] = equal == members[i]
        out[i] = equal if not everybody or same[i] else np.uint32(0)


R_ADD, R_MIN, R_MAX, R_AND, R_OR, R_XOR = range(6)


@njit(cache=True, error_model="numpy")
def redux(go, values, members, lanes, what, out):
    for i in range(go.size):
        if not go[i]:
            continue
        first, started, total = i - lanes[i], False, values[i]
        for lane in range(32):
            if not (members[i] >> np.uint32(lane)) & np.uint32(1):
                continue
            x = values[first + lane]
            if not started:
                total, started = x, True
            elif what == R_ADD:
                total += x
            elif what == R_MIN:
                total = min(total, x)
            elif what == R_MAX:
                total = max(total, x)
            elif what == R_AND:
                total &= x
            elif what == R_OR:
                total |= x
            else:
                total ^= x
        out[i] = total


@njit(cache=True, error_model="numpy")
def active_lanes(active, lanes, out):
    for i in range(active.size):
        mask, first = np.uint32(0), i - lanes[i]
        for lane in range(32):
            other = first + lane
            if other < active.size and lanes[other] == lane and active[other]:
                mask |= np.uint32(1) << np.uint32(lane)
        out[i] = mask
