"""The mean square of a row's gradient, in vectors: the squares come first, in memory of the CPU's stack; a
loop that adds them up in a fixed order is none of vectors. It gives the bits of ``mean_square`` in
element.py, which runs where there is no such memory.
"""

import numpy as np
from numba.extending import register_jitable

from fastopt.kernels import element
from fastopt.kernels.cpu.jit import restricted_helper
from fastopt.kernels.element import beginning, mean_of_large_squares, regularise
from fastopt.kernels.intrinsics import ON_STACK, on_stack

VECTORS_FROM = 32  # elements of a row: a shorter one is done before its squares could be read back


@register_jitable
def mean_square(c, p, g):
    """Mean over a row of the squared gradient ``g`` as the rule sees it; ``p`` and ``g`` are 1-D."""
    dim = g.size
    if dim < VECTORS_FROM:
        return element.mean_square(c, p, g)
    zero = p.dtype.type(0)
    squares = on_stack(zero)
    sums = zero, zero, zero, zero
    for first in range(0, dim, ON_STACK):
        own = g[first : first + ON_STACK]
        find_squares(c, p[first : first + ON_STACK], own, squares)
        for d in range(0, own.size - own.size % 4, 4):
            sums = (
                sums[0] + squares[d],
                sums[1] + squares[d + 1],
                sums[2] + squares[d + 2],
                sums[3] + squares[d + 3],
            )
    total = (sums[0] + sums[1]) + (sums[2] + sums[3])
    for d in range(dim % ON_STACK - dim % 4, dim % ON_STACK):
        total += squares[d]
    return mean_of_large_squares(c, p, g) if total == np.inf else total / p.dtype.type(dim)


@restricted_helper
def find_squares(c, p, g, squares):
    for d in range(g.size):
        x = regularise(c, p[d], g[d])
        squares[d] = x * x


begin_row = beginning(mean_square)
