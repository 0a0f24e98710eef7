"""8-bit codes whose blocks go on over the rows of a table, made into codes whose blocks end with rows.

A block of threads encodes a block of codes, a thread each.
"""

from typing import Any

import numpy as np
from numba import cuda
from numba.extending import register_jitable

from fastopt.kernels.cuda.integers import divided
from fastopt.kernels.cuda.launch import kernel
from fastopt.kernels.cuda.memory import WARP, lane_and_warp, load, store, warp_max
from fastopt.kernels.formats import BLOCK, NEAREST, Format, larger, scale_from

MOST_BLOCKS = 2**20  # of a launch, each of which then takes several blocks of codes
BLOCK_BITS = BLOCK.bit_length() - 1
WARPS = BLOCK // WARP
_NOTHING, _CODE, _SCALE = np.uint32(0), np.uint8(0), np.float32(0)


@register_jitable
def block_max(bits):
    """The largest bits of a magnitude of a block of threads, in each of them. All of them have to come."""
    shared = cuda.shared.array(WARPS, np.uint32)
    lane, warp = lane_and_warp()
    bits = warp_max(bits)
    cuda.syncthreads()  # before it is written, each thread has read what it was for the last
    if lane == 0:
        shared[warp] = bits
    cuda.syncthreads()
    largest = shared[0]
    for w in range(1, WARPS):
        largest = max(largest, shared[w])
    return largest


@kernel("iiiiiii", BLOCK)
def reblock(kind: Format) -> Any:
    """``(codes, scales, new, new_scales, dim, per_row, blocks)``: encode rows of ``dim`` codes as ``per_row``
    blocks each, ``blocks`` in all, rounded to the nearest."""
    decode, encode = kind.decode, kind.encode
    factor, inverse = kind.factor, kind.inverse

    def reblock(codes, scales, new, new_scales, dim, per_row, blocks):
        thread, block = np.int64(cuda.threadIdx.x), np.int64(cuda.blockIdx.x)
        while block < blocks:
            row, part = divided(block, per_row)
            d = part * BLOCK + thread
            at = row * dim + d
            x, largest = _SCALE, _NOTHING
            if d < dim:
                x = decode(load(codes + at, _CODE), factor(load(scales + (at >> BLOCK_BITS) * 4, _SCALE)))
                largest = larger(largest, x)
            scale = scale_from(block_max(largest))
            if d < dim:
                store(new + at, encode(x, NEAREST, inverse(scale)))
            if thread == 0:
                store(new_scales + block * 4, scale)
            block += np.int64(cuda.gridDim.x)

    return reblock
