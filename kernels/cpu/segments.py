"""Sums of rows, in registers: pooled lookups, and the gradient of a row, which is the sum of a segment's rows
of values (see layout.py).

The compiler keeps a row's running sum in memory, adding to it row by row. Here a block of columns is
summed over all rows before the next block is, its sum being one wide vector: each row is read
once, in the order given, nothing else is read or written, and every element's additions are those of
the plain loop, in the same order.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from fastopt.kernels.cpu.jit import helper, inlined_helper, restricted_helper
from fastopt.kernels.intrinsics import (
    AHEAD,
    CACHE_LINE,
    itemsize_of,
    lanes_of,
    on_stack,
    outlined,
    prefetch_instruction,
    prefetch_rows,
    view,
)
from fastopt.kernels.layout import (
    TABLE_FIRST_POSITION,
    TABLE_FIRST_ROW,
    TABLE_ORDER,
    TABLE_ROWS,
    TABLE_SEGMENTS,
    TABLE_SOURCE,
    TABLE_SOURCE_BASE,
    TABLE_SOURCE_ORIGIN,
    TABLE_STARTS,
    TABLE_VALUES,
    TABLE_VALUES_STRIDE,
    TABLE_WEIGHTS,
    TABLE_WINNERS,
)

MOST_FETCHED = 8  # rows of values at a time: the sum of more fetches on

# Bytes of a block: from all sixteen common vector registers, or half of the largest, to two of the common.
WIDTHS = 512, 256, 128, 64
REST = 32, 16, 8, 4  # for what is left: the widest of them that a row has room for


def _sum_of_rows(builder: ir.IRBuilder, number: ir.Type, index: ir.Type, width: int, weighted: bool,
                 address: Any, stride: Any, rows: Any, base: Any, weights: Any, first: Any, last: Any,
                 final: Any, ahead: Any) -> Any:  # fmt: skip
    """The sum of ``width`` elements at ``address`` of the rows from ``first`` to ``last``; if ``ahead`` is
    not 0, rows up to ``final`` are fetched so many ahead of their turn."""
    i8, i64 = ir.IntType(8), ir.IntType(64)
    fetch = prefetch_instruction(builder.module)
    vector = number if width == 1 else ir.VectorType(number, width)
    size = itemsize_of(number)
    # Any number can be added to -0.0 and stays as it is.
    start, zero = (ir.Constant(vector, x if width == 1 else [x] * width) for x in (-0.0, 0.0))
    entry = builder.block
    loop, done = builder.append_basic_block(), builder.append_basic_block()
    builder.cbranch(builder.icmp_signed("<", first, last), loop, done)

    def start_of(k):
        row = builder.load(builder.gep(rows, [k]))
        row = row if index == i64 else builder.sext(row, i64)
        return builder.add(address, builder.mul(builder.sub(row, base), stride))

    builder.position_at_end(loop)
    k = builder.phi(i64)
    total = builder.phi(vector)
    with builder.if_then(builder.icmp_signed(">", ahead, i64(0))):
        later = builder.add(k, ahead)
        later = start_of(builder.select(builder.icmp_signed("<", later, final), later, final))
        # The last byte is in a line more, where rows begin within one.
        for offset in (*range(0, width * size, CACHE_LINE), width * size - 1):
            fetch(builder, builder.inttoptr(builder.add(later, i64(offset)), i8.as_pointer()))
    own = builder.block
    values = builder.load(builder.inttoptr(start_of(k), vector.as_pointer()), align=size)
    if weighted:
        weight = builder.load(builder.gep(weights, [k]))
        values = builder.fmul(weight if width == 1 else lanes_of(builder, weight, width), values)
    new = builder.fadd(total, values)
    following = builder.add(k, i64(1))
    k.add_incoming(first, entry)
    k.add_incoming(following, own)
    total.add_incoming(start, entry)
    total.add_incoming(new, own)
    builder.cbranch(builder.icmp_signed("<", following, last), loop, done)

    builder.position_at_end(done)
    result = builder.phi(vector)
    result.add_incoming(zero, entry)
    result.add_incoming(new, own)
    return result


def _block_function(
    module: ir.Module, number: ir.Type, index: ir.Type, width: int, weighted: bool
) -> ir.Function:
    """``void (address, stride, rows, base, weights, offsets, bags, end, ahead, out, out_stride)`` for so many
    elements as ``width``."""
    i64 = ir.IntType(64)
    name = f"fastopt_sum_{number}_{index}_{width}_{weighted}"
    function = outlined(module, name, *[i64] * 11)
    if function.blocks:
        return function
    address, stride, rows, base, weights, offsets, bags, end, ahead, out, out_stride = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    rows = builder.inttoptr(rows, index.as_pointer())
    weights = builder.inttoptr(weights, number.as_pointer())
    offsets = builder.inttoptr(offsets, i64.as_pointer())
    final = builder.sub(end, i64(1))
    with cgutils.for_range(builder, bags) as loop:
        first = builder.load(builder.gep(offsets, [loop.index]))
        last = builder.load(builder.gep(offsets, [builder.add(loop.index, i64(1))]))
        given = address, stride, rows, base, weights, first, last, final, ahead
        result = _sum_of_rows(builder, number, index, width, weighted, *given)
        place = builder.add(out, builder.mul(loop.index, out_stride))
        pointer = builder.inttoptr(place, result.type.as_pointer())
        builder.store(result, pointer, align=itemsize_of(number))
    builder.ret_void()
    return function


@contextmanager
def _while(builder: ir.IRBuilder, condition: Callable[[], Any]) -> Iterator[None]:
    """A loop, whose body is built in the block."""
    test, body, done = (builder.append_basic_block() for _ in range(3))
    builder.branch(test)
    builder.position_at_end(test)
    builder.cbranch(condition(), body, done)
    builder.position_at_end(body)
    yield
    builder.branch(test)
    builder.position_at_end(done)


@intrinsic
def _sum_bags(context: Any, address: Any, stride: Any, rows: Any, base: Any, weights: Any, offsets: Any,
              end: Any, ahead: Any, out: Any, out_stride: Any, dim: Any) -> Any:  # fmt: skip
    number = weights.dtype

    def generate(context, builder, signature, arguments):
        i64 = ir.IntType(64)
        kinds = [context.get_data_type(kind) for kind in (number, rows.dtype)]
        address, stride, _, base, _, _, end, ahead, out, out_stride, dim = arguments
        given = (rows, arguments[2]), (weights, arguments[4]), (offsets, arguments[5])
        arrays = [context.make_array(kind)(context, builder, value) for kind, value in given]
        starts = [builder.ptrtoint(array.data, i64) for array in arrays]
        weighted = builder.icmp_signed(">", arrays[1].nitems, i64(0))
        bags = builder.sub(arrays[2].nitems, i64(1))
        size = builder.mul(dim, i64(number.bitwidth // 8))
        at = cgutils.alloca_once_value(builder, i64(0))

        def sum_block(width):
            begin = builder.load(at)
            places = builder.add(address, begin), builder.add(out, begin)
            own = [places[0], stride, starts[0], base, *starts[1:], bags, end, ahead, places[1], out_stride]
            elements = max(width * 8 // number.bitwidth, 1)
            with builder.if_else(weighted) as branches:
                for branch, flag in zip(branches, (True, False), strict=True):
                    with branch:
                        builder.call(_block_function(builder.module, *kinds, elements, flag), own)
            builder.store(builder.add(begin, i64(width)), at)

        def are_left(count):
            return builder.icmp_signed(">=", builder.sub(size, builder.load(at)), i64(count))

        for width in WIDTHS:
            with _while(builder, lambda width=width: are_left(width)):
                sum_block(width)
        for width in REST:  # the last block may sum some columns once more
            fits = builder.icmp_signed(">=", size, i64(width))
            with builder.if_then(fits), _while(builder, lambda: are_left(1)):
                last, begin = builder.sub(size, i64(width)), builder.load(at)
                builder.store(builder.select(builder.icmp_signed("<", begin, last), begin, last), at)
                sum_block(width)
        return context.get_dummy_value()

    count = types.int64
    return types.void(count, count, rows, count, weights, offsets, *[count] * 5), generate


def _python_sum_bags(address, stride, rows, base, weights, offsets, end, ahead, out, out_stride, dim):
    """Set ``dim`` elements at ``out``, and ``out_stride`` bytes further for each next bag, to the sum of the
    rows ``rows[k] - base``, for k from ``offsets[bag]`` to ``offsets[bag + 1]``, of an array at ``address``
    with ``stride`` bytes a row, times ``weights[k]`` if there are weights. If ``ahead`` is not 0, compiled
    code fetches rows before ``end`` so many ahead of their turn."""
    like = weights.dtype.type(0)
    for bag, (first, last) in enumerate(pairwise(offsets.tolist())):
        total = view(out + bag * out_stride, dim, like)
        total[:] = -0.0 if first < last else 0.0
        for k in range(first, last):
            values = view(address + (int(rows[k]) - base) * stride, dim, like)
            total += weights[k] * values if weights.size else values


sum_bags: Any = _python_sum_bags if numba.config.DISABLE_JIT else _sum_bags  # type: ignore[attr-defined]


@helper
def sum_rows(address, stride, rows, base, weights, first, last, end, total):
    """Set ``total`` to the sum of the rows from ``first`` to ``last``, as one bag, which fetches its rows if
    they are more than :func:`fetching` is for."""
    offsets = on_stack(np.int64(0))[:2]
    offsets[0], offsets[1] = first, last
    place, ahead = total.ctypes.data, np.int64(AHEAD if last - first > MOST_FETCHED else 0)
    sum_bags(address, stride, rows, base, weights, offsets, end, ahead, place, np.int64(0), total.size)


@restricted_helper
def add_row(total, values):
    for d in range(total.size):
        total[d] += values[d]


@restricted_helper
def add_weighted_row(total, weight, values):
    for d in range(total.size):
        total[d] += weight * values[d]


@restricted_helper
def add_won_row(total, position, winners, values):
    for d in range(total.size):
        if winners[d] == position:
            total[d] += values[d]


@inlined_helper
def gradient_of(table, won, like, total, segment):
    """Address of the gradient of a segment: of its only row of values, or of ``total``, which has
    become the sum of several in the order of their positions. won: True where the table may have winners; for
    None there is no code for them."""
    starts = view(table[TABLE_STARTS], table[TABLE_SEGMENTS] + 1, np.int32(0))
    origin = table[TABLE_SOURCE_ORIGIN]
    first, last = np.int64(starts[segment]) - origin, np.int64(starts[segment + 1]) - origin
    end = np.int64(starts[table[TABLE_SEGMENTS]]) - origin
    source = view(table[TABLE_SOURCE], end, np.int32(0))
    base, address = table[TABLE_SOURCE_BASE], table[TABLE_VALUES]
    stride = table[TABLE_VALUES_STRIDE]
    weights = view(table[TABLE_WEIGHTS], end if table[TABLE_WEIGHTS] else np.int64(0), like)
    if won is not None and table[TABLE_WINNERS]:
        sum_won_rows(table, like, total, first, last)
    elif last - first > 1 or weights.size:
        sum_rows(address, stride, source, base, weights, first, last, end, total)
    else:
        return address + (source[first] - base) * stride
    return np.int64(total.ctypes.data)


@inlined_helper
def fetching(table, first, last):
    """How rows of values are to be fetched ahead of the segments from ``first`` to ``last``: from which place
    in the source, as many for each segment, and up to which place. For each as many, since a loop that runs
    as often each time costs the processor no wrong guess."""
    starts = view(table[TABLE_STARTS], table[TABLE_SEGMENTS] + 1, np.int32(0))
    origin = table[TABLE_SOURCE_ORIGIN]
    begin, end = np.int64(starts[first]) - origin, np.int64(starts[last]) - origin
    each = min((end - begin + last - first - 1) // (last - first), MOST_FETCHED)
    return begin + AHEAD, each, min(end + AHEAD, np.int64(starts[table[TABLE_SEGMENTS]]) - origin)


@inlined_helper
def fetch_values(table, first, last):
    """Have the rows of values loaded that the source names from ``first`` to ``last``."""
    source = view(table[TABLE_SOURCE], last, np.int32(0))
    base, address = table[TABLE_SOURCE_BASE], table[TABLE_VALUES]
    stride = table[TABLE_VALUES_STRIDE]
    prefetch_rows(address, stride, source, base, first, last)


@helper
def sum_won_rows(table, like, total, first, last):
    """The sum of those elements whose winners are the positions themselves."""
    dim, origin = total.size, table[TABLE_SOURCE_ORIGIN]
    source = view(table[TABLE_SOURCE], last, np.int32(0))
    order = view(table[TABLE_ORDER], last + origin, np.int32(0))
    total[:] = 0
    for j in range(first, last):
        row = source[j] - table[TABLE_SOURCE_BASE]
        values = view(table[TABLE_VALUES] + row * table[TABLE_VALUES_STRIDE], dim, like)
        winners = view(table[TABLE_WINNERS] + row * dim * 4, dim, np.int32(0))
        add_won_row(total, np.int32(order[j + origin] - table[TABLE_FIRST_POSITION]), winners, values)


@helper
def row_of_segment(table, segment):
    """The row of the table that a segment belongs to."""
    return view(table[TABLE_ROWS], table[TABLE_SEGMENTS], np.int64(0))[segment] - table[TABLE_FIRST_ROW]


@helper
def first_segment(table, part, parts):
    """Where part ``part`` of ``parts`` equal shares of the work begins: a row costs about as much as
    two of its gradients."""
    segments = table[TABLE_SEGMENTS]
    starts = view(table[TABLE_STARTS], segments + 1, np.int32(0))
    begin = np.int64(starts[0])
    work = np.int64(starts[segments]) - begin + 2 * segments
    wanted = part * work // parts
    low, high = np.int64(0), segments
    while low < high:
        middle = (low + high) // 2
        if np.int64(starts[middle]) - begin + 2 * middle < wanted:
            low = middle + 1
        else:
            high = middle
    return low
