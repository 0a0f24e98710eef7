"""Arithmetic of PTX that NumPy has no function for, compiled when it is first met."""

import functools
from collections.abc import Callable

import numpy as np
from numba import njit, types, vectorize
from numba.extending import intrinsic


@intrinsic
def _fma(context, x, y, z):
    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return x(x, x, x), generate


def fma(x, y, z):
    return _fma(x, y, z)


def fmin(x, y):
    """The smaller; a number before a NaN, and -0 before +0."""
    if x != x:
        return y
    if y != y:
        return x
    if x == y:
        return x if np.signbit(x) else y
    return x if x < y else y


def fmax(x, y):
    if x != x:
        return y
    if y != y:
        return x
    if x == y:
        return y if np.signbit(x) else x
    return x if x > y else y


def high_unsigned(x, y):
    """The upper half of the product of 64-bit words."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    a, b, c, d = x >> half, x & low, y >> half, y & low
    middle = a * d + ((b * d) >> half)
    return a * c + (middle >> half) + ((b * c + (middle & low)) >> half)


_high_unsigned = njit(high_unsigned)


def high_signed(x, y):
    high = np.int64(_high_unsigned(np.uint64(x), np.uint64(y)))
    if x < 0:
        high -= y
    if y < 0:
        high -= x
    return high


def brev(x):
    out = np.uint64(0)
    for _ in range(64):
        out = (out << np.uint64(1)) | (x & np.uint64(1))
        x >>= np.uint64(1)
    return out


def clz(x):
    count = 0
    for bit in range(63, -1, -1):
        if (x >> np.uint64(bit)) & np.uint64(1):
            break
        count += 1
    return np.uint32(count)


def prmt(a, b, c):
    """Four bytes, each picked out of eight by four bits, of which the last copies the byte's sign."""
    whole, out = (np.uint64(b) << np.uint64(32)) | np.uint64(a), np.uint64(0)
    for k in range(4):
        pick = np.uint64((c >> np.uint32(4 * k)) & np.uint32(15))
        byte = (whole >> (np.uint64(8) * (pick & np.uint64(7)))) & np.uint64(255)
        if pick & np.uint64(8):
            byte = np.uint64(255) if byte & np.uint64(128) else np.uint64(0)
        out |= byte << np.uint64(8 * k)
    return np.uint32(out)


def bfe(x, first, count, width, signed):
    """``count`` bits of ``x`` from ``first``; past the end there is the sign, or zeros."""
    p, n = np.int64(first & np.uint32(255)), np.int64(count & np.uint32(255))
    sign = np.uint64(0)
    if signed and n > 0:
        sign = (x >> np.uint64(min(p + n - 1, width - 1))) & np.uint64(1)
    out = np.uint64(0)
    for k in range(width):
        bit = (x >> np.uint64(p + k)) & np.uint64(1) if k < n and p + k < width else sign
        out |= bit << np.uint64(k)
    return out


def bfi(a, b, first, count, width):
    """``b`` with ``count`` bits from ``first`` replaced by the low ones of ``a``."""
    p, n = np.int64(first & np.uint32(255)), np.int64(count & np.uint32(255))
    out = b
    for k in range(n):
        if p + k >= width:
            break
        one = np.uint64(1) << np.uint64(p + k)
        out = (out | one) if (a >> np.uint64(k)) & np.uint64(1) else (out & ~one)
    return out


def bfind(x, width, signed, shift):
    """The place of the highest bit that differs from the sign; all ones if there is none."""
    if signed and (x >> np.uint64(width - 1)) & np.uint64(1):
        x = ~x
    for bit in range(width - 1, -1, -1):
        if (x >> np.uint64(bit)) & np.uint64(1):
            return np.uint32(width - 1 - bit if shift else bit)
    return np.uint32(0xFFFFFFFF)


def funnel(low, high, by, left, wrap):
    n = np.uint64(by & np.uint32(31)) if wrap else np.uint64(min(by, np.uint32(32)))
    whole = (np.uint64(high) << np.uint64(32)) | np.uint64(low)
    return np.uint32((whole << n) >> np.uint64(32)) if left else np.uint32(whole >> n)


U32, U64, I64, FLAG = types.uint32, types.uint64, types.int64, types.boolean
_SIGNATURES = {
    fma: [t(t, t, t) for t in (types.float32, types.float64)],
    fmin: [t(t, t) for t in (types.float32, types.float64)],
    fmax: [t(t, t) for t in (types.float32, types.float64)],
    high_unsigned: [U64(U64, U64)],
    high_signed: [I64(I64, I64)],
    brev: [U64(U64)],
    clz: [U32(U64)],
    prmt: [U32(U32, U32, U32)],
    bfe: [U64(U64, U32, U32, I64, FLAG)],
    bfi: [U64(U64, U64, U32, U32, I64)],
    bfind: [U32(U64, I64, FLAG, FLAG)],
    funnel: [U32(U32, U32, U32, FLAG, FLAG)],
}


@functools.cache
def ufunc(function: Callable) -> np.ufunc:
    return vectorize(_SIGNATURES[function], cache=True)(function)
