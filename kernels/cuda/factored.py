"""Adafactor of matrices, as ``fastopt.kernels.cpu.factored``: second moments of rows and columns in place of
those of elements.

An array is a stack of matrices, its last two axes. Matrices are cut into tiles of STRIPE columns and some
rows, a warp each: a lane keeps the sums of its columns. All sums are in float64 and in an order that depends
on the shape alone. Nothing waits: one kernel each adds up the squares of the parameter and of the gradient by
rows and columns of tiles, averages the moments, finds the mean of the rows' for each matrix, adds up the
squares of the update, finds its factor, and makes the update.

Bytes moved for an element of float32: p and g read, g read, p and g read and p written, 24.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.extending import register_jitable

from fastopt.kernels.cuda.elements import Code, prototypes
from fastopt.kernels.cuda.integers import divided
from fastopt.kernels.cuda.launch import kernel
from fastopt.kernels.cuda.layout import ARRAY_ALIGNED
from fastopt.kernels.cuda.memory import (
    ALL_LANES,
    WARP,
    integer,
    lane_and_warp,
    load,
    load_if,
    numbers_at,
    store,
    store_if,
    warp_sum,
)
from fastopt.kernels.cuda.sums import THREADS, WARPS, block_sum
from fastopt.kernels.cuda.vectors import Vectors
from fastopt.kernels.element import decayed, scaled, trust_ratio, unpack
from fastopt.kernels.magnitude import unit_of
from fastopt.kernels.rules.adafactor import adafactor_direction, share_of
from fastopt.kernels.rules.lerp import lerp
from fastopt.kernels.source import define

STRIPE = 512  # columns of a tile
LANE_BITS = WARP.bit_length() - 1


@register_jitable
def tile_at(tile, rows, columns, height, bands, stripes):
    """The matrix of a tile, the numbers of its band of rows and of its stripe of columns among those of all
    matrices, and where these begin and end."""
    band, stripe = divided(tile, stripes)
    matrix, band_of_matrix = divided(band, bands)
    top, left = band_of_matrix * height, stripe * STRIPE
    bottom, right = min(top + height, rows), min(left + STRIPE, columns)
    return matrix, band, matrix * stripes + stripe, top, bottom, left, right


# Squares of the parameter and the gradient


@kernel("iiiiiiiiiii", THREADS)
def add_tiles(code: Code) -> Any:
    """``(table, numbers, tiles, rows, columns, height, bands, stripes, row_sums, col_sums, sums)``: the
    squares of the gradient by row and by column of each tile, and those of the parameter.

    table: the array's row of layout.py. numbers: hyperparameters in the type that is computed with. tiles:
    how many there are, of ``height`` rows; bands, stripes: those of a matrix. row_sums: float64 [matrix and
    stripe, row]. col_sums: [matrix and band, column]. sums: of p, for each WARPS tiles.
    """
    h, c, like = prototypes(code)
    of_c = len(h) * like.itemsize
    vectors = Vectors(code.formats, code.compute, STRIPE)
    add_row, store_columns = (register_jitable(made) for made in (_add_row(vectors), _store_columns(vectors)))
    nothing = (np.float64(0),) * (vectors.count * vectors.length)

    def add_tiles(table, numbers, tiles, rows, columns, height, bands, stripes, row_sums, col_sums, sums):
        lane, warp = lane_and_warp()
        own_c = unpack(c, numbers_at(c, numbers + of_c, like), like)
        aligned = integer(table, ARRAY_ALIGNED) != 0
        group = np.int64(cuda.blockIdx.x)
        while group * WARPS < tiles:
            tile, p_sq = group * WARPS + warp, 0.0
            if tile < tiles:
                matrix, band, stripe, top, bottom, left, right = tile_at(
                    tile, rows, columns, height, bands, stripes
                )
                of_columns = nothing
                for row in range(top, bottom):
                    first = (matrix * rows + row) * columns
                    p_own, g_own, of_columns = add_row(
                        own_c, table, aligned, first + left, first + right, lane, of_columns
                    )
                    p_sq += p_own
                    g_sq = warp_sum(g_own)
                    if lane == 0:
                        store(row_sums + (stripe * rows + row) * 8, g_sq)
                store_columns(col_sums + band * columns * 8, left, right, lane, of_columns)
            p_sq = block_sum(p_sq)
            if cuda.threadIdx.x == 0:
                store(sums + group * 8, p_sq)
            group += np.int64(cuda.gridDim.x)

    return add_tiles


def _add_row(vectors: Vectors) -> Callable:
    """The function that adds the squares of a lane's elements of a row."""
    lines = [*vectors.opening(), "p_sq = g_sq = 0.0"]
    for j in range(vectors.count):
        lines += vectors.reads(j)
    columns: list[str] = []
    for j in range(vectors.count):
        for e in range(vectors.length):
            lines += [
                f"p, g = read({vectors.given(j, e)})",
                f"x = np.float64(scaled(c, g)) if i{j} + {e} < last else 0.0",
                "y = np.float64(p)",
                "p_sq += y * y",
                "g_sq += x * x",
                f"c{j}_{e} = sums[{len(columns)}] + x * x",
            ]
            columns.append(f"c{j}_{e}")
    names = {**vectors.names, "read": vectors.elements.read, "scaled": scaled}
    result = f"return p_sq, g_sq, ({', '.join(columns)})"
    return define("add_row", "c, row, aligned, at, last, lane, sums", *lines, result, **names)


def _columns(vectors: Vectors) -> list[tuple[str, str]]:
    """Lines that set ``column`` to that of each element of a lane, and the name of its number."""
    places = [(j, e) for j in range(vectors.count) for e in range(vectors.length)]
    return [
        (f"column = left + lane * {vectors.length} + {j * vectors.length * WARP + e}", f"c{j}_{e}")
        for j, e in places
    ]


def _store_columns(vectors: Vectors) -> Callable:
    """The function that stores the float64 numbers of a lane's columns."""
    lines = []
    for k, (line, _) in enumerate(_columns(vectors)):
        lines += [line, f"store_if(column < right, to + column * 8, values[{k}])"]
    return define("store_columns", "to, left, right, lane, values", *lines, "return None", store_if=store_if)


def _load_columns(vectors: Vectors, like: np.dtype) -> Callable:
    """The function that loads the moments of a lane's columns, 0 beyond the last."""
    lines, names = [], []
    for line, name in _columns(vectors):
        lines += [line, f"{name} = load_if(column < right, begin + column * {like.itemsize}, zero)"]
        names.append(name)
    result = f"return ({', '.join(names)})"
    given = "begin, left, right, lane"
    return define("load_columns", given, *lines, result, load_if=load_if, zero=like.type(0))


# Moments


@register_jitable
def total_of_parts(sums, parts, moments, bits, matrix, moment, lane):
    """The sum of a moment's parts: ``2**bits`` moments share out a warp, whose lanes take every so many-th
    part of theirs."""
    total = 0.0
    if moment < moments:
        first, shared = lane >> bits, LANE_BITS - bits
        # counted by ones, since the compiler divides by any other step
        for k in range((parts - first + (1 << shared) - 1) >> shared):
            part = matrix * parts + first + (k << shared)
            total += load(sums + (part * moments + moment) * 8, np.float64(0))
    distance = np.int32(1 << bits)
    while distance < WARP:
        total += cuda.shfl_xor_sync(ALL_LANES, total, distance)
        distance <<= 1
    return total


@kernel("iiiiiiiiiiiiii", THREADS)
def average_moments(code: Code) -> Any:
    """``(numbers, matrices, rows, columns, bands, stripes, row_sums, col_sums, row_var, col_var, row_bits,
    col_bits, groups, row_totals)``: average the moments of rows and of columns with the means of squares.

    row_var, col_var: [matrix, row] and [matrix, column], of the type that is computed with. row_bits,
    col_bits: 2 to them moments share out a warp. groups: how many warps the rows of a matrix take.
    row_totals: float64 [matrix, group], become the sums of the new moments of rows.
    """
    h, _, like = prototypes(code)
    size, cast = like.itemsize, type(like)

    @register_jitable
    def average(h, sums, parts, moments, bits, count, matrix, group, of_moments, lane):
        """The moments of a warp; returns that of a lane, 0 for a lane without one."""
        width = np.int64(1) << bits
        moment = group * width + (lane & (width - 1))
        total = total_of_parts(sums, parts, moments, bits, matrix, moment, lane)
        new = like
        if lane < width and moment < moments:
            place = of_moments + (matrix * moments + moment) * size
            mean = cast(total / np.float64(count))
            new = lerp(load(place, like), mean, h.one_minus_decay, h.decay)
            store(place, new)
        return new

    def average_moments(
        numbers, matrices, rows, columns, bands, stripes, row_sums, col_sums, row_var, col_var, row_bits,
        col_bits, groups, row_totals,
    ):  # fmt: skip
        lane, warp = lane_and_warp()
        own_h = unpack(h, numbers_at(h, numbers, like), like)
        col_groups = (columns + (1 << col_bits) - 1) >> col_bits
        group = np.int64(cuda.blockIdx.x) * WARPS + warp
        while group < matrices * (groups + col_groups):
            if group < matrices * groups:
                matrix, own = divided(group, groups)
                new = average(own_h, row_sums, stripes, rows, row_bits, columns, matrix, own, row_var, lane)
                total = warp_sum(np.float64(new))
                if lane == 0:
                    store(row_totals + group * 8, total)
            else:
                matrix, own = divided(group - matrices * groups, col_groups)
                average(own_h, col_sums, bands, columns, col_bits, rows, matrix, own, col_var, lane)
            group += np.int64(cuda.gridDim.x) * WARPS

    return average_moments


@kernel("iiiii", THREADS)
def find_means(code: Code) -> Any:
    """``(matrices, rows, groups, row_totals, means)``: the mean of each matrix's moments of rows, of the type
    that is computed with."""
    cast, size, double = code.compute.type, code.compute.itemsize, np.float64(0)

    def find_means(matrices, rows, groups, row_totals, means):
        lane, warp = lane_and_warp()
        matrix = np.int64(cuda.blockIdx.x) * WARPS + warp
        while matrix < matrices:
            total, group = 0.0, lane
            while group < groups:
                total += load(row_totals + (matrix * groups + group) * 8, double)
                group += WARP
            total = warp_sum(total)
            if lane == 0:
                store(means + matrix * size, cast(total / np.float64(rows)))
            matrix += np.int64(cuda.gridDim.x) * WARPS

    return find_means


# The update


@kernel("iiiiiiiiiiiiiii", THREADS)
def add_updates(code: Code, again: bool) -> Any:
    """``(table, numbers, tiles, rows, columns, height, bands, stripes, row_var, col_var, means, units,
    groups, p_sums, u_sums)``: the squares of the update, for each WARPS tiles.

    again: whether those of the parameter are added up too, and both are divided by ``units`` before, float64
    [2], unless these are 1.
    """
    h, c, like = prototypes(code)
    of_c, size = len(h) * like.itemsize, like.itemsize
    vectors = Vectors(code.formats, code.compute, STRIPE)
    add_row = register_jitable(_add_row_of_updates(vectors, again))
    load_columns = register_jitable(_load_columns(vectors, code.compute))
    one = np.float64(1)

    def add_updates(
        table, numbers, tiles, rows, columns, height, bands, stripes, row_var, col_var, means, units, groups,
        p_sums, u_sums,
    ):  # fmt: skip
        lane, warp = lane_and_warp()
        own_h = unpack(h, numbers_at(h, numbers, like), like)
        own_c = unpack(c, numbers_at(c, numbers + of_c, like), like)
        aligned = integer(table, ARRAY_ALIGNED) != 0
        over_p = over_u = one
        if again:
            over_p, over_u = one / load(units, one), one / load(units + 8, one)
        group = np.int64(cuda.blockIdx.x)
        while group < groups and (not again or over_p != one or over_u != one):
            tile = group * WARPS + warp
            p_sq = u_sq = 0.0
            if tile < tiles:
                matrix, _, _, top, bottom, left, right = tile_at(tile, rows, columns, height, bands, stripes)
                mean = load(means + matrix * size, like)
                of_columns = load_columns(col_var + matrix * columns * size, left, right, lane)
                for row in range(top, bottom):
                    own_row = matrix * rows + row
                    share = share_of(own_h, load(row_var + own_row * size, like), mean)
                    first, last = own_row * columns + left, own_row * columns + right
                    p_own, u_own = add_row(
                        own_h, own_c, table, aligned, first, last, lane, share, of_columns, over_p, over_u
                    )
                    p_sq += p_own
                    u_sq += u_own
            if again:
                p_sq = block_sum(p_sq)
            u_sq = block_sum(u_sq)
            if cuda.threadIdx.x == 0:
                if again:
                    store(p_sums + group * 8, p_sq)
                store(u_sums + group * 8, u_sq)
            group += np.int64(cuda.gridDim.x)

    return add_updates


def _add_row_of_updates(vectors: Vectors, again: bool) -> Callable:
    """The function that adds the squares of the updates of a lane's elements of a row."""
    lines = [*vectors.opening(), "p_sq = u_sq = 0.0"]
    for j in range(vectors.count):
        lines += vectors.reads(j)
    places = [(j, e) for j in range(vectors.count) for e in range(vectors.length)]
    for k, (j, e) in enumerate(places):
        lines += [
            f"p, g = read({vectors.given(j, e)})",
            f"if i{j} + {e} < last:",
            f"    u = np.float64(direction(h, scaled(c, g), share * columns[{k}])) * over_u",
            "    u_sq += u * u",
        ]
        if again:
            lines += ["    y = np.float64(p) * over_p", "    p_sq += y * y"]
    names = {
        **vectors.names,
        "read": vectors.elements.read,
        "scaled": scaled,
        "direction": adafactor_direction,
    }
    arguments = "h, c, row, aligned, at, last, lane, share, columns, over_p, over_u"
    return define("add_row", arguments, *lines, "return p_sq, u_sq", **names)


@kernel("iiiiiiii", THREADS)
def find_factor(code: Code) -> Any:
    """``(exact, groups, p_sums, u_sums, size, units, again, rate)``: set ``rate`` to the learning
    rate of the float64 hyperparameters times its factor, in the type that is computed with.

    units: float64 [2], what both kinds of numbers were divided by if ``again``; else become those that the
    sums ask for, and were 1.
    """
    h, _, like = prototypes(code)
    double, one, cast = np.float64(0), np.float64(1), type(like)

    def find_factor(exact, groups, p_sums, u_sums, size, units, again, rate):
        p_unit = u_unit = one
        if again:
            p_unit, u_unit = load(units, one), load(units + 8, one)
        p_sq = u_sq = 0.0
        group = np.int64(cuda.threadIdx.x)
        while group < groups:
            p_sq += load(p_sums + group * 8, double)
            u_sq += load(u_sums + group * 8, double)
            group += THREADS
        p_sq, u_sq = block_sum(p_sq), block_sum(u_sq)
        if cuda.threadIdx.x == 0:
            own_h = unpack(h, numbers_at(h, exact, double), double)
            factor = trust_ratio(own_h, p_sq, u_sq, p_unit, u_unit, size)
            store(rate, cast(load(exact, double) * factor))
            if not again:
                store(units, unit_of(p_sq))
                store(units + 8, unit_of(u_sq))

    return find_factor


@kernel("iiiiiiiiiiiii", THREADS)
def take_step(code: Code) -> Any:
    """``(table, numbers, tiles, rows, columns, height, bands, stripes, row_var, col_var, means, rate,
    zero_grads)``: update the parameter."""
    h, c, like = prototypes(code)
    of_c, size = len(h) * like.itemsize, like.itemsize
    vectors = Vectors(code.formats, code.compute, STRIPE)
    update_row = register_jitable(_update_row(vectors))
    load_columns = register_jitable(_load_columns(vectors, code.compute))

    def take_step(
        table, numbers, tiles, rows, columns, height, bands, stripes, row_var, col_var, means, rate,
        zero_grads,
    ):  # fmt: skip
        lane, warp = lane_and_warp()
        own_h = unpack(h, numbers_at(h, numbers, like), like)
        own_c = unpack(c, numbers_at(c, numbers + of_c, like), like)
        aligned, own_rate = integer(table, ARRAY_ALIGNED) != 0, load(rate, like)
        tile = np.int64(cuda.blockIdx.x) * WARPS + warp
        while tile < tiles:
            matrix, _, _, top, bottom, left, right = tile_at(tile, rows, columns, height, bands, stripes)
            mean = load(means + matrix * size, like)
            of_columns = load_columns(col_var + matrix * columns * size, left, right, lane)
            for row in range(top, bottom):
                own_row = matrix * rows + row
                share = share_of(own_h, load(row_var + own_row * size, like), mean)
                first, last = own_row * columns + left, own_row * columns + right
                update_row(
                    own_h, own_c, table, aligned, first, last, lane, share, of_columns, own_rate, zero_grads
                )
            tile += np.int64(cuda.gridDim.x) * WARPS

    return take_step


def _update_row(vectors: Vectors) -> Callable:
    """The function that updates a lane's elements of a row."""
    elements = vectors.elements
    lines = vectors.opening()
    for j in range(vectors.count):
        lines += vectors.reads(j)
    outputs = [(m, place) for m, place in enumerate(elements.outputs) if place is not None]
    for j in range(vectors.count):
        for e in range(vectors.length):
            lines += [
                f"p, g = read({vectors.given(j, e)})",
                f"u = direction(h, scaled(c, g), share * columns[{j * vectors.length + e}])",
                f"n{j}_{e} = write(decayed(c, p) - rate * u)",
            ]
        lines += vectors.stores(outputs, "n", j)
        lines += ["if zero_grads:", *(f"    {line}" for line in vectors.clearing(j))]
    names = {**vectors.names, "read": elements.read, "write": elements.write, "scaled": scaled}
    names |= {"decayed": decayed, "direction": adafactor_direction}
    arguments = "h, c, row, aligned, at, last, lane, share, columns, rate, zero_grads"
    return define("update_row", arguments, *lines, "return None", **names)
