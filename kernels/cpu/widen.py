"""Arrays of 16 bits as float32."""

from numba import prange

from fastopt.kernels.cpu.jit import Kernel
from fastopt.kernels.formats import float_of_bfloat16
from fastopt.kernels.intrinsics import float_of_half


@Kernel
def widen_half(stored, out):
    """``out[i] = stored[i]``, for the 1-D bits of float16 and a float32 ``out``. Bytes moved: 6 an
    element."""
    for i in prange(out.size):
        out[i] = float_of_half(stored[i])


@Kernel
def widen_bfloat16(stored, out):
    """The same for bfloat16."""
    for i in prange(out.size):
        out[i] = float_of_bfloat16(stored[i])
