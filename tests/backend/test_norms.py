"""Sums of squares, scaling and clipping."""

import math

import numpy as np
import pytest
from backend.launches import BFLOAT, BFLOAT16, DOUBLE, HALF, PLAIN, SINGLE, assert_same, segments
from devices import Cpu

from fastopt.kernels.work import TableGradient

DTYPES = [SINGLE, DOUBLE, HALF, BFLOAT]


def squares_of(device, arrays, kind, compute, scale):
    squares = device.backend.Squares(compute, kind, [array.size for array in arrays])
    placed = [device.put(array) for array in arrays]
    addresses = np.array([device.backend.address(array) for array in placed], np.int64)
    total = squares.sum(addresses, scale)
    assert type(total) is float
    assert squares.sum(addresses, scale) == total  # the same bits
    return squares, total


@pytest.mark.covers("Squares", "address")
@pytest.mark.parametrize(
    ("dtype", "kind"), [(SINGLE, PLAIN), (DOUBLE, PLAIN), (BFLOAT, BFLOAT16)], ids=["single", "double", "16"]
)
def test_squares_are_summed_in_float64(device, rng, dtype, kind):
    compute = DOUBLE if dtype == DOUBLE else SINGLE
    shapes = [(5, 7), (0,), (20_000,), ()]
    whole = [np.asarray(rng.integers(-200, 200, shape)).astype(dtype) for shape in shapes]
    exact = sum((array.astype(np.float64) ** 2).sum() for array in whole)
    assert squares_of(device, whole, kind, compute, 1.0)[1] == exact  # whole numbers are summed exactly
    assert squares_of(device, whole, kind, compute, -0.25)[1] == exact / 16
    real = [np.asarray(rng.normal(size=shape)).astype(dtype) for shape in shapes]
    exact = math.fsum(x * x * 0.09 for array in real for x in array.astype(np.float64).flat)
    assert squares_of(device, real, kind, compute, 0.3)[1] == pytest.approx(exact, rel=1e-13)


@pytest.mark.covers("Squares")
def test_squares_of_other_arrays_and_of_none(device):
    squares, total = squares_of(device, [np.full(3, 2.0, np.float32)], PLAIN, SINGLE, 1.0)
    assert total == 12
    other = device.put(np.full(3, np.nan, np.float32))
    assert math.isnan(squares.sum(np.array([device.backend.address(other)]), 1.0))
    other = device.put(np.array([1, np.inf, 1], np.float32))
    assert squares.sum(np.array([device.backend.address(other)]), 1.0) == math.inf
    assert squares_of(device, [np.empty(0, np.float32)], PLAIN, SINGLE, 1.0)[1] == 0
    # float32 holds no squares of these
    assert squares_of(device, [np.full(1, 2.0**100, np.float32)], PLAIN, SINGLE, 1.0)[1] == 2.0**200


@pytest.mark.covers("sum_squares_rows", "segments_of")
def test_squares_of_rows_are_of_sums(device, rng):
    """Two tables, one with many rows, one with a source, weights and a row that is skipped."""
    values = rng.integers(-9, 9, (500, 3)).astype(np.float32)
    indices = rng.integers(0, 150, 500)
    one = TableGradient(device.put(values), segments(device, indices, 150))
    sums = np.zeros((150, 3))
    np.add.at(sums, indices, values)
    other_values = rng.integers(-9, 9, (4, 20)).astype(np.float32)
    other_indices, source, weights = np.array([2, 0, 2, 1, 2]), np.array([3, 0, 1, 1, 0]), np.arange(5) - 1.5
    order = np.argsort(other_indices, kind="stable")
    two = TableGradient(
        device.put(other_values),
        segments(device, other_indices, 3),
        device.put(source[order].astype(np.int32)),
        device.put(weights[order].astype(np.float32)),
        skipped=1,
    )
    other_sums = np.zeros((3, 20))
    np.add.at(other_sums, other_indices, weights[:, None] * other_values[source])
    other_sums[1] = 0
    first, second = (sums**2).sum(), (other_sums**2).sum()
    assert first > 0 and second > 0
    found = device.backend.sum_squares_rows([one, two], 1.0)
    assert type(found) is float
    assert found == first + second
    assert device.backend.sum_squares_rows([two], 0.5) == second / 4


@pytest.mark.covers("scale")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_are_scaled_in_place(device, rng, dtype):
    for shape in ((5, 7), (3000,), (0, 2), ()):
        array = np.asarray(rng.normal(size=shape)).astype(dtype)
        placed = device.put(array)
        assert device.backend.scale(placed, 0.3) is None
        wide = DOUBLE if dtype == DOUBLE else SINGLE
        expected = (array.astype(wide) * wide.type(0.3)).astype(dtype)
        assert_same([device.get(placed)], [expected])


@pytest.mark.covers("clip")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_are_clipped_in_place(device, dtype):
    array = np.array([[0.5, -0.5, 0.25, -3.0], [7.0, np.nan, np.inf, -np.inf]], dtype)
    expected = np.array([[0.5, -0.5, 0.25, -0.5], [0.5, np.nan, 0.5, -0.5]], dtype)
    placed = device.put(array)
    assert device.backend.clip(placed, 0.5) is None
    assert_same([device.get(placed)], [expected])
    device.backend.clip(placed, 0.0)
    assert_same([device.get(placed)], [expected * np.zeros(1, dtype)])
    device.backend.clip(device.put(np.empty(0, dtype)), 0.5)


@pytest.mark.covers("coalesce", "segments_of")
def test_values_are_summed_into_the_place_of_the_first(device, rng):
    indices = rng.integers(0, 40, 300)
    values = rng.normal(size=(300, 5)).astype(np.float32)
    expected = values.copy()
    for row in np.unique(indices):
        first, *others = np.flatnonzero(indices == row)
        for position in others:  # in their order
            expected[first] += values[position]
            expected[position] = 0
    placed = device.put(values)
    device.backend.coalesce(placed, segments(device, indices, 40))
    assert_same([device.get(placed)], [expected])


@pytest.mark.covers("coalesce", "segments_of")
def test_the_second_of_tables_sorted_together_is_coalesced(device):
    parts = [(device.put(np.array([0, 1, 0])), 2), (device.put(np.array([5, 3, 5, 5])), 9)]
    found = device.backend.segments_of(parts)
    placed = device.put(np.array([[1.0], [2.0], [4.0], [8.0]], np.float32))
    device.backend.coalesce(placed, found[1])
    assert device.get(placed).tolist() == [[13.0], [2.0], [0.0], [0.0]]


@pytest.mark.covers("norm", "Squares", "segments_of")
def test_a_norm_that_nobody_waits_for_is_that_of_the_sums(device, rng):
    arrays = [rng.normal(size=n).astype(dtype) for n, dtype in ((300, SINGLE), (20_000, SINGLE), (7, DOUBLE))]
    placed = [device.put(array) for array in arrays]
    parts = []
    for own, compute in ((placed[:2], SINGLE), (placed[2:], DOUBLE)):
        squares = device.backend.Squares(compute, PLAIN, [array.size for array in own])
        parts.append((squares, np.array([device.backend.address(array) for array in own])))
    values = rng.normal(size=(4, 6)).astype(SINGLE)
    found = segments(device, [2, 0, 2, 1], 3)
    gradient = TableGradient(device.put(values), found)
    norm = device.backend.norm(parts, [gradient])
    if isinstance(device, Cpu):
        assert norm is None  # sums are at hand at once
        return
    of_rows = np.stack([values[1], values[3], values[0] + values[2]]).astype(DOUBLE)
    total = sum(float((array.astype(DOUBLE) ** 2).sum()) for array in [*arrays, of_rows])
    assert norm.value() == pytest.approx(math.sqrt(total), rel=1e-14)
    assert device.backend.norm(parts, [gradient]).value() == norm.value()  # the same bits
    for scale, most in ((1.0, 1.0), (0.5, 1e9)):
        want = min(1.0, most / (scale * norm.value() + 1e-6))
        assert device.get(norm.factor(scale, most)).tolist() == [want]


@pytest.mark.covers("norm", "Squares")
@pytest.mark.parametrize("size", [1e200, 1e-200, np.nan, np.inf])
def test_a_norm_whose_squares_float64_cannot_hold(device, size):
    array = device.put(np.full(4, size))
    squares = device.backend.Squares(DOUBLE, PLAIN, [4])
    norm = device.backend.norm([(squares, np.array([device.backend.address(array)]))], [])
    if isinstance(device, Cpu):
        assert norm is None
        return
    np.testing.assert_allclose(norm.value(), 2 * size, rtol=1e-14)
    got = device.get(norm.factor(1.0, 1.0))[0]
    np.testing.assert_allclose(got, min(1.0, 1.0 / (2 * size + 1e-6)) if size == size else np.nan, rtol=1e-14)
