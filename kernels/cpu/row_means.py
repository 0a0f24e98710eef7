"""The mean square of a row's gradient, in vectors. The squares come first, in memory of the CPU's stack, as
the rule's own function finds them; then sixteen are added at once. Where there is no such memory,
``mean_square`` of element.py adds four at once, to a sum that is rounded otherwise.
"""

import numpy as np

from fastopt.kernels import element
from fastopt.kernels.cpu.jit import restricted_helper
from fastopt.kernels.element import beginning, mean_of_large_squares, regularise
from fastopt.kernels.intrinsics import ON_STACK, on_stack, sum_on_stack, view
from fastopt.kernels.linked import register_jitable

VECTORS_FROM = 32  # elements of a row: a shorter one is done before its squares could be read back


@register_jitable
def mean_square(c, p, g):
    """Mean over a row of the squared gradient ``g`` as the rule sees it; ``p`` and ``g`` are 1-D."""
    dim = g.size
    if dim < VECTORS_FROM:
        return element.mean_square(c, p, g)
    zero = p.dtype.type(0)
    squares = on_stack(zero)
    total = zero
    for first in range(0, dim, ON_STACK):
        # Slices would cost more than the squares of a short row.
        size = min(dim - first, ON_STACK)
        own = view(g.ctypes.data + first * g.itemsize, size, zero)
        if size < ON_STACK:
            squares[:] = zero
        find_squares(c, view(p.ctypes.data + first * p.itemsize, size, zero), own, squares)
        total += sum_on_stack(squares)
    return mean_of_large_squares(c, p, g) if total == np.inf else total / p.dtype.type(dim)


@restricted_helper
def find_squares(c, p, g, squares):
    for d in range(g.size):
        x = regularise(c, p[d], g[d])
        squares[d] = x * x


begin_row = beginning(mean_square)
