"""Loads and stores at addresses in the memory of the device, and what the lanes of a warp do together.

Kernels get addresses, int64, so that one launch can work on any number of arrays. An address that was read
from a table is an integer, of which the compiler can't know that it is not one of shared or of local memory:
these intrinsics say that it is global. ``count`` elements are one instruction of at most 16 bytes, and have
to be aligned to their size together.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import cuda, types
from numba.extending import intrinsic, overload, register_jitable

from fastopt.kernels.source import define

GLOBAL = 1  # the number of the address space
WARP = 32  # lanes
ALL_LANES = 0xFFFFFFFF


def _kind(context: Any, dtype: Any, count: int) -> ir.Type:
    element = context.get_data_type(dtype)
    return element if count == 1 else ir.VectorType(element, count)


def _bytes(dtype: Any) -> int:
    return dtype.bitwidth // 8


@intrinsic(prefer_literal=True)
def load_vector(context: Any, address: Any, like: Any, count: Any) -> Any:
    """A tuple of ``count`` elements of the type of the number ``like`` at ``address``, by one instruction."""
    n, dtype = count.literal_value, types.unliteral(like)

    def generate(context, builder, signature, arguments):
        kind = _kind(context, dtype, n)
        pointer = builder.inttoptr(arguments[0], ir.PointerType(kind, GLOBAL))
        value = builder.load(pointer, align=n * _bytes(dtype))
        if n == 1:
            return context.make_tuple(builder, signature.return_type, [value])
        parts = [builder.extract_element(value, ir.IntType(32)(k)) for k in range(n)]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(dtype, n)(types.int64, dtype, count), generate


@intrinsic(prefer_literal=True)
def load_each(context: Any, address: Any, like: Any, count: Any) -> Any:
    """The same, one by one: for what is aligned to one element alone."""
    n, dtype = count.literal_value, types.unliteral(like)

    def generate(context, builder, signature, arguments):
        element = context.get_data_type(dtype)
        start = builder.inttoptr(arguments[0], ir.PointerType(element, GLOBAL))
        pointers = [builder.gep(start, [ir.IntType(64)(k)], source_etype=element) for k in range(n)]
        values = [builder.load(p, align=_bytes(dtype), typ=element) for p in pointers]
        return context.make_tuple(builder, signature.return_type, values)

    return types.UniTuple(dtype, n)(types.int64, dtype, count), generate


@intrinsic(prefer_literal=True)
def store_vector(context: Any, address: Any, values: Any) -> Any:
    """Store a tuple at ``address``, by one instruction."""
    n, dtype = len(values), types.unliteral(values[0])

    def generate(context, builder, signature, arguments):
        kind = _kind(context, dtype, n)
        pointer = builder.inttoptr(arguments[0], ir.PointerType(kind, GLOBAL))
        if n == 1:
            value = builder.extract_value(arguments[1], 0)
        else:
            value = ir.Constant(kind, ir.Undefined)
            for k in range(n):
                part = builder.extract_value(arguments[1], k)
                value = builder.insert_element(value, part, ir.IntType(32)(k))
        builder.store(value, pointer, align=n * _bytes(dtype))
        return context.get_dummy_value()

    return types.void(types.int64, values), generate


@intrinsic
def load(context: Any, address: Any, like: Any) -> Any:
    """The element of the type of the number ``like`` at ``address``."""
    dtype = types.unliteral(like)

    def generate(context, builder, signature, arguments):
        kind = context.get_data_type(dtype)
        return builder.load(builder.inttoptr(arguments[0], ir.PointerType(kind, GLOBAL)), align=_bytes(dtype))

    return dtype(types.int64, dtype), generate


@intrinsic
def store(context: Any, address: Any, value: Any) -> Any:
    """Store one number, as it is typed, at ``address``."""
    dtype = types.unliteral(value)

    def generate(context, builder, signature, arguments):
        kind = context.get_data_type(dtype)
        pointer = builder.inttoptr(arguments[0], ir.PointerType(kind, GLOBAL))
        builder.store(arguments[1], pointer, align=_bytes(dtype))
        return context.get_dummy_value()

    return types.void(types.int64, dtype), generate


@intrinsic
def add_at(context: Any, address: Any, value: Any) -> Any:
    """Add an int64 to the one at ``address``, which other threads may add to at the same time."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.PointerType(ir.IntType(64), GLOBAL))
        builder.atomic_rmw("add", pointer, arguments[1], "monotonic")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@register_jitable
def load_if(inside, address, zero):
    """The same where it is ``inside``, else ``zero``: a branch of its own, which costs the compiler less than
    one in the middle of a long function."""
    return load(address, zero) if inside else zero


@register_jitable
def store_if(inside, address, value):
    """Store a number where it is ``inside``."""
    if inside:
        store(address, value)


@register_jitable
def integer(table, column):
    """The int64 number in a column of a row of integers at the address ``table``."""
    return load(table + column * 8, np.int64(0))


@register_jitable
def last_at_most(numbers, count, x):
    """The last of ``count`` ascending int64 numbers at an address that is ``x`` or less, else the first."""
    low, end = np.int64(0), count
    while end - low > 1:
        middle = (low + end) >> 1
        if integer(numbers, middle) <= x:
            low = middle
        else:
            end = middle
    return low


def numbers_at(prototype, address, like):
    """As many numbers, of the type of ``like``, as the named tuple ``prototype`` has fields."""
    raise NotImplementedError("kernels for the GPU run compiled alone")


@overload(numbers_at)
def _numbers_at(prototype, address, like):
    count = len(prototype.types)
    line = f"return load_each(address, like, {count})" if count else "return ()"
    return define("numbers_at", "prototype, address, like", line, load_each=load_each)


# What the lanes of a warp do together. All of them have to come


@register_jitable
def lane_and_warp():
    """The lane of this thread, and the number of its warp in its block."""
    thread = np.int64(cuda.threadIdx.x)
    return thread & 31, thread >> 5


@register_jitable
def meet():
    """Wait for the other lanes, whose stores are seen from then on."""
    cuda.syncwarp(ALL_LANES)


@register_jitable
def warp_sum(x):
    """The sum over the lanes, with the same bits in each: a + b is b + a."""
    for distance in (16, 8, 4, 2, 1):
        x += cuda.shfl_xor_sync(ALL_LANES, x, distance)
    return x


@register_jitable
def warp_max(bits):
    """The largest uint32 of the lanes, all below 2**31, as are the bits of magnitudes."""
    x = np.int32(bits)
    for distance in (16, 8, 4, 2, 1):
        y = cuda.shfl_xor_sync(ALL_LANES, x, distance)
        x = y if y > x else x
    return np.uint32(x)
