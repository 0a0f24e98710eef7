"""Sparse updates: the rows of tables that gradients name."""

import math

import numpy as np
import pytest
from backend.launches import (
    ADAM,
    StoredAdam,
    adam_numbers,
    adam_spec,
    adam_state,
    assert_close,
    assert_same,
    decay_numbers,
    segments,
    stepped,
)

from fastopt._core.backend import Launch
from fastopt.kernels import rules
from fastopt.kernels.rule import Lazy, PerRow, Scaled
from fastopt.kernels.work import RowSteps, TableGradient


def lazy_spec(device):
    return adam_spec(Scaled, mode=Lazy())


def row_sums(indices, values, weights=None):
    """The distinct rows, and the sum of each one's values in the order of their positions."""
    rows = np.unique(indices)
    sums = np.zeros((rows.size, values.shape[1]), np.float32)
    for k, index in enumerate(indices):
        row = np.searchsorted(rows, index)
        sums[row] += values[k] if weights is None else weights[k] * values[k]
    return rows, sums


def updated(arrays, rows, sums, h, c):
    """The table and its state with these rows updated."""
    results = [array.copy() for array in arrays]
    new = stepped(h, c, arrays[0][rows], sums, *(array[rows] for array in arrays[1:]))
    for result, own in zip(results, new, strict=True):
        result[rows] = own
    return results


@pytest.mark.covers("update_rows", "segments_of")
def test_rows_of_two_tables_are_updated_once_each(device, rng):
    """Rows that are named often, in tables of different widths and with other numbers, in one launch; the
    state of the second lies row by row side by side."""
    sizes, shapes = [400, 90], [(50, 77), (1000, 4)]
    indices = [rng.integers(0, rows - 1, size) for size, (rows, _) in zip(sizes, shapes, strict=True)]
    indices[0][:40] = 7
    values = [
        rng.normal(size=(size, dim)).astype(np.float32) for size, (_, dim) in zip(sizes, shapes, strict=True)
    ]
    numbers = [
        (adam_numbers(1, 0.5), decay_numbers(Scaled, -0.5, 0.75)),
        (adam_numbers(30), decay_numbers(Scaled)),
    ]
    before = [adam_state(rng, shape) for shape in shapes]
    tables = [StoredAdam(device, *before[0]), StoredAdam(device, *before[1], together=True)]
    found = device.backend.segments_of(
        [(device.put(own), rows) for own, (rows, _) in zip(indices, shapes, strict=True)]
    )
    works = [
        table.work(TableGradient(device.put(own), segments), (*h, *c), step=step)
        for table, own, segments, (h, c), step in zip(tables, values, found, numbers, (1, 30), strict=True)
    ]
    launch = device.backend.update_rows(lazy_spec(device), works)
    assert all(hasattr(launch, name) for name in vars(Launch) if not name.startswith("_"))
    calls = launch.prepare()
    for table, arrays in zip(tables, before, strict=True):
        assert_same(table.got(), arrays)  # nothing is written yet
    device.backend.run(calls)
    for k, table in enumerate(tables):
        rows, sums = row_sums(indices[k], values[k])
        assert rows.size < shapes[k][0]  # some stay as they are
        assert_same(table.got(), updated(before[k], rows, sums, *numbers[k]))


class OneTable:
    """A table of ten rows, and numbers of a step."""

    def __init__(self, device, rng, dim=5):
        self.device = device
        self.before = adam_state(rng, (10, dim))
        self.table = StoredAdam(device, *self.before)
        self.numbers = adam_numbers(3), decay_numbers(Scaled)

    def run(self, gradient, limit=math.inf):
        h, c = self.numbers
        work = self.table.work(gradient, (*h, *c), limit, 3)
        launch = self.device.backend.update_rows(lazy_spec(self.device), [work])
        self.device.backend.run(launch.prepare())
        return self.table.got()


@pytest.mark.covers("update_rows", "segments_of", "take")
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_of_values_are_named_by_source_and_weighted(device, rng, weighted):
    """Position k has row ``source[k]`` of the values; the row 4 is skipped."""
    one = OneTable(device, rng)
    indices, source = np.array([3, 4, 3, 9, 3, 4, 0]), np.array([2, 2, 0, 1, 2, 1, 1], np.int32)
    values, weights = rng.normal(size=(3, 5)).astype(np.float32), rng.normal(size=7).astype(np.float32)
    found = segments(device, indices, 10)
    take = device.backend.take
    in_order = take(device.put(weights), found) if weighted else None
    gradient = TableGradient(device.put(values), found, take(device.put(source), found), in_order, skipped=4)
    got = one.run(gradient)
    rows, sums = row_sums(indices, values[source], weights if weighted else None)
    kept = rows != 4
    assert_same(got, updated(one.before, rows[kept], sums[kept], *one.numbers))


@pytest.mark.covers("update_rows", "segments_of", "take", "pool_max", "bags_of_positions")
def test_winners_get_the_gradient_of_a_maximum(device, rng):
    backend = device.backend
    one = OneTable(device, rng, dim=40)
    indices, offsets = np.array([1, 8, 2, 8, 5, 1]), np.array([0, 3, 3, 6])
    given, bounds = device.put(indices), device.put(offsets)
    _, winners = backend.pool_max(one.table.arrays[0], given, bounds, 2)
    source = backend.bags_of_positions(bounds, given, None, False, 2)
    found = segments(device, indices, 10)
    values = rng.normal(size=(3, 40)).astype(np.float32)
    gradient = TableGradient(device.put(values), found, backend.take(source, found), None, winners, 2)
    got = one.run(gradient)
    sums = np.zeros((10, 40), np.float32)
    for bag, positions in ((0, [0, 1]), (2, [3, 4, 5])):
        for d in range(40):
            winner = max(positions, key=lambda k: one.before[0][indices[k], d])
            sums[indices[winner], d] += values[bag, d]
    rows = np.array([1, 5, 8])  # all but the padding, also where nothing was won
    assert_same(got, updated(one.before, rows, sums[rows], *one.numbers))


@pytest.mark.covers("update_rows", "segments_of")
def test_a_rows_gradient_is_limited_in_its_norm(device, rng):
    one = OneTable(device, rng, dim=8)
    one.numbers = adam_numbers(3), decay_numbers(Scaled, -2.0)
    values = np.zeros((4, 8), np.float32)
    values[0], values[1], values[2, 3:5], values[3] = 2, 2, (0.3, 0.4), np.nan
    indices = np.array([6, 6, 2, 9])  # of norms 2 * 4 * sqrt(8), 2 * 0.5 and NaN
    got = one.run(TableGradient(device.put(values), segments(device, indices, 10)), limit=1.5)
    h, c = one.numbers
    norm = 8 * math.sqrt(8)
    exact = [array.astype(np.float64) for array in one.before]
    limited = c._replace(scale=-2.0 * 1.5 / (norm + 1e-6))
    expected = updated(exact, np.array([6]), values[:1] + values[1:2], h, limited)
    for array, own in zip(got, expected, strict=True):
        assert_close(array[6], own[6], 8, 1 + np.abs(own[6]))
    expected = updated(one.before, np.array([2]), values[2:3], h, c)  # which is below the limit
    others = [0, 1, 2, 3, 4, 5, 7, 8]
    assert_same([array[others] for array in got], [array[others] for array in expected])
    assert np.isnan([array[9] for array in got]).all()


@pytest.mark.covers("update_rows", "segments_of")
def test_no_indices_update_nothing(device, rng):
    one = OneTable(device, rng)
    gradient = TableGradient(device.put(np.empty((0, 5), np.float32)), segments(device, [], 10))
    assert_same(one.run(gradient), one.before)


@pytest.mark.covers("update_rows", "segments_of")
def test_rows_that_count_their_own_updates(device, rng):
    """Each row has the numbers of its own count; of one that is not there those of the count below it."""
    before = adam_state(rng, (10, 5))
    table = StoredAdam(device, *before)
    counts = np.array([0, 1, 2, 3, 40, 0, 0, 0, 1, 0])
    on_device = device.put(counts)
    known = 1, 2, 3, 30
    history = np.array([(t, *rules.ADAM.fold(t, {**ADAM, "lr": 1.0}, np.float64)) for t in known])
    lr, c = 0.25, decay_numbers(Scaled)
    indices = np.array([4, 0, 2, 0, 8, 4])
    values = rng.normal(size=(6, 5)).astype(np.float32)
    work = table.work(
        TableGradient(device.put(values), segments(device, indices, 10)),
        (lr, *adam_numbers(3)[1:], *c),
        step=3,
        row_steps=RowSteps(on_device, device.put(history)),
    )
    spec = adam_spec(Scaled, mode=PerRow())
    launch = device.backend.update_rows(spec, [work])
    calls = launch.prepare()
    np.testing.assert_array_equal(device.get(on_device), counts)
    device.backend.run(calls)
    expected = before
    for row, total in zip(*row_sums(indices, values), strict=True):
        counts[row] += 1
        count = max(t for t in known if t <= counts[row])
        h = rules.ADAM.fold(count, {**ADAM, "lr": lr}, np.float64)
        expected = updated(expected, np.array([row]), total[None], h, c)
    np.testing.assert_array_equal(device.get(on_device), counts)
    assert_same(table.got(), expected)
