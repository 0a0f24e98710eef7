"""Indices: their bounds, and the segments of equal ones."""

import numpy as np
import pytest

from fastopt.kernels import rules
from fastopt.kernels.work import CountFold, Segments

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


@pytest.mark.covers("copies")
def test_copies_come_with_the_smallest_and_the_largest(device, rng):
    shapes = [(70_000,), (3, 5), (1,), (40_000, 1), (32_768,)]
    given = [rng.integers(-1000, 1000, shape).astype(INTEGERS[k % 2]) for k, shape in enumerate(shapes)]
    given[0][-1], given[3][0] = np.iinfo(given[0].dtype).max, np.iinfo(given[3].dtype).min
    parts = [device.put(own) for own in given]
    parts.append(device.put(rng.integers(0, 9, (50, 4)))[:, 1])  # strided
    given.append(device.get(parts[-1]))
    found = device.backend.copies(parts)
    for own in parts:
        own[...] = 0
    for (copy, low, high), own in zip(found, given, strict=True):
        assert copy.dtype == own.dtype and copy.flags.c_contiguous
        np.testing.assert_array_equal(device.get(copy), own)
        assert (low, high) == (own.min(), own.max())
        assert type(low) is int and type(high) is int


def check(device, found, indices):
    """The segments of one table against a stable sort."""
    distinct, counts = np.unique(indices, return_counts=True)
    backend = device.backend
    np.testing.assert_array_equal(device.get(backend.distinct_rows(found)), distinct)
    np.testing.assert_array_equal(device.get(backend.counts(found)), counts)
    positions = device.get(backend.take(device.put(np.arange(indices.size)), found))
    np.testing.assert_array_equal(positions, np.argsort(indices, kind="stable"))
    if isinstance(found, Segments):
        check_arrays(device, found, indices)


def check_arrays(device, found, indices):
    """The arrays of the host's segments."""
    first_row, before = found.first_row, found.first_position
    rows, order, starts = (device.get(array) for array in found[:3])
    assert (rows.dtype, order.dtype, starts.dtype) == (np.int64, np.int32, np.int32)
    distinct, firsts = np.unique(np.sort(indices), return_index=True)
    np.testing.assert_array_equal(rows, distinct.astype(np.int64) + first_row)
    np.testing.assert_array_equal(starts, before + np.append(firsts, indices.size))
    own = order[starts[0] : starts[-1]]
    np.testing.assert_array_equal(own - before, np.argsort(indices, kind="stable"))


@pytest.mark.covers("segments_of", "distinct_rows", "counts")
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


@pytest.mark.covers("segments_of", "distinct_rows", "counts")
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
        check(device, found[k], part)


@pytest.mark.covers("segments_of", "distinct_rows", "counts")
@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("largest", [2**24, 2**33], ids=["of two digits", "of more"])
@pytest.mark.parametrize("size", [30, 20_000])
def test_segments_of_many_tables_of_a_dtype(device, rng, dtype, largest, size):
    """Those with few rows for their indices and others, all or no rows named, and without any."""
    rows = [1, 40, 2 * size, 3_000_000, 9, 0, size, largest]
    sizes = [size, size // 2, size, size, 0, 0, size, size - 1]
    counts = [min(count, 2**31) for count in rows]  # that indices of 32 bits can name
    parts = [rng.integers(0, own, many).astype(dtype) for own, many in zip(counts, sizes, strict=True)]
    parts[6] = rng.permutation(size).astype(dtype)
    parts[7][::3] = min(largest, 2**31) - 1
    given = [(device.put(part), count) for part, count in zip(parts, rows, strict=True)]
    for found, part in zip(device.backend.segments_of(given), parts, strict=True):
        check(device, found, part)


@pytest.mark.covers("segments_of", "distinct_rows", "counts")
def test_segments_of_no_indices(device):
    none = np.empty(0, np.int64)
    [found] = device.backend.segments_of([(device.put(none), 5)])
    check(device, found, none)
    found = device.backend.segments_of([(device.put(none), 5), (device.put(none), 0)])
    check(device, found[0], none)
    check(device, found[1], none)


@pytest.mark.covers("segments_of")
def test_segments_of_too_many_rows_are_refused(device):
    with pytest.raises(ValueError, match="split the batch"):
        device.backend.segments_of([(device.put(np.arange(9)), 2**62)])


@pytest.mark.covers("all_rows", "distinct_rows", "counts")
@pytest.mark.parametrize("rows", [0, 1, 1000])
def test_every_row_once_in_order(device, rows):
    indices, segments = device.backend.all_rows(rows)
    assert indices.dtype == np.int64
    np.testing.assert_array_equal(device.get(indices), np.arange(rows))
    np.testing.assert_array_equal(device.get(device.backend.distinct_rows(segments)), np.arange(rows))
    np.testing.assert_array_equal(device.get(device.backend.counts(segments)), np.ones(rows))


@pytest.mark.covers("bag_offsets")
@pytest.mark.parametrize("dtype", INTEGERS)
def test_offsets_get_the_number_of_indices_as_their_last(device, dtype):
    given = device.put(np.array([0, 3, 3, 7], dtype))
    for with_last, expected in ((True, [0, 3, 3, 7]), (False, [0, 3, 3, 7, 9])):
        found, _ = device.backend.bag_offsets(given, 9, with_last)
        assert found.dtype == np.int64 and found is not given
        np.testing.assert_array_equal(device.get(found), expected)
    found, _ = device.backend.bag_offsets(given[:0], 0, False)
    np.testing.assert_array_equal(device.get(found), [0])


@pytest.mark.covers("regular_offsets")
def test_offsets_of_bags_of_one_width(device):
    for bags, width in ((0, 5), (4, 0), (3, 7)):
        found = device.backend.regular_offsets(bags, width)
        assert found.dtype == np.int64
        np.testing.assert_array_equal(device.get(found), np.arange(bags + 1) * width)


@pytest.mark.covers("bag_offsets")
@pytest.mark.parametrize("dtype", INTEGERS)
def test_what_is_found_of_offsets(device, dtype):
    for offsets, expected in (
        ([0], (0, 0, -1)),
        ([0, 2, 2, 9], (0, 9, -1)),
        ([1, 2, 1, 9, 3], (1, 3, 1)),
        ([*range(5000), 7], (0, 7, 4999)),
        ([0, 9, 3, 9, 3], (0, 3, 1)),
        ([*range(70_000), 7, 8, 3], (0, 3, 69_999)),
    ):
        given = device.put(np.array(offsets, dtype))
        _, found = device.backend.bag_offsets(given, 99, True)
        assert found == expected
        if len(offsets) > 1:  # the last is the number of indices
            _, found = device.backend.bag_offsets(given[:-1], offsets[-1], False)
            assert found == expected


@pytest.mark.covers("counted_steps")
def test_what_is_folded_for_the_counts_of_rows(device):
    counts = device.put(np.array([0, 4, 2, 4, 0], np.int64))
    fold = CountFold(rules.ADAM, (("betas", (0.8, 0.97)), ("eps", 1e-3), ("weight_decay", 0.0)))
    [found] = device.backend.segments_of([(device.put(np.array([1, 3, 2, 1])), 5)])
    steps = device.backend.counted_steps(counts, found, fold, 4)
    history = device.get(steps.history)
    for count in (3.0, 5.0):  # those after the next update
        [row] = history[history[:, 0] == count]
        np.testing.assert_array_equal(row, fold(np.array([count]))[0])
    assert (np.diff(history[:, 0][history[:, 0] > 0]) > 0).all()
