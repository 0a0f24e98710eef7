"""What is done to the elements of one array: set, copied, converted, scaled and clipped.

An array is seen as rows of ``width`` elements next to each other, ``stride`` bytes apart; a C-contiguous one
is a single row. So many blocks as ``per_row`` says share out a row.
"""

from typing import Any

import ml_dtypes
import numpy as np
from numba import cuda
from numba.extending import register_jitable

from fastopt.kernels.cuda.launch import kernel
from fastopt.kernels.cuda.memory import load, store
from fastopt.kernels.formats import float_of_bfloat16, same, to_half, to_nearest_bfloat16
from fastopt.kernels.intrinsics import float_of_half

THREADS = 256
MOST_BLOCKS = 2048  # of a row, then each goes on with elements further on
_HALF, _BFLOAT16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
_DECODE = {_HALF: float_of_half, _BFLOAT16: float_of_bfloat16}
_ENCODE = {_HALF: to_half, _BFLOAT16: to_nearest_bfloat16}


def blocks_for(width: int) -> int:
    """How many blocks share out a row."""
    return max(1, min(-(-width // THREADS), MOST_BLOCKS))


def stored_type(dtype: np.dtype) -> np.dtype:
    """The dtype that kernels know an element by: that of its bits for one of 16 bits and for a flag."""
    if dtype in _DECODE:
        return np.dtype(np.uint16)
    return np.dtype(np.uint8) if dtype == np.bool_ else dtype


@register_jitable
def place_of(per_row):
    """The row of this thread's block, its first element in it, and how far on the next one is."""
    row = np.uint32(cuda.blockIdx.x) // np.uint32(per_row)
    block = np.int64(np.uint32(cuda.blockIdx.x) - row * np.uint32(per_row))
    return np.int64(row), block * THREADS + np.int64(cuda.threadIdx.x), per_row * THREADS


@kernel("iiiii", THREADS)
def fill(dtype: np.dtype) -> Any:
    """``(to, width, stride, per_row, value)``: set each element to the one at the address ``value``."""
    zero, size = dtype.type(0), dtype.itemsize

    def fill(to, width, stride, per_row, value):
        number = load(value, zero)
        row, i, step = place_of(per_row)
        while i < width:
            store(to + row * stride + i * size, number)
            i += step

    return fill


@kernel("iiiiii", THREADS)
def copy(source: np.dtype, dtype: np.dtype) -> Any:
    """``(to, stride, from, stride, width, per_row)``: copy elements, converted from one dtype to another."""
    given, zero = stored_type(source).type(0), stored_type(dtype).type(0)
    size_from, size = source.itemsize, dtype.itemsize
    as_it_is, cast = source == dtype, type(zero)
    decode, encode = register_jitable(_DECODE.get(source, same)), _ENCODE.get(dtype)
    nothing = np.uint32(0)

    def copy_bits(to, stride, begin, from_stride, width, per_row):
        row, i, step = place_of(per_row)
        while i < width:
            store(to + row * stride + i * size, load(begin + row * from_stride + i * size, zero))
            i += step

    def copy_numbers(to, stride, begin, from_stride, width, per_row):
        row, i, step = place_of(per_row)
        while i < width:
            x = decode(load(begin + row * from_stride + i * size_from, given))
            store(to + row * stride + i * size, cast(x))
            i += step

    def copy_encoded(to, stride, begin, from_stride, width, per_row):
        row, i, step = place_of(per_row)
        while i < width:
            x = decode(load(begin + row * from_stride + i * size_from, given))
            store(to + row * stride + i * size, encode(x, nothing))
            i += step

    if as_it_is:
        return copy_bits
    return copy_numbers if encode is None else copy_encoded


@kernel("iiii", THREADS)
def scale(dtype: np.dtype) -> Any:
    """``(to, size, per_row, factor)``: multiply elements by the number at the address ``factor``, of the type
    that is computed with."""
    zero, size = stored_type(dtype).type(0), dtype.itemsize
    like = np.float64(0) if dtype == np.float64 else np.float32(0)
    decode, encode = register_jitable(_DECODE.get(dtype, same)), _ENCODE.get(dtype)
    nothing = np.uint32(0)

    def scale_numbers(to, width, per_row, factor):
        by = load(factor, like)
        _, i, step = place_of(per_row)
        while i < width:
            store(to + i * size, load(to + i * size, zero) * by)
            i += step

    def scale_encoded(to, width, per_row, factor):
        by = load(factor, like)
        _, i, step = place_of(per_row)
        while i < width:
            store(to + i * size, encode(decode(load(to + i * size, zero)) * by, nothing))
            i += step

    return scale_numbers if encode is None else scale_encoded


@kernel("iiii", THREADS)
def clip(dtype: np.dtype) -> Any:
    """``(to, size, per_row, limit)``: clip elements to the number at the address ``limit``, of their own
    dtype, either way; NaN stays NaN."""
    zero, size = stored_type(dtype).type(0), dtype.itemsize
    decode, encode = register_jitable(_DECODE.get(dtype, same)), _ENCODE.get(dtype)
    nothing = np.uint32(0)

    def clip_numbers(to, width, per_row, limit):
        most = load(limit, zero)
        _, i, step = place_of(per_row)
        while i < width:
            x = load(to + i * size, zero)
            if x > most:
                store(to + i * size, most)
            elif x < -most:
                store(to + i * size, -most)
            i += step

    def clip_encoded(to, width, per_row, limit):
        most = decode(load(limit, zero))
        _, i, step = place_of(per_row)
        while i < width:
            x = decode(load(to + i * size, zero))
            if x > most:
                store(to + i * size, encode(most, nothing))
            elif x < -most:
                store(to + i * size, encode(-most, nothing))
            i += step

    return clip_numbers if encode is None else clip_encoded
