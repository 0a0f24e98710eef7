"""Indices: their bounds, and the segments of equal ones."""

import numpy as np
import pytest

INTEGERS = [np.int32, np.int64]


@pytest.mark.covers("bounds")
@pytest.mark.parametrize("dtype", INTEGERS)
def test_bounds_are_the_smallest_and_the_largest(device, rng, dtype):
    for size in (1, 2, 100, 70_000):
        indices = rng.integers(-1000, 1000, size).astype(dtype)
        low, high = device.backend.bounds(device.put(indices))
        assert (low, high) == (indices.min(), indices.max())
        assert type(low) is int and type(high) is int
    indices[-1], indices[40_000] = np.iinfo(dtype).max, np.iinfo(dtype).min
    assert device.backend.bounds(device.put(indices)) == (np.iinfo(dtype).min, np.iinfo(dtype).max)


def check(device, found, indices, first_row=0, first_position=0):
    """The segments of one table against a stable sort."""
    rows, order, starts = (device.get(array) for array in found[:3])
    assert (rows.dtype, order.dtype, starts.dtype) == (np.int64, np.int32, np.int32)
    assert (found.first_row, found.first_position) == (first_row, first_position)
    distinct, firsts = np.unique(np.sort(indices), return_index=True)
    np.testing.assert_array_equal(rows, distinct + first_row)
    np.testing.assert_array_equal(device.get(found.own_rows()), distinct)
    before = first_position  # all positions of earlier tables come first
    np.testing.assert_array_equal(starts, before + np.append(firsts, indices.size))
    own = order[starts[0] : starts[-1]]
    np.testing.assert_array_equal(own - first_position, np.argsort(indices, kind="stable"))


@pytest.mark.covers("segments_of")
@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("rows", [1, 50, 3_000_000])
def test_segments_of_a_table(device, rng, dtype, rows):
    for size in (1, 1000, 40_000):
        indices = rng.integers(0, rows, size).astype(dtype)
        indices[size // 2 :: 3] = rows - 1  # one that is popular
        given = device.put(indices)
        [found] = device.backend.segments_of([(given, rows)])
        check(device, found, indices)
        np.testing.assert_array_equal(device.get(given), indices)


@pytest.mark.covers("segments_of")
def test_segments_of_many_tables_are_sorted_together(device, rng):
    sizes, rows = [300, 0, 1, 200], [40, 9, 7, 100_000]
    parts = [
        rng.integers(0, count, size).astype(dtype)
        for size, count, dtype in zip(sizes, rows, [np.int64, np.int32, np.int64, np.int32], strict=True)
    ]
    found = device.backend.segments_of(
        [(device.put(part), count) for part, count in zip(parts, rows, strict=True)]
    )
    assert len(found) == 4
    for k, part in enumerate(parts):
        check(device, found[k], part, sum(rows[:k]), sum(sizes[:k]))


@pytest.mark.covers("segments_of")
def test_segments_of_no_indices(device):
    none = np.empty(0, np.int64)
    [found] = device.backend.segments_of([(device.put(none), 5)])
    check(device, found, none)
    found = device.backend.segments_of([(device.put(none), 5), (device.put(none), 0)])
    check(device, found[0], none)
    check(device, found[1], none, 5)


@pytest.mark.covers("segments_of")
def test_segments_of_too_many_rows_are_refused(device):
    with pytest.raises(ValueError, match="split the batch"):
        device.backend.segments_of([(device.put(np.arange(9)), 2**62)])
