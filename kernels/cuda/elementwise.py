"""What is done to the elements of one array: set, copied, converted, scaled and clipped.

An array of any strides is seen as ``rows`` of ``width`` elements. So many threads of a block as 2 to the
power ``bits`` take a row, which ``per_row`` blocks share out: short rows have many to a block.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numba import cuda
from numba.extending import register_jitable

from fastopt.kernels.cuda.integers import unchanged
from fastopt.kernels.cuda.lanes import VECTOR_BYTES
from fastopt.kernels.cuda.launch import kernel
from fastopt.kernels.cuda.memory import load, load_vector, store, store_vector
from fastopt.kernels.formats import float_of_bfloat16, same, to_half, to_nearest_bfloat16
from fastopt.kernels.intrinsics import float_of_half
from fastopt.kernels.source import define

THREAD_BITS = 8
THREADS = 1 << THREAD_BITS
MOST_BLOCKS = 2048  # of a row, then each goes on with elements further on
_HALF, _BFLOAT16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
_DECODE = {_HALF: float_of_half, _BFLOAT16: float_of_bfloat16}
_ENCODE = {_HALF: to_half, _BFLOAT16: to_nearest_bfloat16}
_BITS = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


def stored_type(dtype: np.dtype) -> np.dtype:
    """The dtype that kernels know an element by: that of its bits for one of 16 bits and for a flag."""
    if dtype in _DECODE:
        return np.dtype(np.uint16)
    return np.dtype(np.uint8) if dtype == np.bool_ else dtype


def blocks_for(size: int) -> int:
    """How many blocks share out elements next to each other."""
    return max(1, min(-(-size // THREADS), MOST_BLOCKS))


class Rows(NamedTuple):
    """Elements of arrays of the same shape, as rows.

    offsets: in bytes, of the first of each array. strides, steps: of each array, in bytes, from a row to the
    next and from an element to the next.
    """

    offsets: tuple[int, ...]
    rows: int
    width: int
    strides: tuple[int, ...]
    steps: tuple[int, ...]

    @property
    def per_row(self) -> int:
        """How many blocks share out a row."""
        return blocks_for(self.width)

    @property
    def bits(self) -> int:
        """Of how many threads of a block share out a row."""
        return min((self.width - 1).bit_length(), THREAD_BITS)

    @property
    def blocks(self) -> int:
        """How many there are."""
        return -(-self.rows // (THREADS >> self.bits)) * self.per_row


def rows_of(shape: Sequence[int], *strides: Sequence[int]) -> Iterator[Rows]:
    """All elements of arrays of a shape, which have these strides in bytes: few launches, since axes over
    which all arrays go on evenly are one. None for arrays without elements."""
    if 0 in shape:
        return
    axes = [(n, *own) for n, *own in zip(shape, *strides, strict=True) if n > 1]
    axes.sort(key=lambda axis: -abs(axis[1]))
    merged: list[tuple[int, ...]] = []
    for n, *own in axes:
        if merged and all(outer == n * inner for outer, inner in zip(merged[-1][1:], own, strict=True)):
            merged[-1] = merged[-1][0] * n, *own
        else:
            merged.append((n, *own))
    still = 1, *(0 for _ in strides)
    width, *steps = merged.pop() if merged else still
    longest = max(range(len(merged)), key=lambda k: merged[k][0], default=None)
    rows, *row_strides = still if longest is None else merged.pop(longest)
    for place in np.ndindex(*(axis[0] for axis in merged)):
        offsets = [
            sum(k * axis[1 + a] for k, axis in zip(place, merged, strict=True)) for a in range(len(strides))
        ]
        yield Rows(tuple(offsets), rows, width, tuple(row_strides), tuple(steps))


@register_jitable
def place_of(per_row, bits):
    """The row of this thread, its first element in it, and how far on the next one is."""
    group = np.uint32(cuda.blockIdx.x) // np.uint32(per_row)
    part = np.int64(np.uint32(cuda.blockIdx.x) - group * np.uint32(per_row))
    thread = np.int64(cuda.threadIdx.x)
    row = (np.int64(group) << (THREAD_BITS - bits)) + (thread >> bits)
    first = (part << bits) + (thread & ((np.int64(1) << bits) - 1))
    return row, first, per_row << bits


@kernel("iiiiiiii", THREADS)
def fill(itemsize: int) -> Any:
    """``(to, stride, step, rows, width, per_row, bits, value)``: set elements to the bits of ``value``."""
    cast = _BITS[itemsize].type

    def fill(to, stride, step, rows, width, per_row, bits, value):
        number = cast(value)
        row, i, further = place_of(per_row, bits)
        if row < rows:
            while i < width:
                store(to + row * stride + i * step, number)
                i += unchanged(further)

    return fill


@kernel("iiiiiiiiii", THREADS)
def copy(source: np.dtype, dtype: np.dtype) -> Any:
    """``(to, stride, step, from, stride, step, rows, width, per_row, bits)``: copy elements, converted from
    one dtype to another."""
    given, kept = stored_type(source), stored_type(dtype)
    decode, encode = _DECODE.get(source, same), _ENCODE.get(dtype)
    if source == dtype:
        given = kept = _BITS[dtype.itemsize]
        value = "x"
    elif encode is None:
        value = "np.uint8(decode(x) != 0)" if dtype == np.bool_ else "cast(decode(x))"
    else:
        value = "encode(decode(x), nothing)"
    return define(
        "copy",
        "to, stride, step, begin, from_stride, from_step, rows, width, per_row, bits",
        "row, i, further = place_of(per_row, bits)",
        "if row < rows:",
        "    to, begin = to + row * stride, begin + row * from_stride",
        "    while i < width:",
        "        x = load(begin + i * from_step, zero)",
        f"        store(to + i * step, {value})",
        "        i += unchanged(further)",
        np=np,
        unchanged=unchanged,
        place_of=place_of,
        load=load,
        store=store,
        zero=given.type(0),
        cast=kept.type,
        decode=register_jitable(decode),
        encode=register_jitable(encode or same),
        nothing=np.uint32(0),
    )


def vector_length(dtype: np.dtype, address: int) -> int:
    """How many elements of a C-contiguous array are read at once."""
    length = VECTOR_BYTES // max(dtype.itemsize, 4)
    return length if address % (length * dtype.itemsize) == 0 else 1


def _in_place(dtype: np.dtype, length: int, make: Callable[[Any], Callable]) -> Callable:
    """``(to, size, number)``: replace elements next to each other by what ``make(like)(x, number)`` makes of
    them, ``length`` at once; ``like``: of the type that is computed with."""
    like = np.float64(0) if dtype == np.float64 else np.float32(0)
    changed = [f"encode(change(decode(v[{e}]), number), nothing)" for e in range(length)]
    encode: Callable = _ENCODE.get(dtype, lambda x, random: x)
    return define(
        "in_place",
        "to, size, number",
        "number = cast(number)",
        f"i = (np.int64(cuda.blockIdx.x) * {THREADS} + np.int64(cuda.threadIdx.x)) * {length}",
        f"further = np.int64(cuda.gridDim.x) * {THREADS * length}",
        "while i < size:",
        f"    if i + {length} <= size:",
        f"        v = load_vector(to + i * {dtype.itemsize}, zero, {length})",
        f"        store_vector(to + i * {dtype.itemsize}, ({', '.join(changed)},))",
        "    else:",
        "        for k in range(i, size):",
        f"            v = load_vector(to + k * {dtype.itemsize}, zero, 1)",
        f"            store_vector(to + k * {dtype.itemsize}, ({changed[0]},))",
        "    i += further",
        np=np,
        cuda=cuda,
        load_vector=load_vector,
        store_vector=store_vector,
        zero=stored_type(dtype).type(0),
        cast=type(like),
        decode=register_jitable(_DECODE.get(dtype, same)),
        encode=register_jitable(encode),
        change=register_jitable(make(like)),
        nothing=np.uint32(0),
    )


@kernel("iif", THREADS)
def scale(dtype: np.dtype, length: int) -> Any:
    """``(to, size, factor)``: multiply elements next to each other, in the type that is computed with."""
    return _in_place(dtype, length, lambda like: lambda x, factor: x * factor)


@kernel("iif", THREADS)
def clip(dtype: np.dtype, length: int) -> Any:
    """``(to, size, limit)``: clip elements next to each other to a limit, which is one of their own dtype,
    either way; NaN stays NaN."""

    def clipped(x, limit):
        if x > limit:
            return limit
        return -limit if x < -limit else x

    return _in_place(dtype, length, lambda like: clipped)
