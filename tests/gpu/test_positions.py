"""Bags of positions, values in the order of segments, limited rows and coalesced values of a CUDA device."""

import numpy as np
import pytest
from devices import CUDA

from fastopt.kernels.cpu import backend as cpu
from fastopt.kernels.cuda.array import upload
from fastopt.kernels.cuda.backend import positions as launches
from fastopt.kernels.cuda.backend.basics import Basics
from fastopt.kernels.cuda.backend.indices import Indices
from fastopt.kernels.cuda.backend.positions import Positions

DTYPES = np.float32, np.float64
DIMS = 1, 3, 8, 64, 130
ROWS = 20


class Backend(Basics, Indices, Positions):
    """What the tests ask."""


BACKEND = Backend(0, cpu)


@pytest.fixture(params=CUDA, autouse=True)
def device(request):
    return request.param()


@pytest.fixture(params=[1, 2048], ids=["by one block", "by many"], autouse=True)
def most_blocks(request, monkeypatch):
    """Results do not depend on the grid."""
    monkeypatch.setattr(launches, "MOST_BLOCKS", request.param)


def parts_of(*sizes):
    """Indices of tables with their segments on the host and on the device, which sorts them together."""
    rng = np.random.default_rng(sum(sizes))
    indices = [rng.zipf(1.3, size) % ROWS for size in sizes]
    host = [cpu.segments_of([(own, ROWS)])[0] if own.size else cpu.all_rows(0)[1] for own in indices]
    own = BACKEND.segments_of([(upload(0, own), ROWS) for own in indices])
    return list(zip(indices, host, own, strict=True))


def numbers(shape, dtype):
    return np.random.default_rng(shape[0]).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_coalesced_values_are_those_of_the_cpu(dim, dtype):
    for indices, host, own in parts_of(17, 0, 90):
        values = numbers((indices.size, dim), dtype)
        if indices.size:
            values[3], values[5], values[7] = np.nan, np.inf, -0.0
        array = upload(0, values)
        BACKEND.coalesce(array, own)
        if indices.size:
            cpu.coalesce(values, host)
        np.testing.assert_array_equal(array.copy_to_host(), values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_limited_rows_are_those_of_the_cpu(dim, dtype):
    """Squares are added in float64 in another order than on the CPU: a sum of so many may be off by half as
    many roundings in either, of which its root has half, and a factor be rounded the other way."""
    max_norm = 0.9 * dim**0.5
    tolerance = 2 * np.finfo(dtype).eps + dim / 2 * np.finfo(np.float64).eps
    for indices, host, own in parts_of(17, 0, 90):
        table = numbers((ROWS, dim), dtype)
        table[1] *= 10
        table[2, 0], table[3, dim - 1], table[4], table[5] = np.nan, np.inf, 0, table[5] * dtype(1e-30)
        if dtype == np.float64:
            table[6] *= 1e200  # whose squares are infinite
            table[7] *= 1e-200
        array, before = upload(0, table), table.copy()
        BACKEND.limit_norms(array, own, max_norm)
        if indices.size:
            cpu.limit_norms(table, host, max_norm)
        found = array.copy_to_host()
        np.testing.assert_allclose(found, table, rtol=tolerance, atol=0)
        np.testing.assert_array_equal(_changed(found, before), _changed(table, before))


def _changed(table, before):
    """Which rows are not as they were."""
    return (table.view(np.uint8) != before.view(np.uint8)).any(axis=1)


def test_norms_that_float64_can_not_square_are_limited():
    table = np.full((ROWS, 8), 1e-300)
    _, host, own = parts_of(40)[0]
    array = upload(0, table)
    BACKEND.limit_norms(array, own, 1e-300)
    cpu.limit_norms(table, host, 1e-300)
    assert (table[host.rows] < 1e-300).all()
    np.testing.assert_allclose(array.copy_to_host(), table, rtol=1e-15, atol=0)


def test_rows_outside_the_table_are_left_out():
    """Of indices that nobody checked."""
    table = np.full((ROWS, 8), 2.0, np.float32)
    indices = np.array([3, -1, ROWS, 10**12, 3, -(10**9)])
    array = upload(0, table)
    [own] = BACKEND.segments_of([(upload(0, indices), ROWS)])
    BACKEND.limit_norms(array, own, 1.0)
    found = array.copy_to_host()
    assert (found[3] < 2).all()
    np.testing.assert_array_equal(np.delete(found, 3, axis=0), np.delete(table, 3, axis=0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_in_the_order_of_segments(dtype):
    for indices, host, own in parts_of(17, 0, 700):
        values = numbers((indices.size,), dtype)
        found = BACKEND.take(upload(0, values), own).copy_to_host()
        expected = cpu.take(values, host) if indices.size else values
        np.testing.assert_array_equal(found, expected)


OFFSETS = {
    "some": [0, 0, 5, 5, 340, 700, 700],
    "one": [0, 700],
    "each": range(701),
}


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("padding", [-1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [True, False])
def test_bags_of_positions_are_those_of_the_cpu(offsets, padding, dtype, mean):
    offsets = np.array(OFFSETS[offsets], np.int64)
    indices = np.random.default_rng(1).integers(0, 6, 700).astype(np.int32)
    scales = numbers((700,), dtype)
    scales[9], scales[600] = np.nan, np.inf
    array = upload(0, scales)
    found = BACKEND.bags_of_positions(upload(0, offsets), upload(0, indices), array, mean, padding)
    expected = cpu.bags_of_positions(offsets, indices, scales, mean, padding)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found.copy_to_host(), expected)
    np.testing.assert_array_equal(array.copy_to_host(), scales)


def test_no_positions_have_no_bags():
    none = upload(0, np.zeros(0, np.int64))
    for offsets in ([0], [0, 0, 0]):
        found = BACKEND.bags_of_positions(upload(0, np.array(offsets)), none, None, True, -1)
        assert found.shape == (0,)


@pytest.mark.parametrize(
    "offsets", [[5, 2**40, -3, 700], [-(2**60), 3, 2**62], [900, 800, 700, 5], [3, 4]], ids=str
)
def test_offsets_that_nobody_checked_name_bags_that_there_are(offsets):
    """And no memory outside is read or written, which the interpreter would refuse."""
    indices, scales = upload(0, np.zeros(700, np.int64)), upload(0, np.ones(700, np.float32))
    found = BACKEND.bags_of_positions(upload(0, np.array(offsets)), indices, scales, True, 0)
    bags = found.copy_to_host()
    assert bags.min() >= 0 and bags.max() < len(offsets) - 1


def test_indices_without_bags_are_refused():
    with pytest.raises(ValueError, match="offsets have no bags for 2 indices"):
        given = upload(0, np.zeros(1, np.int64)), upload(0, np.zeros(2, np.int64))
        BACKEND.bags_of_positions(*given, None, False, -1)
