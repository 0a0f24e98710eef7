"""Sums over the threads of a block."""

import numpy as np
from numba import cuda
from numba.extending import register_jitable

from fastopt.kernels.cuda.memory import WARP, lane_and_warp, warp_sum

THREADS = 256
WARPS = THREADS // WARP


@register_jitable
def block_sum(x):
    """The sum over a block of THREADS threads of a float64, in a fixed order, with the same bits in each. All
    of them have to come."""
    shared = cuda.shared.array(WARPS, np.float64)
    lane, warp = lane_and_warp()
    x = warp_sum(x)
    cuda.syncthreads()  # before it is written for another sum, each thread has read what it was for the last
    if lane == 0:
        shared[warp] = x
    cuda.syncthreads()
    total = 0.0
    for w in range(WARPS):
        total += shared[w]
    return total
