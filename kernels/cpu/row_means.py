"""Mean squares of rows' gradients. A row's squares are added in vectors, sixteen at once, then the sixteen
sums as a tree whose halves are interleaved.

That tree is a chain of additions, which the update of the row has to wait for. So sixteen rows go through it
side by side, before any of them is updated. Where their rule adds a weight decay to the gradients, where rows
have limits, and where there are few, each row's squares come first, in memory of the CPU's stack, as the
rule's own function finds them. Both ways give the same bits. Rows that are shorter than a vector are done
sooner one by one, without vectors.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from fastopt.kernels import element
from fastopt.kernels.cpu.jit import restricted_helper
from fastopt.kernels.element import regularise
from fastopt.kernels.intrinsics import (
    CACHE_LINE,
    ON_STACK,
    address_of,
    itemsize_of,
    lanes_of,
    on_stack,
    outlined,
    view,
)
from fastopt.kernels.linked import overload, register_jitable
from fastopt.kernels.rule import L2, RULES, Scaled

LANES = 16  # numbers of a vector, and rows side by side
VECTORS = ON_STACK // LANES  # whose sum goes into the tree at once
FEWEST = 4  # rows side by side: fewer, as those are that fill a block alone, take longer than one by one
NOT_FOUND = -1  # in place of a mean square

_Lanes = list[tuple[int, int]]  # of each lane of a vector, the row and which of the row's sums it holds


def _adding(x: _Lanes, y: _Lanes, half: int) -> tuple[list[int], list[int], _Lanes]:
    """How ``half`` sums of each row remain of twice as many: which lanes of two vectors are to be added to
    which, and what the lanes then hold."""
    both = x + y
    # What is in a quarter of a vector stays in it if it can, which is faster.
    kept = sorted((k for k in range(2 * LANES) if both[k][1] < half), key=lambda k: (k % LANES // 4, k))
    others = [both.index((both[k][0], both[k][1] + half)) for k in kept]
    return kept, others, [both[k] for k in kept]


def _shuffled(builder: ir.IRBuilder, x: ir.Value, y: ir.Value, lanes: list[int]) -> Any:
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))


def _sums_of_rows(builder: ir.IRBuilder, rows: list[ir.Value]) -> Any:
    """A vector of the sums of sixteen vectors, each as a tree whose halves are interleaved."""
    held: list[_Lanes] = [[(row, k) for k in range(LANES)] for row in range(LANES)]
    half = LANES // 2
    while half:
        pairs = zip(rows[::2], rows[1::2], held[::2], held[1::2], strict=True)
        rows, held = [], []
        for x, y, x_lanes, y_lanes in pairs:
            kept, others, lanes = _adding(x_lanes, y_lanes, half)
            rows.append(builder.fadd(_shuffled(builder, x, y, kept), _shuffled(builder, x, y, others)))
            held.append(lanes)
        half //= 2
    [total], [lanes] = rows, held
    return _shuffled(builder, total, total, [lanes.index((row, 0)) for row in range(LANES)])


def _sum(builder: ir.IRBuilder, vectors: list[ir.Value]) -> Any:
    while len(vectors) > 1:
        left, right = vectors[::2], vectors[1::2]
        vectors = [builder.fadd(a, b) for a, b in zip(left, right, strict=False)] + left[len(right) :]
    return vectors[0]


class _Seen(NamedTuple):
    """Vectors of what a gradient is multiplied by, and of what it is then clipped to: see ``scaled`` of
    element.py, which this does to sixteen numbers."""

    scale: ir.Value
    limit: ir.Value

    def squares(self, builder: ir.IRBuilder, g: ir.Value) -> Any:
        lowest = builder.fneg(self.limit)
        g = builder.fmul(self.scale, g)
        g = builder.select(builder.fcmp_ordered(">", g, self.limit), self.limit, g)
        g = builder.select(builder.fcmp_ordered("<", g, lowest), lowest, g)
        return builder.fmul(g, g)


def _squares_added(builder: ir.IRBuilder, seen: _Seen, start: ir.Value, size: ir.Value) -> Any:
    """The sum of the vectors of squares of the first ON_STACK numbers at ``start``, or of all if ``size`` is
    smaller, zeros following the last."""
    i64, vector = ir.IntType(64), seen.scale.type
    width = itemsize_of(vector.element)
    cases = [builder.append_basic_block() for _ in range(VECTORS + 1)]  # by how many vectors are whole
    done = builder.append_basic_block()
    switch = builder.switch(builder.sdiv(size, i64(LANES)), cases[-1])
    found = []
    for whole, case in enumerate(cases):
        switch.add_case(i64(whole), case)
        builder.position_at_end(case)
        places = [builder.add(start, i64(k * LANES * width)) for k in range(VECTORS)]
        pointers = [builder.inttoptr(place, vector.as_pointer()) for place in places]
        parts = [builder.load(pointer, align=width) for pointer in pointers[:whole]]
        parts = [seen.squares(builder, part) for part in parts]
        if whole < VECTORS:
            left = builder.sub(size, i64(whole * LANES))
            parts.append(_squares_of_some(builder, seen, pointers[whole], left))
        found.append((_sum(builder, parts), builder.block))
        builder.branch(done)
    builder.position_at_end(done)
    total = builder.phi(vector)
    for value, block in found:
        total.add_incoming(value, block)
    return total


def _squares_of_some(builder: ir.IRBuilder, seen: _Seen, pointer: ir.Value, size: ir.Value) -> Any:
    """The squares of the first ``size`` numbers of a vector, then zeros; no others are read."""
    i1, i32, i64, vector = ir.IntType(1), ir.IntType(32), ir.IntType(64), seen.scale.type
    width = itemsize_of(vector.element)
    mask, lanes = ir.VectorType(i1, LANES), ir.VectorType(i64, LANES)
    load = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(vector, [pointer.type, i32, mask, vector]),
        f"llvm.masked.load.v{LANES}f{8 * width}.p0",
    )
    zeros, none = ir.Constant(vector, [0.0] * LANES), builder.block
    with builder.if_then(builder.icmp_signed(">", size, i64(0))):
        own = builder.icmp_signed("<", ir.Constant(lanes, list(range(LANES))), lanes_of(builder, size, LANES))
        squares = seen.squares(builder, builder.call(load, [pointer, i32(width), own, zeros]))
        squares, some = builder.select(own, squares, zeros), builder.block
    found = builder.phi(vector)
    found.add_incoming(zeros, none)
    found.add_incoming(squares, some)
    return found


def _mean_squares_function(module: ir.Module, number: ir.Type) -> ir.Function:
    """``void (scale, limit, gradients, rows, dim, means)``: numbers, addresses of addresses and of numbers,
    and two counts. Up to the next multiple of LANES, ``means`` gets any numbers."""
    i64 = ir.IntType(64)
    function = outlined(module, f"fastopt_mean_squares_{number}", number, number, *[i64] * 4)
    if function.blocks:
        return function
    vector, width = ir.VectorType(number, LANES), itemsize_of(number)
    builder = ir.IRBuilder(function.append_basic_block())
    scale, limit, gradients, rows, dim, means = function.args
    seen = _Seen(lanes_of(builder, scale, LANES), lanes_of(builder, limit, LANES))
    gradients = builder.inttoptr(gradients, i64.as_pointer())
    divisor = lanes_of(builder, builder.sitofp(dim, number), LANES)
    total, sums = cgutils.alloca_once(builder, vector), cgutils.alloca_once(builder, vector, size=i64(LANES))
    with cgutils.for_range(builder, i64(LANES)) as loop:
        builder.store(ir.Constant(vector, [0.0] * LANES), builder.gep(sums, [loop.index]))
    with cgutils.for_range_slice(builder, i64(0), rows, i64(LANES)) as (first, _):
        builder.store(ir.Constant(vector, [0.0] * LANES), total)
        left = builder.sub(rows, first)
        there = builder.select(builder.icmp_signed("<", left, i64(LANES)), left, i64(LANES))
        with cgutils.for_range_slice(builder, i64(0), dim, i64(ON_STACK)) as (at, _):
            with cgutils.for_range(builder, there) as loop:
                start = builder.load(builder.gep(gradients, [builder.add(first, loop.index)]))
                start = builder.add(start, builder.mul(at, i64(width)))
                added = _squares_added(builder, seen, start, builder.sub(dim, at))
                builder.store(added, builder.gep(sums, [loop.index]))
            added = [builder.load(builder.gep(sums, [i64(k)])) for k in range(LANES)]
            builder.store(builder.fadd(builder.load(total), _sums_of_rows(builder, added)), total)
        place = builder.inttoptr(builder.add(means, builder.mul(first, i64(width))), vector.as_pointer())
        builder.store(builder.fdiv(builder.load(total), divisor), place, align=width)
    builder.ret_void()
    return function


@intrinsic
def _mean_squares_of(context: Any, scale: Any, limit: Any, gradients: Any, rows: Any, dim: Any,
                     means: Any) -> Any:  # fmt: skip
    def generate(context, builder, signature, arguments):
        scale, limit, given, rows, dim, found = arguments
        function = _mean_squares_function(builder.module, context.get_data_type(means.dtype))
        given = address_of(context, builder, gradients, given)
        found = address_of(context, builder, means, found)
        builder.call(function, [scale, limit, given, rows, dim, found])
        return context.get_dummy_value()

    return types.void(means.dtype, means.dtype, gradients, types.int64, types.int64, means), generate


def _python_mean_squares_of(scale, limit, gradients, rows, dim, means):
    """Set ``means[k]`` to the mean of the squares of the ``dim`` numbers at ``gradients[k]``, which are
    multiplied by ``scale``, and clipped to ``limit``, before."""
    for k in range(rows):
        g = view(gradients[k], dim, means[k])
        means[k] = sum_in_vectors(Scaled(scale, limit), g, g) / means.dtype.type(dim)


@intrinsic
def _sum_on_stack(context: Any, array: Any) -> Any:
    def generate(context, builder, signature, arguments):
        vector = ir.VectorType(context.get_data_type(array.dtype), LANES)
        data = context.make_array(array)(context, builder, arguments[0]).data
        start = builder.bitcast(data, vector.as_pointer())
        i32 = ir.IntType(32)
        places = [builder.gep(start, [i32(k)]) for k in range(VECTORS)]
        total = _sum(builder, [builder.load(place, align=CACHE_LINE) for place in places])
        for width in (8, 4, 2, 1):
            others = [(k + width) % LANES for k in range(LANES)]
            total = builder.fadd(total, _shuffled(builder, total, total, others))
        return builder.extract_element(total, i32(0))

    return array.dtype(array), generate


def _python_sum_on_stack(array):
    """The sum of the numbers of an array that ``on_stack`` gave: vectors are added, then their halves."""
    lanes = array.reshape(-1, LANES)
    lanes = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3])
    while lanes.size > 1:
        lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
    return lanes[0]


_compiled: Any = not numba.config.DISABLE_JIT  # type: ignore[attr-defined]
mean_squares_of: Any = _mean_squares_of if _compiled else _python_mean_squares_of
sum_on_stack: Any = _sum_on_stack if _compiled else _python_sum_on_stack


def find_means(h, c, limits, t, gradients, rows, dim, means):
    """Set ``means[k]`` to the mean square of the gradient at ``gradients[k]``, for each of so many ``rows``,
    if the rule needs it and sees no weight decay in it, no row has a limit, they are not shorter than a
    vector, and FEWEST or more, else to NOT_FOUND. limits, t: see ``limited`` of element.py."""
    if RULES[type(h)].update_row is None:
        return
    if isinstance(c, L2):
        _no_means(rows, means)
    else:
        _find_scaled(c, limits, t, gradients, rows, dim, means)


@overload(find_means)
def _find_means(h, c, limits, t, gradients, rows, dim, means):
    if RULES[h.instance_class].update_row is None:
        return lambda h, c, limits, t, gradients, rows, dim, means: None
    if c.instance_class is L2:
        return lambda h, c, limits, t, gradients, rows, dim, means: _no_means(rows, means)
    return lambda h, c, limits, t, gradients, rows, dim, means: _find_scaled(
        c, limits, t, gradients, rows, dim, means
    )


@register_jitable
def _has_no_limit(limits, t):
    if limits is None:
        return True
    return limits[t] == np.inf


@register_jitable
def _find_scaled(c, limits, t, gradients, rows, dim, means):
    if rows >= FEWEST and dim >= LANES and _has_no_limit(limits, t):
        mean_squares_of(c.scale, c.limit, gradients, rows, dim, means)
    else:
        _no_means(rows, means)


@register_jitable
def _no_means(rows, means):
    for k in range(rows):
        means[k] = NOT_FOUND


def begin_row(h, c, p, g, row_state, mean_sq):
    """Update a row's own state, arrays of one element, and return it for the row's elements; mean_sq: what
    :func:`find_means` found."""
    if RULES[type(h)].update_row is None:
        return ()
    return element.begin_row(h, mean_square(c, p, g, mean_sq), row_state)


@overload(begin_row)
def _begin_row(h, c, p, g, row_state, mean_sq):
    if RULES[h.instance_class].update_row is None:
        return lambda h, c, p, g, row_state, mean_sq: ()
    return lambda h, c, p, g, row_state, mean_sq: element.begin_row(
        h, mean_square(c, p, g, mean_sq), row_state
    )


@register_jitable
def mean_square(c, p, g, found):
    """Mean over a row of the squared gradient ``g`` as the rule sees it; ``p`` and ``g`` are 1-D. found: what
    :func:`find_means` found, which is it if it is finite."""
    if 0 <= found < np.inf:
        return found
    total = sum_of_short(c, p, g) if g.size < LANES else sum_in_vectors(c, p, g)
    return mean_of_large_squares(c, p, g) if total == np.inf else total / p.dtype.type(g.size)


@register_jitable
def sum_of_short(c, p, g):
    """The sum of the squares of a row that is shorter than a vector, as four interleaved sums: a fixed order,
    in which the additions need not wait for each other."""
    zero = p.dtype.type(0)
    sums = zero, zero, zero, zero
    whole = g.size - g.size % 4
    for d in range(0, whole, 4):
        g0 = regularise(c, p[d], g[d])
        g1 = regularise(c, p[d + 1], g[d + 1])
        g2 = regularise(c, p[d + 2], g[d + 2])
        g3 = regularise(c, p[d + 3], g[d + 3])
        sums = sums[0] + g0 * g0, sums[1] + g1 * g1, sums[2] + g2 * g2, sums[3] + g3 * g3
    total = (sums[0] + sums[1]) + (sums[2] + sums[3])
    for d in range(whole, g.size):
        g0 = regularise(c, p[d], g[d])
        total += g0 * g0
    return total


@register_jitable
def sum_in_vectors(c, p, g):
    """The sum of the squares of a row."""
    zero = p.dtype.type(0)
    squares = on_stack(zero)
    total = zero
    for first in range(0, g.size, ON_STACK):
        # Slices would cost more than the squares of a short row.
        size = min(g.size - first, ON_STACK)
        own = view(g.ctypes.data + first * g.itemsize, size, zero)
        if size < ON_STACK:
            squares[:] = zero
        find_squares(c, view(p.ctypes.data + first * p.itemsize, size, zero), own, squares)
        total += sum_on_stack(squares)
    return total


@restricted_helper
def find_squares(c, p, g, squares):
    for d in range(g.size):
        x = regularise(c, p[d], g[d])
        squares[d] = x * x


@register_jitable
def mean_of_large_squares(c, p, g):
    """:func:`mean_square` where the sum of squares is infinite, which their mean need not be."""
    dim = p.dtype.type(g.size)
    mean = p.dtype.type(0)
    for d in range(g.size):
        x = regularise(c, p[d], g[d])
        mean += x / dim * x
    return mean
