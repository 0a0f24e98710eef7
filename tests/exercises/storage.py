"""A storage format in one file: float32 of which the lower 16 bits are cut off."""

import ml_dtypes
import numpy as np
from numba.extending import register_jitable

from fastopt.kernels.formats import (
    Format,
    StateFormats,
    float_of_bfloat16,
    register_format,
    register_state_dtype,
)
from fastopt.kernels.intrinsics import bits_of

NAME = "cut"


@register_jitable
def to_cut(x, random):
    return np.uint16(bits_of(np.float32(x)) >> np.uint32(16))


CUT = register_format(Format("CUT", np.dtype(ml_dtypes.bfloat16), np.uint16, float_of_bfloat16, to_cut))
register_state_dtype(NAME, StateFormats(CUT, CUT))
