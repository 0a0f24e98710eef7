"""Mean squares of rows: rows side by side and one row have the bits of the documented tree."""

import ctypes
import gc
import mmap
import sys

import numba
import numpy as np
import pytest

from fastopt.kernels.cpu.row_means import FEWEST, LANES, NOT_FOUND, find_means, mean_square
from fastopt.kernels.intrinsics import on_stack, view
from fastopt.kernels.rule import L2, Decoupled, Scaled
from fastopt.kernels.rules.adagrad import AdaGradH, RowwiseAdaGradH

DIMS = [1, 2, 5, 8, 15, 16, 17, 31, 32, 33, 47, 48, 50, 63, 64, 65, 100, 128, 190, 1000]
MOST = 32  # rows of a block


@numba.njit(error_model="numpy")
def side_by_side(h, c, limits, gradients, dim, like, out):
    addresses, means = on_stack(np.int64(0)), on_stack(like)
    for k in range(gradients.size):
        addresses[k] = gradients[k]
    find_means(h, c, limits, 0, addresses, gradients.size, dim, means)
    for k in range(gradients.size):
        out[k] = means[k]


@numba.njit(error_model="numpy")
def one_by_one(c, gradients, dim, like, out):
    for k in range(gradients.size):
        g = view(gradients[k], dim, like)
        out[k] = mean_square(c, g, g, type(like)(NOT_FOUND))


def rows_of(rng, dtype, count, dim):
    """Rows at places that are not aligned, and their addresses; each is followed by what may not be read."""
    memory = np.full((count, dim + 3), np.nan, dtype)
    memory[:, 1 : dim + 1] = rng.standard_normal((count, dim)) * 10.0 ** rng.integers(-3, 4, (count, 1))
    return memory[:, 1 : dim + 1], memory.ctypes.data + memory.strides[0] * np.arange(count) + memory.itemsize


def tree_of(row):
    """The mean square of a row, in the order that row_means.py describes, added without vectors."""
    total = row.dtype.type(0)
    if row.size < 16:  # four interleaved sums
        fours = row[: row.size // 4 * 4].reshape(-1, 4)
        a, b, c, d = np.cumsum(np.vstack([np.zeros(4, row.dtype), fours * fours]), axis=0)[-1]
        total = (a + b) + (c + d)
        for x in row[fours.size :]:
            total += x * x
        return total / row.dtype.type(row.size)
    for first in range(0, row.size, 64):
        squares = np.zeros(64, row.dtype)
        part = row[first : first + 64]
        squares[: part.size] = part * part
        sums = [(squares[k] + squares[16 + k]) + (squares[32 + k] + squares[48 + k]) for k in range(16)]
        while len(sums) > 1:
            half = len(sums) // 2
            sums = [sums[k] + sums[half + k] for k in range(half)]
        total += sums[0]
    return total / row.dtype.type(row.size)


def found_by(h, c, limit, gradients, dim, dtype):
    out = np.full(gradients.size, np.nan, dtype)
    limits = None if limit is None else np.array([limit])
    side_by_side(h, c, limits, gradients, dim, dtype(0), out)
    return out


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dim", DIMS)
def test_means_are_those_of_the_tree(dtype, dim):
    rng = np.random.default_rng(dim)
    h, c = RowwiseAdaGradH(dtype(0.1), dtype(1e-8)), Scaled(dtype(1), dtype(np.inf))
    for count in (FEWEST, 5, 15, 16, 17, MOST):
        rows, gradients = rows_of(rng, dtype, count, dim)
        found = found_by(h, c, None, gradients, dim, dtype)
        np.testing.assert_array_equal(found, found_by(h, c, np.inf, gradients, dim, dtype))
        single = np.empty(count, dtype)
        one_by_one(c, gradients, dim, dtype(0), single)
        np.testing.assert_array_equal(single, [tree_of(row) for row in rows])
        np.testing.assert_array_equal(found, NOT_FOUND if dim < LANES else single)
        exact = (rows.astype(np.longdouble) ** 2).mean(axis=1)
        # Each square is rounded, added to at most 3 + 4 + dim / 64 others, and the sum is divided.
        np.testing.assert_allclose(single, exact, rtol=(9 + dim / 64) * np.finfo(dtype).eps)


@pytest.mark.parametrize("dim", [16, 37, 70])
def test_special_numbers_stay_in_their_rows(dim):
    h, c = RowwiseAdaGradH(np.float32(0.1), np.float32(1e-8)), Scaled(np.float32(1), np.float32(np.inf))
    rows, gradients = rows_of(np.random.default_rng(0), np.float32, 20, dim)
    rows[3, dim // 2], rows[7, dim - 1], rows[11] = np.nan, -np.inf, 1e30
    found = found_by(h, c, None, gradients, dim, np.float32)
    assert list(np.flatnonzero(~np.isfinite(found))) == [3, 7, 11]
    assert np.isnan(found[3])


@pytest.mark.parametrize("kind", [Scaled, lambda *given: Decoupled(*given, np.float32(0.9))])
@pytest.mark.parametrize("scale", [1.0, -1.0, 0.37, 0.0, 1e30, np.inf, np.nan])
@pytest.mark.parametrize("clip", [np.inf, 0.5, 0.0])
def test_gradients_are_scaled_and_clipped_before(kind, scale, clip):
    h, c = RowwiseAdaGradH(np.float32(0.1), np.float32(1e-8)), kind(np.float32(scale), np.float32(clip))
    for dim in (16, 33, 70):
        rows, gradients = rows_of(np.random.default_rng(0), np.float32, 20, dim)
        rows[3, dim // 2], rows[7, dim - 1], rows[11], rows[12] = np.nan, -np.inf, 1e30, 0
        found, single = found_by(h, c, None, gradients, dim, np.float32), np.empty(20, np.float32)
        one_by_one(c, gradients, dim, np.float32(0), single)
        finite = np.isfinite(found)  # an infinite sum is found again from smaller numbers
        np.testing.assert_array_equal(found[finite], single[finite])
        np.testing.assert_array_equal(np.isnan(found), np.isnan(single))
        assert finite.any() or not np.isfinite(scale)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to guard memory")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nothing_is_read_beyond_a_row(dtype):
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    try:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(address + page), ctypes.c_size_t(page), 0) == 0
        h, c = RowwiseAdaGradH(dtype(0.1), dtype(1e-8)), Scaled(dtype(1), dtype(np.inf))
        for dim in range(LANES, 131):
            gradients = np.full(FEWEST, address + page - dim * np.dtype(dtype).itemsize)
            np.testing.assert_array_equal(found_by(h, c, None, gradients, dim, dtype), 0)
        assert libc.mprotect(ctypes.c_void_p(address + page), ctypes.c_size_t(page), 3) == 0
    finally:
        gc.collect()
        memory.close()


@pytest.mark.parametrize(
    ("c", "limit"),
    [
        (Scaled(np.float32(1), np.float32(np.inf)), 3.0),
        (Decoupled(np.float32(1), np.float32(np.inf), np.float32(0.9)), 3.0),
        (L2(np.float32(1), np.float32(np.inf), np.float32(0.1)), None),
    ],
)
def test_means_of_rows_with_limits_or_weight_decay_are_not_found(c, limit):
    h = RowwiseAdaGradH(np.float32(0.1), np.float32(1e-8))
    _, gradients = rows_of(np.random.default_rng(0), np.float32, 9, 40)
    np.testing.assert_array_equal(found_by(h, c, limit, gradients, 40, np.float32), NOT_FOUND)


@pytest.mark.parametrize("count", range(1, FEWEST))
def test_means_of_too_few_rows_are_not_found(count):
    h, c = RowwiseAdaGradH(np.float32(0.1), np.float32(1e-8)), Scaled(np.float32(1), np.float32(np.inf))
    _, gradients = rows_of(np.random.default_rng(0), np.float32, count, 40)
    np.testing.assert_array_equal(found_by(h, c, None, gradients, 40, np.float32), NOT_FOUND)


def test_rules_without_state_of_one_element_a_row_look_for_no_means():
    h, c = AdaGradH(np.float32(0.1), np.float32(1e-8)), Scaled(np.float32(1), np.float32(np.inf))

    @numba.njit
    def run(h, c, gradients, means):
        find_means(h, c, None, 0, gradients, gradients.size, 40, means)

    means = np.full(9, 5, np.float32)
    _, gradients = rows_of(np.random.default_rng(0), np.float32, 9, 40)
    run(h, c, gradients, means)
    np.testing.assert_array_equal(means, 5)
