"""How the lanes of a warp share out a row of elements."""

from numba import cuda
from numba.extending import register_jitable

from fastopt.kernels.cuda.memory import ALL_LANES, WARP

VECTOR_BYTES = 16  # the most that one instruction reads or writes


def vector_length(itemsize: int, dim: int, *addresses: int) -> int:
    """How many elements of rows a lane takes at a time: as many as VECTOR_BYTES hold, if all rows begin with
    a whole vector."""
    length = VECTOR_BYTES // itemsize
    return 1 if dim % length or any(address % VECTOR_BYTES for address in addresses) else length


def lane_bits(vectors: int) -> int:
    """2 to this are the lanes that take a row of so many vectors."""
    return (min(vectors, WARP) - 1).bit_length()


@register_jitable
def group_sum(x, bits):
    """The sum over the ``2**bits`` lanes of a group, with the same bits in each. All lanes have to come."""
    for distance in (16, 8, 4, 2, 1):
        y = cuda.shfl_xor_sync(ALL_LANES, x, distance)
        if distance >> bits == 0:
            x += y
    return x
