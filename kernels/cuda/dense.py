"""Dense updates: every element of any number of arrays, in one pass and one launch.

A block of threads takes chunks of arrays, found by a binary search in the numbers of the arrays' first
chunks. A lane of a warp works on as many elements next to each other as are 16 bytes of the widest of the
arrays, its neighbours on those beside them. Where arrays have codes, a warp takes a block of codes at a
time, whose largest it finds together. Where an address is not aligned, and at the end of an array, the same
lanes read and write the same elements one by one.

Bytes moved: each of the parameter and the state read and written, the gradient read; for float32 Adam 28 an
element.
"""

from collections.abc import Callable

import numpy as np
from numba import cuda
from numba.extending import register_jitable

from fastopt.kernels.cuda.elements import Code, prototypes
from fastopt.kernels.cuda.launch import Kernel, kernel
from fastopt.kernels.cuda.layout import ARRAY_ALIGNED, ARRAY_SHARED, ARRAY_SIZE, array_columns
from fastopt.kernels.cuda.memory import (
    WARP,
    integer,
    lane_and_warp,
    last_at_most,
    meet,
    numbers_at,
    warp_max,
)
from fastopt.kernels.cuda.vectors import Vectors
from fastopt.kernels.element import unpack
from fastopt.kernels.formats import BLOCK, larger, scale_from
from fastopt.kernels.layout import ARRAY_NUMBERS, ARRAY_POSITION
from fastopt.kernels.rule import RULES
from fastopt.kernels.source import define

THREADS = 256
WARPS = THREADS // WARP
SMALLEST_CHUNK = WARPS * BLOCK  # elements that a block of threads takes at a time, a multiple of every run


def update_arrays(code: Code) -> Kernel:
    """``(table, bases, arrays, keys, numbers, chunk, zero_grads)``: update arrays and their state.

    table: rows of layout.py. bases: int64, the number of each array's first chunk, and that of all. keys:
    int64, of the random bits, for each row of hyperparameters. numbers: rows of hyperparameters, which arrays
    name or, by a rule with a trust ratio, one for each array, of the type that is computed with. chunk:
    elements, a multiple of SMALLEST_CHUNK. zero_grads: whether gradients become 0.
    """
    return _update_singles(code) if code.compute == np.float32 else _update_doubles(code)


def _update_source(code: Code) -> Callable:
    h, c, like = prototypes(code)
    columns, width, size = array_columns(len(code.formats)), len(h) + len(c), like.itemsize
    of_c = len(h) * size
    rated = RULES[code.h].trust_ratio is not None
    vectors = Vectors(code.formats, code.compute)
    update_run, run = register_jitable(_update_of_run(vectors)), vectors.run

    def update_arrays(table, bases, arrays, keys, numbers, chunk, zero_grads):
        lane, warp = lane_and_warp()
        block = np.int64(cuda.blockIdx.x)
        chunks = integer(bases, arrays)
        while block < chunks:
            t = last_at_most(bases, arrays, block)
            row = table + t * columns * 8
            first = (block - integer(bases, t)) * chunk
            last = min(first + chunk, integer(row, ARRAY_SIZE))
            named = integer(row, ARRAY_SHARED + ARRAY_NUMBERS)
            own = numbers + (t if rated else named) * width * size
            own_h = unpack(h, numbers_at(h, own, like), like)
            own_c = unpack(c, numbers_at(c, own + of_c, like), like)
            key, position = integer(keys, named), integer(row, ARRAY_SHARED + ARRAY_POSITION)
            aligned = integer(row, ARRAY_ALIGNED) != 0
            at = first + warp * run
            while at < last:
                update_run(own_h, own_c, row, aligned, at, last, key, position, lane, zero_grads)
                at += WARPS * run
            block += np.int64(cuda.gridDim.x)

    return update_arrays


# With 128 registers a thread, two blocks of threads are on a multiprocessor; none needs more but float64 with
# codes.
_update_singles = kernel("iiiiiii", THREADS, 128)(_update_source)
_update_doubles = kernel("iiiiiii", THREADS)(_update_source)


def _update_of_run(vectors: Vectors) -> Callable:
    """The function that updates the elements of a warp from ``at`` on, of an array of which those before
    ``last`` are the block's."""
    elements = vectors.elements
    lines = vectors.opening()
    for j in range(vectors.count):
        lines += vectors.reads(j)
    known = [(m, place) for m, place in enumerate(elements.outputs) if place is not None]
    for j in range(vectors.count):
        for e in range(vectors.length):
            given = f"h, c, key, position, i{j} + {e}, {vectors.given(j, e)}"
            lines.append(f"n{j}_{e} = element({given})")
        lines += vectors.stores(known, "n", j)
        lines += ["if zero_grads:", *(f"    {line}" for line in vectors.clearing(j))]
    if elements.coded:
        lines += coding(vectors)
    names = {**vectors.names, "element": elements.element, "encode": elements.encode, "meet": meet}
    names |= {"larger_if": larger_if, "scale_from": scale_from, "warp_max": warp_max}
    arguments = "h, c, row, aligned, at, last, key, position, lane, zero_grads"
    return define("update_run", arguments, *lines, "return None", **names)


@register_jitable
def larger_if(counts, largest, x):
    """What :func:`larger` gives for the number ``x``, if that counts."""
    return larger(largest, x) if counts else largest


def coding(vectors: Vectors) -> list[str]:
    """Lines that find the scales of a block, and write them and its codes."""
    coded = vectors.elements.coded
    numbers = [m for m, place in enumerate(vectors.elements.outputs) if place is None]
    lines = [f"l{k} = np.uint32(0)" for k in coded]
    for j in range(vectors.count):
        for e in range(vectors.length):
            found = zip(numbers, coded, strict=True)
            lines += [f"l{k} = larger_if(i{j} + {e} < last, l{k}, n{j}_{e}[{m}])" for m, k in found]
    for k in coded:
        lines += [f"z{k} = scale_from(warp_max(l{k}))", f"w{k} = inverse{k}(z{k})"]
    lines += ["meet()", "if lane == 0:"]  # every lane has read the scales that the first one writes
    lines += [f"    store(s{k}, z{k})" for k in coded]
    inverses = ", ".join(f"w{k}" for k in coded)
    codes = [(n, vectors.elements.inputs[k]) for n, k in enumerate(coded)]
    for j in range(vectors.count):
        for e in range(vectors.length):
            given = ", ".join(f"n{j}_{e}[{m}]" for m in numbers)
            lines.append(f"c{j}_{e} = encode(key, position, i{j} + {e}, {given}, {inverses})")
        lines += vectors.stores(codes, "c", j)
    return lines
