"""Offsets of bags, copied and looked at in one pass."""

from fastopt.kernels.cpu.chunks import chunk_ends
from fastopt.kernels.cpu.for_each import for_each
from fastopt.kernels.cpu.jit import Kernel, helper
from fastopt.kernels.intrinsics import view

OFFSETS_PER_BLOCK = 32_768


@Kernel
def copy_offsets(team, like, start, count, size, out, falls, found):
    """Copy ``count`` offsets, of the type of ``like``, at the address ``start`` to the int64 ``out``,
    followed by ``size`` if that has a place for it.

    found: int64 [3], set to the first and the last of ``out``, and to the position of the first that is
    larger than the next, or -1. falls: int64 [blocks], for those of each block.

    Bytes moved: each offset read and written once.
    """
    offsets = view(start, count, like)
    if out.size > offsets.size:
        out[offsets.size] = size
    for_each(team, copy_block, falls.size, (offsets, out, falls))
    found[0], found[1], found[2] = out[0], out[out.size - 1], -1
    for block in range(falls.size):
        if falls[block] >= 0:
            found[2] = falls[block]
            return
    if out.size > offsets.size > 0 and out[offsets.size - 1] > size:
        found[2] = offsets.size - 1


@helper
def copy_block(block, offsets, out, falls):
    """Copy a block, and find where it, or what follows it, falls."""
    first, last = chunk_ends(block, OFFSETS_PER_BLOCK, offsets.size)
    own, own_out = offsets[first:last], out[first:last]
    next_ones = offsets[first + 1 : min(last + 1, offsets.size)]
    count = 0
    for i in range(next_ones.size):
        own_out[i] = own[i]
        count += own[i] > next_ones[i]
    own_out[own.size - 1] = own[own.size - 1]
    falls[block] = -1
    if count:
        for i in range(next_ones.size - 1, -1, -1):
            if own[i] > next_ones[i]:
                falls[block] = first + i
