"""Adafactor of matrices: second moments of rows and columns in place of those of elements.

An array is a stack of matrices, its last two axes. Matrices are cut into tiles, which threads share out;
LANES elements at a time are decoded (see formats.py) and worked on while they are in cache. Sums are in
float64, over a tile each, and added in order, so that they do not depend on the number of threads.

Three passes, since the length of a step depends on all of the update and this on all of the gradient: sums
of squares, those of the update, and the update. Bytes moved for an element of float32: p and g read, g read,
p and g read and p written, 24.
"""

from typing import Any

import numpy as np
from numba.np.numpy_support import as_dtype

from fastopt.kernels.cpu.chunks import chunk_count, chunk_ends
from fastopt.kernels.cpu.for_each import for_each
from fastopt.kernels.cpu.jit import Kernel, helper, restricted_helper
from fastopt.kernels.cpu.memory import empty
from fastopt.kernels.cpu.norms import add_squares, add_sums, total_of
from fastopt.kernels.cpu.runs import (
    close_parameter,
    gradient_itemsize,
    new_array,
    open_gradient,
    open_parameter,
)
from fastopt.kernels.element import decayed, scaled, trust_ratio, unpack
from fastopt.kernels.intrinsics import view
from fastopt.kernels.linked import overload
from fastopt.kernels.magnitude import unit_of
from fastopt.kernels.rules.adafactor import adafactor_direction, share_of
from fastopt.kernels.rules.lerp import lerp

TILE_ROWS, TILE_COLUMNS = 32, 4_096  # rows long enough for the processor to fetch ahead
LANES = 512  # elements of a row that are worked on at a time, a divisor of TILE_COLUMNS
CHUNK = TILE_ROWS * TILE_COLUMNS  # elements that a thread takes at a time, or a few more


def tile_arguments(
    h: Any,
    c: Any,
    like: Any,
    kinds: Any,
    places: np.ndarray,
    shape: tuple[int, int, int],
    row_var: np.ndarray,
    col_var: np.ndarray,
    numbers: np.ndarray,
    zero_grads: bool,
) -> tuple:
    """The arguments of :data:`update_tiles`.

    h, c: AdafactorH, and Scaled or Decoupled; their types count. like: a number of the type that is computed
    with. kinds: formats of parameter and gradient. places: two addresses of each (see layout.py).
    shape: matrices, rows, columns. row_var, col_var: [matrices * rows] and [matrices * columns], of the
    type of ``like``. numbers: fields of h and of c, float64. zero_grads: whether gradients become 0.
    """
    matrices, rows, columns = shape
    bands, stripes = _pieces(rows, TILE_ROWS), _pieces(columns, TILE_COLUMNS)
    chunk = max(1, CHUNK // max(1, min(rows, TILE_ROWS) * min(columns, TILE_COLUMNS)))
    memory = (
        empty((matrices * stripes, rows), np.float64),
        empty((matrices * bands, columns), np.float64),
        empty(matrices, np.float64),
        empty((2, matrices * bands * stripes), np.float64),
    )
    given = h, c, like, kinds, places, shape, row_var, col_var, numbers, zero_grads, chunk
    return *given, *memory


def _pieces(size: int, most: int) -> int:
    return -(-size // most)


@Kernel
def update_tiles(team, h, c, like, kinds, places, shape, row_var, col_var, numbers, zero_grads, chunk,
                 row_sums, col_sums, means, sums):  # fmt: skip
    """Update an array, a stack of matrices, and its state with its gradient. The arguments up to ``chunk``,
    tiles a thread takes at a time, are those of :func:`tile_arguments`; the others are memory for sums of
    squares: row_sums: [matrix and stripe, row]. col_sums: [matrix and band, column]. means: [matrix], of
    row_var. sums: [2, tile], of p and the update."""
    chunks = chunk_count(sums.shape[1], chunk)
    given = h, c, like, kinds, places, shape, numbers
    for_each(team, add_tiles, chunks, (given, chunk, row_sums, col_sums, sums))
    for_each(team, update_moments, means.size, (given, row_sums, col_sums, row_var, col_var, means))
    for_each(team, add_updates, chunks, (given, chunk, row_var, col_var, means, 1.0, 1.0, sums))
    p_unit, u_unit = unit_of(total_of_tiles(sums[0])), unit_of(total_of_tiles(sums[1]))
    if p_unit != 1.0 or u_unit != 1.0:
        for_each(team, add_updates, chunks, (given, chunk, row_var, col_var, means, p_unit, u_unit, sums))
    factor = factor_of(h, shape, numbers, sums, p_unit, u_unit)
    tiles = sums.shape[1]
    for_each(team, take_step, chunks, (given, chunk, tiles, row_var, col_var, means, factor, zero_grads))


@helper
def tile_at(shape, tile):
    """The matrix, the band of rows and the stripe of columns of a tile, and where these begin and end."""
    stripes = chunk_count(shape[2], TILE_COLUMNS)
    bands = chunk_count(shape[1], TILE_ROWS)
    matrix, band, stripe = tile // (bands * stripes), tile // stripes % bands, tile % stripes
    top, left = band * TILE_ROWS, stripe * TILE_COLUMNS
    bottom, right = min(top + TILE_ROWS, shape[1]), min(left + TILE_COLUMNS, shape[2])
    return matrix, matrix * bands + band, matrix * stripes + stripe, top, bottom, left, right


@helper
def add_tiles(k, given, chunk, row_sums, col_sums, sums):
    """The squares of the parameter and, by row and by column, of the gradient; for the tiles of chunk ``k``.
    given: h, c, like, kinds, places, shape, numbers."""
    h, c, like, kinds, places, shape, numbers = given
    c = unpack(c, numbers[len(h) :], like)
    buffers = new_array((2, LANES), like)
    lanes = np.empty((2, LANES))
    first, last = chunk_ends(k, chunk, sums.shape[1])
    for tile in range(first, last):
        matrix, band, stripe, top, bottom, left, right = tile_at(shape, tile)
        col_sums[band, left:right] = 0.0
        used = min(LANES, right - left)
        p_lanes, g_lanes = lanes[0, :used], lanes[1, :used]
        p_lanes[:] = 0.0
        for row in range(top, bottom):
            first_of_row = (matrix * shape[1] + row) * shape[2]
            g_lanes[:] = 0.0
            for column in range(left, right, LANES):
                width = min(LANES, right - column)
                at = first_of_row + column
                p = open_parameter(kinds, like, places, at, width, buffers[0])
                g = open_gradient(kinds, like, places, at, width, buffers[1])
                add_tile_squares(c, p, g, col_sums[band, column : column + width], g_lanes, p_lanes)
            row_sums[stripe, row] = total_of(g_lanes)
        sums[0, tile] = total_of(p_lanes)


@restricted_helper
def add_tile_squares(c, p, g, columns, g_lanes, p_lanes):
    for j in range(p.size):
        x, y = np.float64(scaled(c, g[j])), np.float64(p[j])
        columns[j] += x * x
        g_lanes[j] += x * x
        p_lanes[j] += y * y


@helper
def update_moments(matrix, given, row_sums, col_sums, row_var, col_var, means):
    """Those of a matrix, and the mean of its rows'."""
    h, _, like, _, _, shape, numbers = given
    h = unpack(h, numbers, like)
    rows, columns = shape[1], shape[2]
    stripes, bands = row_sums.shape[0] // shape[0], col_sums.shape[0] // shape[0]
    own_rows, own_columns = row_var[matrix * rows :][:rows], col_var[matrix * columns :][:columns]
    average(h, like, row_sums[matrix * stripes :][:stripes], columns, own_rows)
    average(h, like, col_sums[matrix * bands :][:bands], rows, own_columns)
    total = 0.0
    for row in range(rows):
        total += np.float64(own_rows[row])
    means[matrix] = total / rows


@helper
def average(h, like, sums, count, moments):
    """Average the moments with the means that belong to ``sums``: [part, moment]."""
    totals = sums[0]
    for part in range(1, sums.shape[0]):
        add_sums(totals, sums[part])
    for k in range(moments.size):
        mean = cast(like, totals[k] / count)
        moments[k] = lerp(moments[k], mean, h.one_minus_decay, h.decay)


@helper
def add_updates(k, given, chunk, row_var, col_var, means, p_unit, u_unit, sums):
    """The squares of the update over its unit; and those of the parameter, which have been added up in the
    unit 1, where its own is another."""
    h, c, like, kinds, places, shape, numbers = given
    c = unpack(c, numbers[len(h) :], like)
    h = unpack(h, numbers, like)
    buffers = new_array((2, LANES), like)
    lanes = np.empty((2, LANES))
    first, last = chunk_ends(k, chunk, sums.shape[1])
    for tile in range(first, last):
        matrix, _, _, top, bottom, left, right = tile_at(shape, tile)
        columns = col_var[matrix * shape[2] :]
        used = min(LANES, right - left)
        p_lanes, u_lanes = lanes[0, :used], lanes[1, :used]
        p_lanes[:] = 0.0
        u_lanes[:] = 0.0
        for row in range(top, bottom):
            own_row = matrix * shape[1] + row
            share = share_of(h, row_var[own_row], cast(like, means[matrix]))
            for column in range(left, right, LANES):
                width = min(LANES, right - column)
                at = own_row * shape[2] + column
                if p_unit != 1.0:
                    p = open_parameter(kinds, like, places, at, width, buffers[0])
                    add_squares(p, 1.0 / p_unit, p_lanes)
                g = open_gradient(kinds, like, places, at, width, buffers[1])
                updates = buffers[0, :width]
                find_updates(h, c, g, share, columns[column : column + width], updates)
                add_squares(updates, 1.0 / u_unit, u_lanes)
        if p_unit != 1.0:
            sums[0, tile] = total_of(p_lanes)
        sums[1, tile] = total_of(u_lanes)


@restricted_helper
def find_updates(h, c, g, share, columns, updates):
    for j in range(g.size):
        updates[j] = adafactor_direction(h, scaled(c, g[j]), share * columns[j])


@helper
def take_step(k, given, chunk, tiles, row_var, col_var, means, factor, zero_grads):
    """Update the parameter."""
    h, c, like, kinds, places, shape, numbers = given
    rate = cast(like, numbers[0] * factor)
    c = unpack(c, numbers[len(h) :], like)
    h = unpack(h, numbers, like)
    buffers = new_array((2, LANES), like)
    first, last = chunk_ends(k, chunk, tiles)
    for tile in range(first, last):
        matrix, _, _, top, bottom, left, right = tile_at(shape, tile)
        columns = col_var[matrix * shape[2] :]
        for row in range(top, bottom):
            own_row = matrix * shape[1] + row
            share = share_of(h, row_var[own_row], cast(like, means[matrix]))
            for column in range(left, right, LANES):
                width = min(LANES, right - column)
                at = own_row * shape[2] + column
                p = open_parameter(kinds, like, places, at, width, buffers[0])
                g = open_gradient(kinds, like, places, at, width, buffers[1])
                update_row(h, c, p, g, share, columns[column : column + width], rate)
                close_parameter(kinds, like, places, at, p)
                if zero_grads:
                    size = gradient_itemsize(kinds, like)
                    view(places[2] + at * size, width * size, np.uint8(0))[:] = 0


@restricted_helper
def update_row(h, c, p, g, share, columns, rate):
    for j in range(p.size):
        p[j] = decayed(c, p[j]) - rate * adafactor_direction(h, scaled(c, g[j]), share * columns[j])


@helper
def factor_of(h, shape, numbers, sums, p_unit, u_unit):
    """That of the learning rate, of the sums of all tiles."""
    p_sq, u_sq = total_of_tiles(sums[0]), total_of_tiles(sums[1])
    size = shape[0] * shape[1] * shape[2]
    return trust_ratio(unpack(h, numbers, np.float64(0)), p_sq, u_sq, p_unit, u_unit, size)


@helper
def total_of_tiles(sums):
    total = 0.0
    for tile in range(sums.size):
        total += sums[tile]
    return total


def cast(like, x):
    """``x`` as the type of ``like``."""
    return type(like)(x)


@overload(cast)
def _cast(like, x):
    dtype = as_dtype(like).type
    return lambda like, x: dtype(x)
