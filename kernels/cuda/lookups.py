"""Lookups: rows of a table copied, pooled into bags, and multiplied with the gradients of their bags.

As many lanes of a warp as a row has vectors of 16 bytes, 32 at most, take a row or a bag, so that a warp
takes several narrow ones. Rows are on their way AHEAD at a time. A bag's rows are added in the order of their
positions, as the CPU adds them, whatever the grid is. Nothing is read for an index outside the table.

Bytes moved: each row that an index names read, once; each row of the result written.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.extending import register_jitable

from fastopt.kernels.cuda.lanes import VECTOR_BYTES
from fastopt.kernels.cuda.launch import kernel
from fastopt.kernels.cuda.layout import (
    POOL_INDEX_SIZE,
    POOL_INDEX_STRIDE,
    POOL_LANE_BITS,
    POOL_SHARED,
)
from fastopt.kernels.cuda.memory import (
    ALL_LANES,
    WARP,
    integer,
    last_at_most,
    load,
    load_vector,
    store,
    store_vector,
)
from fastopt.kernels.cuda.sort import index_at
from fastopt.kernels.formats import Format
from fastopt.kernels.layout import (
    POOL_BAGS,
    POOL_DIM,
    POOL_INDICES,
    POOL_MEAN,
    POOL_OFFSETS,
    POOL_OUT,
    POOL_OUT_STRIDE,
    POOL_PADDING,
    POOL_POSITIONS,
    POOL_ROWS,
    POOL_TABLE,
    POOL_WEIGHTS,
)
from fastopt.kernels.source import define

THREADS = 128
MOST_BLOCKS = 2**20  # of a launch, each of which then takes several shares
AHEAD = 4  # rows of a bag, or positions of a warp, that are on their way at the same time
WORDS = {2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.uint64}  # by bytes, what a row is copied by


def blocks_of(shares: int, lane_bits: int, lookups: int = 1) -> int:
    """How many blocks a launch has for so many shares of so many lanes, if it is one of several lookups."""
    return min(-(-(shares << lane_bits) // THREADS), max(MOST_BLOCKS // lookups, 1))


@register_jitable
def share_of(lane_bits):
    """:func:`share_in`, of all blocks of the launch."""
    return share_in(lane_bits, np.int64(cuda.blockIdx.x), np.int64(cuda.gridDim.x))


@register_jitable
def share_in(lane_bits, block, blocks):
    """What this thread, of a block of so many, takes if 2 to ``lane_bits`` lanes take a row or a bag: the
    number of the first, how far on the next one is, which of its lanes this is, and how many it has."""
    thread = block * THREADS + np.int64(cuda.threadIdx.x)
    lanes = np.int64(1) << lane_bits
    return thread >> lane_bits, (blocks * THREADS) >> lane_bits, thread & (lanes - 1), lanes


@register_jitable
def is_row(row, rows):
    """Whether a table of so many rows has this one."""
    return row >= 0 and row < rows


@register_jitable
def clamped(position, size):
    return min(max(position, np.int64(0)), size)


@kernel("iiiiiiiii", THREADS)
def gather(size: int) -> Any:
    """``(table, rows, words, indices, stride, itemsize, count, lane_bits, out)``: copy the rows that indices
    name, of ``words`` words of ``size`` bytes each; zeros for an index outside the table."""
    zero: Any = WORDS[size](0)
    length = size // zero.itemsize
    each = range(AHEAD)
    lines = [
        "k, step, member, lanes = share_of(lane_bits)",
        "while k < count:",
        *(f"    k{u} = k + step * {u}" for u in each),
        *(f"    r{u} = index_at(indices, stride, itemsize, k{u}) if k{u} < count else none" for u in each),
        "    d = member",
        "    while d < words:",
        *(
            f"        v{u} = load_vector(table + (r{u} * words + d) * {size}, zero, {length}) "
            f"if is_row(r{u}, rows) else nothing"
            for u in each
        ),
    ]
    for u in each:
        lines += [
            f"        if k{u} < count:",
            f"            store_vector(out + (k{u} * words + d) * {size}, v{u})",
        ]
    lines += ["        d += lanes", f"    k += step * {AHEAD}"]
    return define(
        "gather",
        "table, rows, words, indices, stride, itemsize, count, lane_bits, out",
        *lines,
        share_of=share_of,
        index_at=index_at,
        is_row=is_row,
        load_vector=load_vector,
        store_vector=store_vector,
        zero=zero,
        nothing=(zero,) * length,
        none=np.int64(-1),
    )


def _walk(setting: Callable[[int], list[str]], take: Callable[[int], list[str]]) -> list[str]:
    """Lines that go over the positions of a bag, from ``first`` to ``last``, AHEAD at a time: position
    ``j + u`` is of row ``r{u}``, of which ``v{u}`` is the vector of column ``d`` if it counts, ``k{u}``.

    setting, take: lines for one of them, that read what else belongs to it, and that use it.
    """
    each = range(AHEAD)

    def index(name: str, position: str) -> str:
        return f"{name} = index_at(indices, stride, itemsize, {position}) if {position} < last else none"

    body = [f"k{u} = is_row(r{u}, rows) and r{u} != padding" for u in each]
    vector = "load_vector(table + (r{0} * dim + d) * size, zero, length) if k{0} else nothing"
    body += [f"v{u} = {vector.format(u)}" for u in each]
    body += [line for u in each for line in setting(u)]
    body += [index(f"n{u}", f"j + {AHEAD + u}") for u in each]  # they come while rows are waited for
    body += [line for u in each for line in take(u)]
    body += [*(f"r{u} = n{u}" for u in each), f"j += {AHEAD}"]
    return [
        *(index(f"r{u}", f"first + {u}") for u in each),
        "j = first",
        "while j < last:",
        *(f"    {line}" for line in body),
    ]


def _names(kind: Format, like: np.dtype, length: int) -> dict[str, Any]:
    """What the source of functions of rows sees."""
    zero = kind.zero(like)
    return {
        "np": np,
        "index_at": index_at,
        "is_row": is_row,
        "load": load,
        "load_vector": load_vector,
        "store_vector": store_vector,
        "decode": register_jitable(kind.decode),
        "encode": register_jitable(kind.encode),
        "zero": zero,
        "size": zero.itemsize,
        "length": length,
        "nothing": (zero,) * length,
        "none": np.int64(-1),
        "number": like.type,
        "index": np.int32(0),
        "random": np.uint32(0),
    }


def _stored(kind: Format, name: str, length: int) -> str:
    """A tuple of the numbers ``name`` of a vector as they are stored."""
    items = (f"{name}{e}" for e in range(length))
    return "(" + "".join(f"{x}, " if kind.stored is None else f"encode({x}, random), " for x in items) + ")"


def _pool_columns(kind: Format, like: np.dtype, length: int) -> Callable:
    """``(table, rows, dim, indices, stride, itemsize, first, last, weights, mean, padding, d, out)``: pool
    ``length`` columns of a bag from ``d`` on."""
    each = range(length)

    def take(u: int) -> list[str]:
        return [
            f"if k{u}:",
            "    found += 1",
            *(f"    s{e} += w{u} * decode(v{u}[{e}])" for e in each),
            f"if padding >= 0 and r{u} == padding:",
            "    skipped += 1",
        ]

    def setting(u: int) -> list[str]:
        return [f"w{u} = load(weights + (j + {u}) * {like.itemsize}, one) if k{u} and weights else one"]

    sums = " = ".join(f"s{e}" for e in each)
    # The CPU sums from -0.0 on, to which any number can be added and stays as it is, but where it looks for
    # rows to be left out, as it does for all of 16 bits.
    start = "number(0)" if kind.stored is not None else "number(0) if padding >= 0 else -number(0)"
    return define(
        "pool_columns",
        "table, rows, dim, indices, stride, itemsize, first, last, weights, mean, padding, d, out",
        f"{sums} = {start}",
        "found = skipped = np.int64(0)",
        *_walk(setting, take),
        "if found == 0:",
        f"    {sums} = number(0)",
        "count = last - first - skipped",
        "if mean != 0 and count > 1:",
        *(f"    s{e} /= number(count)" for e in each),
        f"store_vector(out + d * size, {_stored(kind, 's', length)})",
        "return None",
        one=like.type(1),
        **_names(kind, like, length),
    )


def _max_columns(kind: Format, like: np.dtype, length: int) -> Callable:
    """``(table, rows, dim, indices, stride, itemsize, first, last, padding, d, out, winners)``: the same for
    the maximum."""
    each = range(length)

    def take(u: int) -> list[str]:
        lines = [f"if k{u}:"]
        for e in each:
            lines += [
                f"    x = decode(v{u}[{e}])",
                f"    if i{e} < 0 or x > s{e} or (x != x and s{e} == s{e}):",
                f"        s{e}, i{e} = x, np.int32(j + {u})",
            ]
        return lines

    parts = [each[e : e + VECTOR_BYTES // 4] for e in range(0, length, VECTOR_BYTES // 4)]
    return define(
        "max_columns",
        "table, rows, dim, indices, stride, itemsize, first, last, padding, d, out, winners",
        f"{' = '.join(f's{e}' for e in each)} = number(0)",
        f"{' = '.join(f'i{e}' for e in each)} = np.int32(-1)",
        *_walk(lambda u: [], take),
        f"store_vector(out + d * size, {_stored(kind, 's', length)})",
        *(
            f"store_vector(winners + (d + {part[0]}) * 4, ({''.join(f'i{e}, ' for e in part)}))"
            for part in parts
        ),
        "return None",
        **_names(kind, like, length),
    )


@kernel("iiii", THREADS)
def pool(kind: Format, like: np.dtype, length: int) -> Any:
    """``(lookups, columns, bases, count)``: the sums of bags, or means, of ``count`` lookups in tables whose
    rows are read and added as ``like``, ``length`` columns at a time.

    lookups: the address of a row of ``columns`` numbers for each (see layout.py), which take the blocks from
    ``bases[k]`` up to ``bases[k + 1]``. Offsets are clamped to the number of indices. Rows outside the table
    are left out of sums, and counted by means.
    """
    columns_of_bag = register_jitable(_pool_columns(kind, like, length))

    def pool(lookups, columns, bases, count):
        block = np.int64(cuda.blockIdx.x)
        k = last_at_most(bases, count, block)
        own, base = lookups + k * columns * 8, integer(bases, k)
        shared, blocks = own + POOL_SHARED * 8, integer(bases, k + 1) - base
        bag, step, member, lanes = share_in(integer(own, POOL_LANE_BITS), block - base, blocks)
        bags, size = integer(shared, POOL_BAGS), integer(shared, POOL_POSITIONS)
        dim, offsets = integer(shared, POOL_DIM), integer(shared, POOL_OFFSETS)
        while bag < bags:
            first, last = clamped(integer(offsets, bag), size), clamped(integer(offsets, bag + 1), size)
            out, d = bag * integer(shared, POOL_OUT_STRIDE), member * length
            while d < dim:
                columns_of_bag(
                    integer(shared, POOL_TABLE),
                    integer(shared, POOL_ROWS),
                    dim,
                    integer(shared, POOL_INDICES),
                    integer(own, POOL_INDEX_STRIDE),
                    integer(own, POOL_INDEX_SIZE),
                    first,
                    last,
                    integer(shared, POOL_WEIGHTS),
                    integer(shared, POOL_MEAN),
                    integer(shared, POOL_PADDING),
                    d,
                    integer(shared, POOL_OUT) + out,
                )
                d += lanes * length
            bag += step

    return pool


@kernel("iiiiiiiiiiiii", THREADS)
def pool_max(kind: Format, like: np.dtype, length: int) -> Any:
    """``(table, rows, dim, indices, stride, itemsize, size, offsets, bags, padding, bits, out,
    winners)``: the largest elements of bags, NaN if one is, and the positions that they come from, int32, the
    first of equal ones; 0 and -1 for none. Other arguments are those of ``pool``."""
    columns = register_jitable(_max_columns(kind, like, length))
    stored = kind.itemsize(like)

    def pool_max(
        table, rows, dim, indices, stride, itemsize, size, offsets, bags, padding, bits, out, winners
    ):
        bag, step, member, lanes = share_of(bits)
        while bag < bags:
            first, last = clamped(integer(offsets, bag), size), clamped(integer(offsets, bag + 1), size)
            own, won, d = out + bag * dim * stored, winners + bag * dim * 4, member * length
            while d < dim:
                columns(table, rows, dim, indices, stride, itemsize, first, last, padding, d, own, won)
                d += lanes * length
            bag += step

    return pool_max


def _product_lines(kind: Format, like: np.dtype, length: int) -> list[str]:
    """Lines that add products of the elements of column ``d`` and those after it."""
    count = min(length, VECTOR_BYTES // like.itemsize)  # of a vector of gradients
    each = range(AHEAD)
    lines = [
        f"v{u} = load_vector(table + (r{u} * dim + d) * size, zero, length) if k{u} else nothing"
        for u in each
    ]
    for part in range(0, length, count):
        place = f"grads + (b{{0}} * dim + d + {part}) * {like.itemsize}"
        vector = f"load_vector({place}, null, {count}) if k{{0}} else nulls"
        lines += [f"g{u}_{part} = {vector.format(u)}" for u in each]
    for u in each:
        lines += [f"t{u} += decode(v{u}[{e}]) * g{u}_{e - e % count}[{e % count}]" for e in range(length)]
    return lines


@kernel("iiiiiiiiiiiiii", THREADS)
def row_products(kind: Format, like: np.dtype, length: int) -> Any:
    """``(table, rows, dim, indices, stride, itemsize, count, bags_of, bags, scales, padding, bits, grads,
    out)``: the product of each position's row with the row of ``grads`` of its bag, times its scale; 0 for
    the row ``padding``, and for one outside the table.

    bags_of: int32. scales: an address, or 0. grads: [bags, dim]. A position's lanes add up products, and then
    their sums, in a fixed order.
    """
    each = range(AHEAD)
    count = min(length, VECTOR_BYTES // like.itemsize)
    lines = [
        "k, step, member, lanes = share_of(bits)",
        f"before = (np.int64(cuda.threadIdx.x) & {WARP - 1}) >> bits  # positions of the warp",
        "while k - before < count:  # all lanes of a warp go on together",
    ]
    body = [f"p{u} = k + step * {u}" for u in each]
    body += [f"r{u} = index_at(indices, stride, itemsize, p{u}) if p{u} < count else none" for u in each]
    body += [f"b{u} = np.int64(load(bags_of + p{u} * 4, index)) if p{u} < count else none" for u in each]
    body += [f"k{u} = is_row(r{u}, rows) and r{u} != padding and is_row(b{u}, bags)" for u in each]
    body += [f"{' = '.join(f't{u}' for u in each)} = number(0)", "d = member * length", "while d < dim:"]
    body += [f"    {line}" for line in [*_product_lines(kind, like, length), "d += lanes * length"]]
    body += ["distance = lanes >> 1", "while distance:"]
    body += [f"    t{u} += cuda.shfl_xor_sync(ALL_LANES, t{u}, distance)" for u in each]
    body += ["    distance >>= 1", "if member == 0:"]
    for u in each:
        body += [
            f"    if k{u} and scales:",
            f"        t{u} *= load(scales + p{u} * {like.itemsize}, null)",
            f"    if p{u} < count:",
            f"        store(out + p{u} * {like.itemsize}, t{u})",
        ]
    body += [f"k += step * {AHEAD}"]
    return define(
        "row_products",
        "table, rows, dim, indices, stride, itemsize, count, bags_of, bags, scales, padding, bits, "
        "grads, out",
        *lines,
        *(f"    {line}" for line in body),
        cuda=cuda,
        ALL_LANES=ALL_LANES,
        share_of=share_of,
        store=store,
        null=like.type(0),
        nulls=(like.type(0),) * count,
        **_names(kind, like, length),
    )
