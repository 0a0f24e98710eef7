"""What gradients of bags of rows need of positions: the bag of each, factors, and values in another order;
and what several gradients of a table need to be brought together."""

from typing import Any

import numpy as np

from fastopt.kernels.cuda.indices import place_of
from fastopt.kernels.cuda.integers import unchanged
from fastopt.kernels.cuda.launch import kernel
from fastopt.kernels.cuda.lookups import THREADS as ROW_THREADS
from fastopt.kernels.cuda.lookups import share_of
from fastopt.kernels.cuda.memory import add_at, integer, last_at_most, load, store
from fastopt.kernels.cuda.sort import index_at
from fastopt.kernels.cuda.sums import THREADS

_COUNT = np.int32(0)


@kernel("iiii", THREADS)
def find_bags() -> Any:
    """``(offsets, bags, size, found)``: the bag of each of ``size`` positions, int32, however long bags
    are."""

    def find_bags(offsets, bags, size, found):
        k, step = place_of()
        while k < size:
            store(found + k * 4, np.int32(last_at_most(offsets, bags, k)))
            k += unchanged(step)

    return find_bags


@kernel("iiiiiii", THREADS)
def count_padding() -> Any:
    """``(found, indices, stride, itemsize, size, padding, counts)``: how many positions of each bag have the
    row ``padding``, int64, added to ``counts``. Whole numbers: in any order the same."""

    def count_padding(found, indices, stride, itemsize, size, padding, counts):
        k, step = place_of()
        while k < size:
            if index_at(indices, stride, itemsize, k) == padding:
                add_at(counts + np.int64(load(found + k * 4, _COUNT)) * 8, np.int64(1))
            k += unchanged(step)

    return count_padding


@kernel("iiiii", THREADS)
def divide_scales(dtype: np.dtype) -> Any:
    """``(offsets, found, size, counts, scales)``: divide the scale of each position by how many rows its bag
    has but for those counted, if there are any ``counts``."""
    like, itemsize = dtype.type(0), dtype.itemsize
    cast = dtype.type

    def divide_scales(offsets, found, size, counts, scales):
        k, step = place_of()
        while k < size:
            bag = np.int64(load(found + k * 4, _COUNT))
            first, last = integer(offsets, bag), integer(offsets, bag + 1)
            members = min(max(last, np.int64(0)), size) - min(max(first, np.int64(0)), size)
            if counts:
                members -= integer(counts, bag)
            if members > 1:
                place = scales + k * itemsize
                store(place, load(place, like) / cast(members))
            k += unchanged(step)

    return divide_scales


@kernel("iiiii", THREADS)
def take(itemsize: int) -> Any:
    """``(values, order, first_position, size, out)``: ``out[j] = values[order[j] - first_position]``,
    whatever elements of so many bytes stand for."""
    zero = np.dtype(f"u{itemsize}").type(0)

    def take(values, order, first_position, size, out):
        j, step = place_of()
        while j < size:
            position = np.int64(load(order + j * 4, _COUNT)) - first_position
            store(out + j * itemsize, load(values + position * itemsize, zero))
            j += unchanged(step)

    return take


@kernel("iii", THREADS)
def shift() -> Any:
    """``(numbers, size, by)``: add ``by`` to each of so many int32 numbers."""

    def shift(numbers, size, by):
        k, step = place_of()
        while k < size:
            place = numbers + k * 4
            store(place, np.int32(load(place, _COUNT) + by))
            k += unchanged(step)

    return shift


@kernel("iii", THREADS)
def leave_out(itemsize: int) -> Any:
    """``(indices, size, row)``: have those of so many indices that name ``row`` name -1, which is no row."""
    cast = np.dtype(f"i{itemsize}").type
    zero, none = cast(0), cast(-1)

    def leave_out(indices, size, row):
        k, step = place_of()
        while k < size:
            if np.int64(load(indices + k * itemsize, zero)) == row:
                store(indices + k * itemsize, none)
            k += unchanged(step)

    return leave_out


@kernel("iiiiiii", ROW_THREADS)
def won_rows(dtype: np.dtype) -> Any:
    """``(values, bags, winners, dim, count, lane_bits, out)``: of ``count`` rows of ``dim`` elements, one for
    each position, each element that its position has won is that of the position's bag in ``values``, and the
    others are zeros."""
    zero, itemsize = dtype.type(0), dtype.itemsize

    def won_rows(values, bags, winners, dim, count, lane_bits, out):
        position, step, member, lanes = share_of(lane_bits)
        while position < count:
            bag = np.int64(load(bags + position * 4, _COUNT))
            d = member
            while d < dim:
                element = bag * dim + d
                x = zero
                if np.int64(load(winners + element * 4, _COUNT)) == position:
                    x = load(values + element * itemsize, zero)
                store(out + (position * dim + d) * itemsize, x)
                d += unchanged(lanes)
            position += unchanged(step)

    return won_rows
