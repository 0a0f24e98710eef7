"""Dense updates: every element of any number of arrays, in one pass and one launch.

A block of threads takes chunks of arrays, found by a binary search in the numbers of the arrays' first
chunks. A lane of a warp works on as many elements next to each other as are 16 bytes of the widest of the
arrays, its neighbours on those beside them. Where arrays have codes, a warp takes a block of codes at a
time, whose largest it finds together. Where an address is not aligned, and at the end of an array, the same
lanes read and write the same elements one by one.

Bytes moved: each of the parameter and the state read and written, the gradient read; for float32 Adam 28 an
element.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import cuda
from numba.extending import register_jitable

from fastopt.kernels.cuda.elements import Code, Elements, Formats, Place, elements_of, prototypes
from fastopt.kernels.cuda.launch import kernel
from fastopt.kernels.cuda.layout import ARRAY_ALIGNED, ARRAY_SHARED, ARRAY_SIZE, PLACES, array_columns
from fastopt.kernels.cuda.memory import (
    WARP,
    integer,
    lane_and_warp,
    load,
    load_vector,
    meet,
    numbers_at,
    store,
    store_vector,
    warp_max,
)
from fastopt.kernels.element import unpack
from fastopt.kernels.formats import BLOCK, larger, scale_from
from fastopt.kernels.layout import ARRAY_NUMBERS, ARRAY_POSITION
from fastopt.kernels.rule import RULES
from fastopt.kernels.source import define

THREADS = 256
WARPS = THREADS // WARP
VECTOR_BYTES = 16
MOST_OF_A_VECTOR = 8  # elements: more of them would not fit into the registers of a thread
SMALLEST_CHUNK = WARPS * BLOCK  # elements that a block of threads takes at a time, a multiple of every run


def vector_length(members: Formats, like: np.dtype) -> int:
    """Elements that a lane works on that lie next to each other."""
    elements = elements_of(members, like)
    places = [place for place in (*elements.inputs, *elements.outputs) if place is not None]
    return min(VECTOR_BYTES // max(place.itemsize for place in places), MOST_OF_A_VECTOR)


def vectors_of_run(members: Formats, like: np.dtype) -> int:
    """How many such vectors a lane works on at a time: a warp a block, where there are codes."""
    if not elements_of(members, like).coded:
        return 1
    return BLOCK // (WARP * vector_length(members, like))


def vector_bytes(members: Formats, like: np.dtype) -> dict[int, int]:
    """By column of layout.py, to how many bytes an address has to be aligned for loads and stores of whole
    vectors."""
    elements, vector = elements_of(members, like), vector_length(members, like)
    places = [place for place in (*elements.inputs, *elements.outputs) if place is not None]
    return {column_of(place): vector * place.itemsize for place in places}


def column_of(place: Place) -> int:
    """Where the address is of an array, or of its master."""
    return PLACES + 2 * place.array + place.second


@register_jitable
def array_of(bases, arrays, number):
    """The last array whose first number, in the int64 ``bases``, is ``number`` or less."""
    low, high = np.int64(0), arrays
    while high - low > 1:
        middle = (low + high) >> 1
        if integer(bases, middle) <= number:
            low = middle
        else:
            high = middle
    return low


@kernel("iiiiiii", THREADS)
def update_arrays(code: Code) -> Any:
    """``(table, bases, arrays, keys, numbers, chunk, zero_grads)``: update arrays and their state.

    table: rows of layout.py. bases: int64, the number of each array's first chunk, and that of all. keys:
    int64, of the random bits, for each row of hyperparameters. numbers: rows of hyperparameters, which arrays
    name or, by a rule with a trust ratio, one for each array, of the type that is computed with. chunk:
    elements, a multiple of SMALLEST_CHUNK. zero_grads: whether gradients become 0.
    """
    h, c, like = prototypes(code)
    columns, width, size = array_columns(len(code.members)), len(h) + len(c), like.itemsize
    of_c = len(h) * size
    rated = RULES[code.h].trust_ratio is not None
    run = WARP * vector_length(code.members, code.compute) * vectors_of_run(code.members, code.compute)
    update_run = register_jitable(run_update(code.members, code.compute))

    def update_arrays(table, bases, arrays, keys, numbers, chunk, zero_grads):
        lane, warp = lane_and_warp()
        block = np.int64(cuda.blockIdx.x)
        chunks = integer(bases, arrays)
        while block < chunks:
            t = array_of(bases, arrays, block)
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


@functools.cache
def run_update(members: Formats, like: np.dtype) -> Callable:
    """The function that updates the elements of a warp from ``at`` on, those of an array that ends at
    ``last``."""
    elements = elements_of(members, like)
    vector, vectors = vector_length(members, like), vectors_of_run(members, like)
    names: dict[str, Any] = {"np": np, "load": load, "store": store, "meet": meet, "integer": integer}
    names |= {"load_vector": load_vector, "store_vector": store_vector, "warp_max": warp_max}
    names |= {"larger": larger, "scale_from": scale_from}
    names |= {"element": elements.element, "encode": elements.encode}
    opening = _opening(elements, names)
    offsets = [f"i{j} = at + lane * {vector} + {j * vector * WARP}" for j in range(vectors)]
    whole = [f"whole{j} = aligned and i{j} + {vector} <= last" for j in range(vectors)]
    reads = [line for j in range(vectors) for line in _reads(elements, j, vector)]
    factors = "".join(f", f{k}" for k in elements.coded)
    updates = []
    for j in range(vectors):
        for e in range(vector):
            given = ", ".join(f"v{j}_{k}[{e}]" for k in range(len(members)))
            updates.append(f"n{j}_{e} = element(h, c, key, position, i{j} + {e}, {given}{factors})")
    writes = [line for j in range(vectors) for line in _writes(elements, j, vector)]
    codes = _codes(elements, vectors, vector) if elements.coded else []
    clearing = [line for j in range(vectors) for line in _clearing(elements, j, vector)]
    return define(
        "update_run",
        "h, c, row, aligned, at, last, key, position, lane, zero_grads",
        *opening,
        *offsets,
        *whole,
        *reads,
        *updates,
        *writes,
        *codes,
        *clearing,
        "return None",
        **names,
    )


def _name(place: Place) -> str:
    """That of the address of an array, or of its master."""
    return f"m{place.array}" if place.second else f"a{place.array}"


def _opening(elements: Elements, names: dict[str, Any]) -> list[str]:
    """Lines that find the addresses of arrays and the factors of their codes."""
    lines = {}
    for place in (*elements.inputs, *elements.outputs):
        if place is not None:
            name = _name(place)
            names[f"zero_{name}"] = place.zero
            lines[name] = f"{name} = integer(row, {column_of(place)})"
    found = list(lines.values())
    for k, factor, inverse in zip(elements.coded, elements.factors, elements.inverses, strict=True):
        names |= {f"factor{k}": factor, f"inverse{k}": inverse}
        found.append(f"s{k} = integer(row, {PLACES + 2 * k + 1}) + (at >> {BLOCK.bit_length() - 1}) * 4")
        found.append(f"f{k} = factor{k}(load(s{k}, np.float32(0)))")
    return found


def _reads(elements: Elements, j: int, vector: int) -> list[str]:
    """Lines that read vector ``j`` of each array."""
    whole, part = [], []
    for place in elements.inputs:
        name = _name(place)
        target, zero = f"v{j}_{place.array}", f"zero_{name}"
        address = f"{name} + i{j} * {place.itemsize}"
        whole.append(f"    {target} = load_vector({address}, {zero}, {vector})")
        each = (
            f"load({address} + {e * place.itemsize}, {zero}) if i{j} + {e} < last else {zero}"
            for e in range(vector)
        )
        part.append(f"    {target} = ({', '.join(each)})")
    return [f"if whole{j}:", *whole, "else:", *part]


def _writes(elements: Elements, j: int, vector: int) -> list[str]:
    """Lines that write what is known of vector ``j``."""
    places = [(m, place) for m, place in enumerate(elements.outputs) if place is not None]
    return _stores(places, f"n{j}", j, vector)


def _stores(places: Sequence[tuple[int, Place]], values: str, j: int, vector: int) -> list[str]:
    """Lines that store vector ``j``: to each place the number that it is given with, of the tuple that
    ``values`` has for each element."""
    whole, part = [], []
    for m, place in places:
        vectors = "".join(f"{values}_{e}[{m}], " for e in range(vector))
        whole.append(f"    store_vector({_name(place)} + i{j} * {place.itemsize}, ({vectors}))")
    for e in range(vector):
        part.append(f"    if i{j} + {e} < last:")
        for m, place in places:
            address = f"{_name(place)} + (i{j} + {e}) * {place.itemsize}"
            part.append(f"        store({address}, {values}_{e}[{m}])")
    return [f"if whole{j}:", *whole, "else:", *part]


def _codes(elements: Elements, vectors: int, vector: int) -> list[str]:
    """Lines that find the scales of a block, and write its codes."""
    numbers = [m for m, place in enumerate(elements.outputs) if place is None]
    every = [(j, e) for j in range(vectors) for e in range(vector)]
    lines = [f"l{k} = np.uint32(0)" for k in elements.coded]
    for j, e in every:
        lines.append(f"if whole{j} or i{j} + {e} < last:")
        found = zip(numbers, elements.coded, strict=True)
        lines += [f"    l{k} = larger(l{k}, n{j}_{e}[{m}])" for m, k in found]
    for k in elements.coded:
        lines += [f"z{k} = scale_from(warp_max(l{k}))", f"w{k} = inverse{k}(z{k})"]
    lines += ["meet()", "if lane == 0:"]  # every lane has read the scales that the first one writes
    lines += [f"    store(s{k}, z{k})" for k in elements.coded]
    inverses = ", ".join(f"w{k}" for k in elements.coded)
    for j, e in every:
        given = ", ".join(f"n{j}_{e}[{m}]" for m in numbers)
        lines.append(f"c{j}_{e} = encode(key, position, i{j} + {e}, {given}, {inverses})")
    codes = [(n, elements.inputs[k]) for n, k in enumerate(elements.coded)]
    return lines + [line for j in range(vectors) for line in _stores(codes, f"c{j}", j, vector)]


def _clearing(elements: Elements, j: int, vector: int) -> list[str]:
    """Lines that set vector ``j`` of the gradient to 0."""
    place = elements.inputs[1]
    name = _name(place)
    part = (
        f"        if i{j} + {e} < last: store({name} + (i{j} + {e}) * {place.itemsize}, zero_{name})"
        for e in range(vector)
    )
    return [
        "if zero_grads:",
        f"    if whole{j}:",
        f"        store_vector({name} + i{j} * {place.itemsize}, ({f'zero_{name}, ' * vector}))",
        "    else:",
        *part,
    ]
