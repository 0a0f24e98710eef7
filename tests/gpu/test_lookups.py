"""Lookups on a CUDA device have the CPU's bits."""

import functools

import ml_dtypes
import numpy as np
import pytest
from devices import CUDA

from fastopt.kernels.cpu import backend as cpu
from fastopt.kernels.cuda.array import empty, upload
from fastopt.kernels.cuda.backend.basics import Basics
from fastopt.kernels.cuda.backend.lookups import Lookups
from fastopt.kernels.work import PooledLookup

ROWS = 40
DIMS = 1, 3, 8, 20, 64, 128, 260
DTYPES = np.float32, np.float64, np.float16, ml_dtypes.bfloat16
# Bags of 0 to 13 rows: none, fewer than are read at a time, as many, and more.
SIZES = 0, 1, 5, 0, 4, 13, 2, 0
POSITIONS = sum(SIZES)
PADDING = 3


class Backend(Basics, Lookups):
    """What the tests ask."""


BACKEND = Backend(0, cpu)


@pytest.fixture(params=CUDA, autouse=True)
def device(request):
    return request.param()


@pytest.fixture
def rng():
    return np.random.default_rng(1)


def table_of(rng, dim, dtype=np.float32, rows=ROWS):
    """Numbers with zeros of both signs and numbers that come up more than once."""
    table = rng.standard_normal((rows, dim)).astype(dtype)
    table[rng.random(table.shape) < 0.2] = -0.0
    table[rng.random(table.shape) < 0.1] = 1.5
    return table


def bags_of(rng, dtype=np.int64):
    """Indices, among them those of the row PADDING, some bags of which have no other, and offsets."""
    offsets = np.cumsum([0, *SIZES])
    indices = rng.integers(0, ROWS, POSITIONS).astype(dtype)
    indices[rng.random(POSITIONS) < 0.2] = PADDING
    indices[:1] = PADDING
    return indices, offsets


def unaligned(array):
    """A copy on the device that begins with no vector of 16 bytes."""
    memory = empty(0, array.size + 1, array.dtype)[1:]
    memory[...] = array.reshape(-1)
    return memory.reshape(array.shape)


def uploaded(given):
    return [upload(0, value) if isinstance(value, np.ndarray) else value for value in given]


def bits(array):
    """What is compared: any NaN is as good as another."""
    numbers = np.array(array)
    if numbers.dtype.kind != "i":
        numbers[numbers != numbers] = np.nan
    return numbers.view(f"u{numbers.itemsize}")


def assert_bits(got, want):
    found = got.copy_to_host()
    assert found.dtype == want.dtype and found.shape == want.shape
    np.testing.assert_array_equal(bits(found), bits(want))


def method(backend, name):
    return functools.partial(pooled, backend) if name == "pool" else getattr(backend, name)


def pooled(backend, table, *given):
    """The bags of one table, as a new array."""
    out = backend.empty((given[1].size - 1, table.shape[1]), table.dtype)
    backend.pool([PooledLookup(table, *given, out)])
    return out


def assert_as_cpu(name, *given, place=upload):
    """A method has the bits of the CPU's function; ``place`` brings the table to the device."""
    table = given[0]
    want = method(cpu, name)(*given)
    own = place(0, table) if place is upload else place(table)
    got = method(BACKEND, name)(own, *uploaded(given[1:]))
    if isinstance(want, tuple):
        for one, other in zip(got, want, strict=True):
            assert_bits(one, other)
    else:
        assert_bits(got, want)


# Rows


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather(rng, dim, dtype):
    indices = rng.integers(0, ROWS, 77).astype(np.int32 if dim % 8 else np.int64)
    assert_as_cpu("gather", table_of(rng, dim, dtype), indices)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_from_an_unaligned_table(rng, dtype):
    assert_as_cpu("gather", table_of(rng, 64, dtype), rng.integers(0, ROWS, 9), place=unaligned)


def test_gather_nothing(rng):
    assert_as_cpu("gather", table_of(rng, 8), np.empty(0, np.int64))
    assert_as_cpu("gather", np.empty((5, 0), np.float32), np.array([1, 2]))


def outside():
    """Indices of which every other one names no row."""
    indices = np.arange(14)
    indices[::2] = ROWS, -1, 2**62, -(2**62), ROWS + 1, -ROWS, 2**31
    return indices


@pytest.mark.parametrize("dim", [3, 64])
def test_gather_gives_zeros_for_indices_outside_the_table(rng, dim):
    table, indices = table_of(rng, dim) + 1, outside()
    want = cpu.gather(table, np.arange(14))
    want[::2] = 0
    assert_bits(BACKEND.gather(*uploaded([table, indices])), want)


def test_a_table_without_rows_has_all_indices_outside():
    table, indices, offsets = uploaded([np.empty((0, 8), np.float32), np.arange(5), np.array([0, 5, 5])])
    zeros = np.zeros((2, 8), np.float32)
    assert_bits(BACKEND.gather(table, indices), np.zeros((5, 8), np.float32))
    assert_bits(pooled(BACKEND, table, indices, offsets, None, True, -1), zeros)
    largest, winners = BACKEND.pool_max(table, indices, offsets, -1)
    assert_bits(largest, zeros)
    assert_bits(winners, np.full((2, 8), -1, np.int32))


# Bags


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pool(rng, dim, dtype):
    """Sums and means, with weights and without, all rows and all but one."""
    table = table_of(rng, dim, dtype)
    indices, offsets = bags_of(rng, np.int32 if dim % 8 else np.int64)
    of_weights = np.float64 if dtype == np.float64 else np.float32
    weights = rng.standard_normal(POSITIONS).astype(of_weights)
    for given, mean, padding in (
        (None, False, -1),
        (weights, True, -1),
        (None, True, PADDING),
        (weights, False, PADDING),
    ):
        assert_as_cpu("pool", table, indices, offsets, given, mean, padding)


def test_several_lookups_are_written_side_by_side(rng):
    """Tables of other sizes, dtypes and alignments, each to columns of a matrix of its dtype."""
    bags, wide, small = 9, np.zeros((9, 100), np.float32), np.zeros((9, 20), ml_dtypes.bfloat16)
    on_device, columns, places, expected = uploaded([wide, small]), [0, 0], [], []
    for k, (dim, dtype, rows) in enumerate(
        [(64, np.float32, 40), (3, np.float32, 7), (20, ml_dtypes.bfloat16, 11), (32, np.float32, 300)]
    ):
        table = table_of(rng, dim, dtype, rows)
        offsets = np.sort(rng.integers(0, 30, bags + 1))
        offsets[[0, -1]] = 0, 30
        given = table, rng.integers(0, rows, 30), offsets, None, k % 2 == 0, -1
        which = int(dtype != np.float32)
        first, columns[which] = columns[which], columns[which] + dim
        (wide, small)[which][:, first : first + dim] = pooled(cpu, *given)
        places.append(PooledLookup(*uploaded(given), on_device[which][:, first : first + dim]))
        expected.append(PooledLookup(*given, np.zeros((9, 128), dtype)[:, first : first + dim]))
    BACKEND.pool(places)
    for got, want in zip(on_device, [wide, small], strict=True):
        assert_bits(got, want)
    cpu.pool(expected)
    for got, want in zip(places, expected, strict=True):
        np.testing.assert_array_equal(bits(got.out.copy_to_host()), bits(want.out))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [-1, PADDING])
def test_pool_max(rng, dim, dtype, padding):
    indices, offsets = bags_of(rng, np.int32 if dim % 8 else np.int64)
    assert_as_cpu("pool_max", table_of(rng, dim, dtype), indices, offsets, padding)


def with_nan(rng, dtype):
    """A table in which one element of each bag is not a number, in some bags more than one."""
    table = table_of(rng, 8, dtype)
    table[rng.random(table.shape) < 0.3] = np.nan
    table[rng.random(table.shape) < 0.1] = np.inf
    table[rng.random(table.shape) < 0.1] = -np.inf
    return table


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [upload, unaligned], ids=["by vectors", "one by one"])
def test_bags_of_numbers_that_are_not_finite(rng, dtype, place):
    table, (indices, offsets) = with_nan(rng, dtype), bags_of(rng)
    assert_as_cpu("pool", table, indices, offsets, None, False, -1, place=place)
    assert_as_cpu("pool", table, indices, offsets, None, True, PADDING, place=place)
    assert_as_cpu("pool_max", table, indices, offsets, PADDING, place=place)


@pytest.mark.parametrize("place", [upload, unaligned], ids=["by vectors", "one by one"])
def test_sums_of_negative_zeros_keep_their_sign(place):
    """Unless a row is to be left out, for which the CPU begins with 0."""
    table = np.full((ROWS, 8), -0.0, np.float32)
    indices, offsets = np.array([1, 2, 3]), np.array([0, 1, 3, 3])
    for padding in -1, PADDING:
        assert_as_cpu("pool", table, indices, offsets, None, False, padding, place=place)


def test_a_device_takes_bags_one_after_the_other(rng, monkeypatch):
    """Results do not depend on how many blocks of threads share the bags."""
    monkeypatch.setattr("fastopt.kernels.cuda.lookups.MOST_BLOCKS", 1)
    offsets = np.arange(0, 3 * 21, 3)
    indices = rng.integers(0, ROWS, offsets[-1])
    table = table_of(rng, 128)
    assert_as_cpu("gather", table, indices)
    assert_as_cpu("pool", table, indices, offsets, None, True, -1)
    assert_as_cpu("pool_max", table, indices, offsets, -1)


@pytest.mark.parametrize("bags", [0, 5])
def test_bags_without_indices(rng, bags):
    table, indices = table_of(rng, 8), np.empty(0, np.int64)
    offsets = np.zeros(bags + 1, np.int64)
    assert_as_cpu("pool", table, indices, offsets, None, True, -1)
    assert_as_cpu("pool_max", table, indices, offsets, -1)


def test_rows_without_elements():
    table, indices, offsets = np.empty((5, 0), np.float32), np.array([1, 2]), np.array([0, 2])
    assert_as_cpu("pool", table, indices, offsets, None, True, -1)
    assert_as_cpu("pool_max", table, indices, offsets, -1)


@pytest.mark.parametrize("dim", [3, 64])
def test_rows_outside_the_table_are_left_out_of_sums_and_counted_by_means(rng, dim):
    """As rows of zeros would be, whatever their weights are; a bag of them alone is 0."""
    table, indices, offsets = table_of(rng, dim), outside(), np.array([0, 1, 7, 14])
    weights = rng.standard_normal(14).astype(np.float32)
    weights[::2] = np.inf
    sums = np.zeros((3, dim), np.float32)
    for bag, members in enumerate(([], [1, 3, 5], [7, 9, 11, 13])):
        for k in members:
            sums[bag] += weights[k] * table[k]
    counts = np.float32([[1], [6], [7]])
    for mean, want in (False, sums), (True, sums / counts):
        got = pooled(BACKEND, *uploaded([table, indices, offsets, weights]), mean, -1)
        np.testing.assert_array_equal(got.copy_to_host(), want)


def test_maxima_leave_out_rows_outside_the_table(rng):
    table, indices, offsets = table_of(rng, 8), outside(), np.array([0, 1, 7, 14])
    largest, winners = BACKEND.pool_max(*uploaded([table, indices, offsets]), -1)
    inside = [[], [1, 3, 5], [7, 9, 11, 13]]
    want = np.stack([table[own].max(0) if own else np.zeros(8, np.float32) for own in inside])
    of = np.stack([np.take(own, table[own].argmax(0)) if own else np.full(8, -1) for own in inside])
    np.testing.assert_array_equal(largest.copy_to_host(), want)
    np.testing.assert_array_equal(winners.copy_to_host(), of)


def test_offsets_that_nobody_checked_are_clamped(rng):
    """Bags reach neither before the first index nor beyond the last; one that ends before it begins is
    empty."""
    table, indices = table_of(rng, 8), rng.integers(0, ROWS, 6)
    offsets = np.array([-(2**62), 2, 9, 4, 2**62])
    within = [indices[:2], indices[2:6], indices[:0], indices[4:6]]
    got = pooled(BACKEND, *uploaded([table, indices, offsets]), None, False, -1)
    np.testing.assert_array_equal(
        got.copy_to_host(),
        pooled(cpu, table, np.concatenate(within), np.cumsum([0, *map(len, within)]), None, False, -1),
    )
    largest, _ = BACKEND.pool_max(*uploaded([table, indices, offsets]), -1)
    for bag, own in enumerate(within):
        want = table[own].max(0) if own.size else np.zeros(8)
        np.testing.assert_array_equal(largest.copy_to_host()[bag], want)


# Products


def assert_products(table, indices, bags, scales, padding, grads, place=upload, ulps=2):
    """Those of float64, to a few ulps of the sum of magnitudes, whatever the order of additions."""
    given = [indices, bags, scales, padding, grads]
    got = BACKEND.row_products(place(0, table) if place is upload else place(table), *uploaded(given))
    want = cpu.row_products(table, *given)
    products = table[indices].astype(np.float64) * grads[bags]
    size = np.abs(products).sum(1) * (1 if scales is None else np.abs(scales))
    found = got.copy_to_host()
    assert found.dtype == want.dtype == grads.dtype and found.shape == want.shape
    error = np.abs(found.astype(np.float64) - want)
    assert np.all(error <= ulps * np.finfo(grads.dtype).eps * size)
    np.testing.assert_array_equal(found[indices == padding], 0)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(rng, dim, dtype):
    indices, offsets = bags_of(rng, np.int32 if dim % 8 else np.int64)
    bags = np.repeat(np.arange(len(SIZES), dtype=np.int32), np.diff(offsets))
    compute = np.float64 if dtype == np.float64 else np.float32
    grads = rng.standard_normal((len(SIZES), dim)).astype(compute)
    scales = rng.standard_normal(POSITIONS).astype(compute)
    table = table_of(rng, dim, dtype)
    assert_products(table, indices, bags, scales, PADDING, grads)
    assert_products(table, indices, bags, None, -1, grads)


def test_products_of_an_unaligned_table(rng):
    indices, bags = np.arange(5), np.zeros(5, np.int32)
    grads = rng.standard_normal((1, 8)).astype(np.float32)
    assert_products(table_of(rng, 8), indices, bags, None, -1, grads, place=unaligned)


def test_products_outside_the_table_are_0(rng):
    """And so are those of bags that there are not."""
    table, indices, grads = table_of(rng, 8), outside(), rng.standard_normal((2, 8)).astype(np.float32)
    bags = np.array([0, 1, 1, 2, 0, -1, 1] * 2, np.int32)
    inside = np.arange(14) % 2 == 1
    inside &= (bags >= 0) & (bags < 2)
    got = BACKEND.row_products(*uploaded([table, indices, bags, None, -1, grads])).copy_to_host()
    np.testing.assert_array_equal(got[~inside], 0)
    want = (table[indices[inside]] * grads[bags[inside]]).sum(1)
    np.testing.assert_allclose(got[inside], want, rtol=1e-5, atol=1e-6)


def test_products_of_nothing(rng):
    none = np.empty(0, np.int64)
    grads = np.zeros((1, 8), np.float32)
    assert_products(table_of(rng, 8), none, none.astype(np.int32), None, -1, grads)
    empty_rows = np.empty((5, 0), np.float32)
    assert_products(empty_rows, np.array([1, 2]), np.zeros(2, np.int32), None, -1, grads[:, :0])
