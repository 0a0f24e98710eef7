"""Sums of squares in float64, in two stages, each in a fixed order: they do not depend on the grid.

A block of threads sums up SUMMED elements of the concatenation of all arrays, whichever arrays they belong
to, in the order of the CPU's lanes: its partial sums have the CPU's bits. One block of threads then adds up
the partial sums. So it does not matter how elements are divided into arrays.

A block of elements that lies within one array is read without a look at where arrays end, and by whole
vectors where its address allows it.

Bytes moved: each element read, once; where there is float64, once more if squares leave its range.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.extending import register_jitable

from fastopt.kernels.cuda import sums
from fastopt.kernels.cuda.lanes import VECTOR_BYTES
from fastopt.kernels.cuda.launch import kernel
from fastopt.kernels.cuda.memory import (
    ALL_LANES,
    WARP,
    integer,
    lane_and_warp,
    last_at_most,
    load,
    load_if,
    load_vector,
    store,
)
from fastopt.kernels.element import NORM_EPS
from fastopt.kernels.formats import Format
from fastopt.kernels.magnitude import unit_of
from fastopt.kernels.source import define

SUMMED = 8_192  # elements whose squares are summed up apart
LANES = 512  # sums that grow side by side: lane l has the elements l, l + LANES, ... of a block
THREADS = 128
OWN = LANES // THREADS  # lanes of a thread
ROUNDS = SUMMED // LANES
WORD = 4
TOGETHER = {2: 8, 4: 8, 8: 4}  # by an element's bytes, rounds whose loads are on their way at the same time

# What a norm has in memory of the device: float64 numbers, and then the sum of each part
RESULT_TOTAL, RESULT_UNIT, RESULT_FACTOR, RESULT_SUMS = range(4)
UNROLLED = 8  # partial sums that a thread reads at a time

_DOUBLE, _ONE = np.float64(0), np.float64(1)


@register_jitable
def is_done(unit):
    """Whether all has been summed up in the unit at the address ``unit``, if that is not 0: it is 1."""
    return unit != 0 and load(unit, _DOUBLE) == _ONE


@register_jitable
def scale_of(scale, unit):
    """What numbers are multiplied by before they are squared: ``scale``, or one over the unit at an
    address."""
    return scale if unit == 0 else _ONE / load(unit, _DOUBLE)


@kernel("iiifiii", THREADS)
def sum_squares(kind: Format, like: np.dtype) -> Any:
    """``(addresses, bases, arrays, scale, unit, blocks, partials)``: the sum of squares of each block of
    elements, times ``scale**2``.

    addresses, bases: int64, of each array where it lies and the number of its first element, and that of all.
    unit: the address of the float64 that elements are divided by in place of being scaled, or 0; where it is
    1 nothing is done. partials: float64 [blocks].
    """
    add_lanes = register_jitable(_adder_of_lanes(kind, like))
    sum_of_lanes = register_jitable(_adder_of_lane())

    def sum_squares(addresses, bases, arrays, scale, unit, blocks, partials):
        shared = cuda.shared.array(LANES, np.float64)
        lane, warp = lane_and_warp()
        own = scale_of(scale, unit)
        block = blocks if is_done(unit) else np.int64(cuda.blockIdx.x)
        while block < blocks:
            first = block * SUMMED
            t = last_at_most(bases, arrays, first)
            add_lanes(addresses, bases, t, first, integer(bases, arrays), own, warp * WARP + lane, shared)
            cuda.syncthreads()
            if warp == 0:
                total = sum_of_lanes(shared, lane)
                for distance in (16, 8, 4, 2, 1):
                    total += cuda.shfl_xor_sync(ALL_LANES, total, distance)
                if lane == 0:
                    store(partials + block * 8, total)
            cuda.syncthreads()  # before the lanes of the next block are written
            block += np.int64(cuda.gridDim.x)

    return sum_squares


def _adder_of_lanes(kind: Format, like: np.dtype) -> Callable:
    """``(addresses, bases, t, first, end, scale, thread, shared)``: set ``shared`` to the sums of the lanes
    of the block of elements from ``first`` on, which begins in array ``t``; there are ``end`` elements."""
    size = kind.itemsize(like)
    return define(
        "add_lanes",
        "addresses, bases, t, first, end, scale, thread, shared",
        "base, following = integer(bases, t), integer(bases, t + 1)",
        f"{' = '.join(f's{e}' for e in range(OWN))} = np.float64(0)",
        f"at = integer(addresses, t) + (first - base) * {size}",
        "if first + SUMMED > following:",
        *(f"    {line}" for line in _of_several(size)),
        f"elif at & {min(OWN * size, VECTOR_BYTES) - 1} == 0:",
        *(f"    {line}" for line in _by_vectors(size)),
        "else:",
        *(f"    {line}" for line in _one_by_one(size)),
        np=np,
        integer=integer,
        load=load,
        load_vector=load_vector,
        decode=kind.decode,
        zero=kind.zero(like),
        word=np.uint32(0),
        SUMMED=SUMMED,
    )


def _by_vectors(size: int) -> list[str]:
    """Lines that add up a block of one array: the lanes of a thread are next to each other. Elements of 16
    bits come in words."""
    packed = size < WORD
    kind, count = ("word", OWN * size // WORD) if packed else ("zero", min(OWN, VECTOR_BYTES // size))
    elements = OWN if packed else count  # of a vector
    vectors = [
        f"v{r}_{e} = load_vector(at + {(r * LANES + e) * size}, {kind}, {count})"
        for r in range(TOGETHER[size])
        for e in range(0, OWN, elements)
    ]
    values = [
        [_element(f"v{r}_{e - e % elements}", e % elements, packed) for e in range(OWN)]
        for r in range(TOGETHER[size])
    ]
    to_shared = [f"shared[thread * {OWN} + {e}] = s{e}" for e in range(OWN)]
    return [f"at += thread * {OWN * size}", *_rounds(size, vectors, values), *to_shared]


def _element(vector: str, e: int, packed: bool) -> str:
    """The expression of element ``e`` of a vector, of words with two each if ``packed``."""
    return f"np.uint16({vector}[{e >> 1}] >> np.uint32({e % 2 * 16}))" if packed else f"{vector}[{e}]"


def _one_by_one(size: int) -> list[str]:
    """Lines that add up a block of one array: the lanes of a thread are THREADS apart, so that neighbours
    read elements next to each other."""
    loads = [
        f"v{r}_{e} = load(at + {(r * LANES + e * THREADS) * size}, zero)"
        for r in range(TOGETHER[size])
        for e in range(OWN)
    ]
    values = [[f"v{r}_{e}" for e in range(OWN)] for r in range(TOGETHER[size])]
    return [f"at += thread * {size}", *_rounds(size, loads, values), *_SPREAD]


_SPREAD = [f"shared[thread + {e * THREADS}] = s{e}" for e in range(OWN)]


def _rounds(size: int, loads: list[str], values: list[list[str]]) -> list[str]:
    """A loop over the rounds of a block: what it loads, and the elements, of each round and lane, the squares
    of which it adds."""
    lines = [*loads]
    for own in values:
        for e, value in enumerate(own):
            lines += [f"x = np.float64(decode({value})) * scale", f"s{e} += x * x"]
    lines.append(f"at += {len(values) * LANES * size}")
    return [f"for _ in range({ROUNDS // len(values)}):", *(f"    {line}" for line in lines)]


def _of_several(size: int) -> list[str]:
    """Lines that add up a block in which arrays end."""
    lines = ["last = min(first + SUMMED, end)", "i = first + thread", f"for _ in range({ROUNDS}):"]
    for e in range(OWN):
        lines += [
            "    if i < last:",
            "        while i >= following:",
            "            t += 1",
            "            base, following = following, integer(bases, t + 1)",
            f"        v = load(integer(addresses, t) + (i - base) * {size}, zero)",
            "        x = np.float64(decode(v)) * scale",
            f"        s{e} += x * x",
            f"    i += {THREADS}",
        ]
    return [*lines, *_SPREAD]


def _adder_of_lane() -> Callable:
    """``(shared, lane)``: the sum of the lanes whose numbers are ``lane`` and a multiple of a warp's: of
    LANES sums halves are added until a warp's are left."""
    items = [f"shared[lane + {first}]" for first in range(0, LANES, WARP)]
    while len(items) > 1:
        half = len(items) // 2
        items = [f"({a} + {b})" for a, b in zip(items[:half], items[half:], strict=True)]
    return define("sum_of_lanes", "shared, lane", f"return {items[0]}")


@kernel("iiiiiiii", sums.THREADS)
def add_partials() -> Any:
    """``(partials, count, part, dense, parts, checked, again, result)``: add up the partial sums of a part of
    what is summed up and, after the last of the parts, add up theirs: first of the ``dense`` ones, then those
    of the others.

    result: the address of what a norm has. checked: whether the unit is to become the one that the total asks
    for, else 1. again: whether all was summed up in that unit; if it is 1 nothing is done.
    """
    add_up = register_jitable(_adder_of_partials())

    def add_partials(partials, count, part, dense, parts, checked, again, result):
        if again == 0 or load(result + RESULT_UNIT * 8, _DOUBLE) != _ONE:
            thread = np.int64(cuda.threadIdx.x)
            total = sums.block_sum(add_up(partials, count, thread))
            if thread == 0:
                own = result + RESULT_SUMS * 8
                store(own + part * 8, total)
                if part == parts - 1:
                    of_dense = of_rows = _DOUBLE
                    for k in range(dense):
                        of_dense += load(own + k * 8, _DOUBLE)
                    for k in range(dense, parts):
                        of_rows += load(own + k * 8, _DOUBLE)
                    total = of_dense + of_rows
                    store(result + RESULT_TOTAL * 8, total)
                    if again == 0:
                        store(result + RESULT_UNIT * 8, unit_of(total) if checked != 0 else _ONE)

    return add_partials


def _adder_of_partials() -> Callable:
    """``(partials, count, thread)``: the sum of a thread's partial sums."""
    apart = sums.THREADS
    loads = [f"x{k} = load_if(i + {k * apart} < count, at + {k * apart * 8}, zero)" for k in range(UNROLLED)]
    return define(
        "add_up",
        "partials, count, thread",
        "total = zero",
        "i = thread",
        "while i < count:",
        "    at = partials + i * 8",
        *(f"    {line}" for line in loads),
        *(f"    total += x{k}" for k in range(UNROLLED)),
        f"    i += {UNROLLED * apart}",
        "return total",
        load_if=load_if,
        zero=_DOUBLE,
    )


@kernel("ffii", 1)
def find_factor() -> Any:
    """``(grad_scale, max_norm, result, factor)``: set the float64 ``factor`` to what gradients whose norm,
    times ``grad_scale``, is to be ``max_norm`` at most are multiplied by; NaN for a NaN norm."""

    def find_factor(grad_scale, max_norm, result, factor):
        norm = math.sqrt(load(result + RESULT_TOTAL * 8, _DOUBLE)) * load(result + RESULT_UNIT * 8, _DOUBLE)
        found = max_norm / (grad_scale * norm + NORM_EPS)
        store(factor, _ONE if found > _ONE else found)

    return find_factor
