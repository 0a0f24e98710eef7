"""Arrays of 16 bits as float32."""

from fastopt.kernels.cpu.chunks import chunk_count, chunk_ends
from fastopt.kernels.cpu.for_each import for_each
from fastopt.kernels.cpu.jit import Kernel, restricted_helper
from fastopt.kernels.formats import float_of_bfloat16
from fastopt.kernels.intrinsics import float_of_half

PART = 8_192  # elements


@Kernel
def widen_half(team, stored, out):
    """``out[i] = stored[i]``, for the 1-D bits of float16 and a float32 ``out``. Bytes moved: 6 an
    element."""
    for_each(team, widen_half_part, chunk_count(out.size, PART), (stored, out))


@restricted_helper
def widen_half_part(part, stored, out):
    first, last = chunk_ends(part, PART, out.size)
    for i in range(first, last):
        out[i] = float_of_half(stored[i])


@Kernel
def widen_bfloat16(team, stored, out):
    """The same for bfloat16."""
    for_each(team, widen_bfloat16_part, chunk_count(out.size, PART), (stored, out))


@restricted_helper
def widen_bfloat16_part(part, stored, out):
    first, last = chunk_ends(part, PART, out.size)
    for i in range(first, last):
        out[i] = float_of_bfloat16(stored[i])
