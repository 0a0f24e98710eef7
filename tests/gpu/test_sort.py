"""Indices on a CUDA device: segments, bounds and offsets are those of the CPU."""

import numpy as np
import pytest
from devices import CUDA

from fastopt.kernels.cpu import backend as cpu
from fastopt.kernels.cuda import driver
from fastopt.kernels.cuda.array import DeviceArray, upload
from fastopt.kernels.cuda.backend import indices as launches
from fastopt.kernels.cuda.backend.basics import Basics
from fastopt.kernels.cuda.backend.indices import Indices
from fastopt.kernels.cuda.sort import add_up

SIZES = 0, 1, 31, 257, 4096, 9001


class Backend(Basics, Indices):
    """What the tests ask."""


BACKEND = Backend(0, cpu)


@pytest.fixture(params=CUDA, autouse=True)
def device(request):
    return request.param()


def in_table(indices, rows):
    """Indices outside the table name the row past its last."""
    wide = indices.astype(np.int64)
    return np.where((wide < 0) | (wide >= rows), rows, wide)


def assert_segments(parts):
    """The segments are those of the CPU, which sorts each table alone."""
    found = BACKEND.segments_of([(upload(0, indices), rows) for indices, rows in parts])
    bounds = found[0].bounds.copy_to_host()
    sizes = [indices.size for indices, _ in parts]
    assert bounds.shape == (len(parts) + 1,) and bounds[0] == 0
    assert found[0].starts.copy_to_host()[bounds[-1]] == sum(sizes)
    assert found[0].order.size >= max(sum(sizes), 1) and found[0].rows.size >= max(sum(sizes), 1)
    first_row = first_position = 0
    for t, (own, (indices, rows)) in enumerate(zip(found, parts, strict=True)):
        assert (own.table, own.first_row, own.first_position) == (t, first_row, first_position)
        assert (own.positions, own.table_rows) == (indices.size, rows)
        [want] = (
            cpu.segments_of([(in_table(indices, rows), rows + 1)]) if indices.size else [cpu.all_rows(0)[1]]
        )
        first, last = bounds[t], bounds[t + 1]
        order = own.order.copy_to_host()[first_position : first_position + indices.size]
        np.testing.assert_array_equal(order - first_position, want.order)
        np.testing.assert_array_equal(own.rows.copy_to_host()[first:last] - first_row, want.rows)
        starts = own.starts.copy_to_host()[first : last + 1]
        np.testing.assert_array_equal(starts - first_position, want.starts)
        inside = np.unique(indices[(indices >= 0) & (indices < rows)], return_counts=True)
        for name, dtype, expected in zip(
            ("distinct_rows", "counts"), (np.int64, np.int32), inside, strict=True
        ):
            got = getattr(BACKEND, name)(own).copy_to_host()
            assert got.dtype == dtype
            np.testing.assert_array_equal(got, expected)
        first_row += rows + 1
        first_position += indices.size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("alone", [launches.ALONE, 0], ids=["by one launch", "by many"])
def test_segments_are_those_of_the_cpu(size, dtype, alone, monkeypatch):
    """One launch sorts few indices."""
    monkeypatch.setattr(launches, "ALONE", alone)
    rows = 70_000
    rng = np.random.default_rng(size)
    assert_segments([((rng.random(size) ** 3 * rows).astype(dtype), rows)])


ROWS = 3_000
ORDERS = {
    "equal": lambda rng, n: np.full(n, 1_234),
    "ascending": lambda rng, n: np.sort(rng.integers(0, ROWS, n)),
    "descending": lambda rng, n: np.sort(rng.integers(0, ROWS, n))[::-1].copy(),
    "each once": lambda rng, n: rng.permutation(n),
    "popular": lambda rng, n: rng.zipf(1.2, n) % ROWS,
    "first and last": lambda rng, n: rng.integers(0, 2, n) * (ROWS - 1),
}


@pytest.mark.parametrize("order", ORDERS)
def test_segments_of_indices_in_any_order(order):
    """In more than two tiles, the last of which ends within a warp."""
    indices = ORDERS[order](np.random.default_rng(3), 8_211)
    assert_segments([(indices.astype(np.int64), max(ROWS, 8_211 * (order == "each once")))])


def random_part(rng, size, rows, dtype=np.int64):
    return rng.integers(0, rows, size).astype(dtype), rows


TABLES = {
    "of both dtypes": [(300, 50, np.int32), (4_000, 900, np.int64), (31, 2, np.int32), (1, 1, np.int64)],
    "empty ones": [(0, 5), (100, 7), (0, 1), (0, 3), (64, 40), (0, 2)],
    "all empty": [(0, 5), (0, 6)],
    "one of 2**40 rows": [(500, 2**40), (200, 3)],
    "many": [(k % 5, k + 1) for k in range(300)],
}


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("alone", [launches.ALONE, 0], ids=["by one launch", "by many"])
def test_segments_of_many_tables_at_once(tables, alone, monkeypatch):
    monkeypatch.setattr(launches, "ALONE", alone)
    rng = np.random.default_rng(4)
    assert_segments([random_part(rng, *table) for table in TABLES[tables]])


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_indices_outside_their_table_belong_to_the_row_past_its_last(dtype):
    """Nobody checked them; those of one table are not taken for rows of another."""
    rng = np.random.default_rng(5)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    wild = np.array([low, high, -1, 100, 101, 99, 0, low + 1, high - 1])
    parts = [
        (rng.choice(wild, 700).astype(dtype), 100),
        (np.full(5, -7, dtype), 100),
        (rng.integers(-50, 150, 400).astype(dtype), 100),
        (np.full(3, 100, dtype), 100),
    ]
    assert_segments(parts)


def test_segments_of_indices_that_do_not_lie_next_to_each_other():
    pairs = np.random.default_rng(6).integers(0, 90, (700, 2))
    column = upload(0, pairs)[:, 1]
    assert not column.flags.c_contiguous
    [own] = BACKEND.segments_of([(column, 90)])
    np.testing.assert_array_equal(own.order.copy_to_host(), np.argsort(pairs[:, 1], kind="stable"))
    np.testing.assert_array_equal(BACKEND.distinct_rows(own).copy_to_host(), np.unique(pairs[:, 1]))
    assert BACKEND.bounds(column) == (pairs[:, 1].min(), pairs[:, 1].max())


def test_the_result_does_not_depend_on_the_grid(monkeypatch):
    monkeypatch.setattr(launches, "MOST_BLOCKS", 2)
    monkeypatch.setattr(launches, "blocks_for", lambda size, most=0: 2)
    rng = np.random.default_rng(7)
    assert_segments([random_part(rng, 15_000, 900), random_part(rng, 1_000, 5), random_part(rng, 0, 9)])


def test_more_tiles_than_a_block_adds_up_at_once():
    """Asked of the kernel itself, since so many words take long."""
    rng = np.random.default_rng(8)
    numbers = rng.integers(0, 4_096, (3, 700)).astype(np.int32)
    counts, totals = upload(0, numbers), upload(0, np.zeros(3, np.int32))
    add_up().ready(0, 2, counts.address, 3, 700, totals.address)()
    np.testing.assert_array_equal(counts.copy_to_host(), np.cumsum(numbers, axis=1) - numbers)
    np.testing.assert_array_equal(totals.copy_to_host(), numbers.sum(axis=1))


def test_nothing_waits_for_segments():
    indices = [upload(0, np.arange(n)) for n in (700, 30)]
    counting = driver.driver()
    if not hasattr(counting, "waits"):
        pytest.skip("only the interpreted device counts waits")
    before = counting.waits
    segments = BACKEND.segments_of([(own, 700) for own in indices])
    BACKEND.all_rows(9)
    assert counting.waits == before
    for ask in BACKEND.distinct_rows, BACKEND.counts:
        before = counting.waits
        ask(segments[1])
        assert counting.waits == before + 1
    for ask in BACKEND.bounds, lambda offsets: BACKEND.bag_offsets(offsets, 0, True):
        before = counting.waits
        ask(indices[0])
        assert counting.waits == before + 1


def test_too_many_indices_at_once_are_told_of():
    few = upload(0, np.zeros(5, np.int64))
    with pytest.raises(ValueError, match=r"^5 indices of tables of 4611686018427387904 rows"):
        BACKEND.segments_of([(few, 2**62)])
    many = DeviceArray(0, few.address, (2**31,), np.int32)
    with pytest.raises(ValueError, match=r"^2147483648 indices of .* split the batch$"):
        BACKEND.segments_of([(many, 10)])
    with pytest.raises(ValueError, match=r"^all 2147483648 rows .* fastopt.IndexedSlices$"):
        BACKEND.all_rows(2**31)


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_all_rows_are_named_once(rows):
    indices, segments = BACKEND.all_rows(rows)
    want = np.arange(rows)
    np.testing.assert_array_equal(indices.copy_to_host(), want)
    assert segments.bounds.copy_to_host().tolist() == [0, rows]
    np.testing.assert_array_equal(segments.order.copy_to_host()[:rows], want)
    np.testing.assert_array_equal(segments.starts.copy_to_host(), np.arange(rows + 1))
    np.testing.assert_array_equal(segments.rows.copy_to_host(), want)
    np.testing.assert_array_equal(BACKEND.distinct_rows(segments).copy_to_host(), want)
    np.testing.assert_array_equal(BACKEND.counts(segments).copy_to_host(), np.ones(rows, np.int32))


@pytest.mark.parametrize("size", [1, 255, 2_000, 150_000])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_bounds(size, dtype):
    limits = np.iinfo(dtype)
    indices = np.random.default_rng(size).integers(limits.min, limits.max, size, dtype, endpoint=True)
    assert BACKEND.bounds(upload(0, indices)) == (indices.min(), indices.max())
    for extreme in limits.min, limits.max:
        indices[size // 2] = extreme
        assert BACKEND.bounds(upload(0, indices)) == (indices.min(), indices.max())


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("with_last", [False, True])
@pytest.mark.parametrize("bags", [0, 1, 700])
def test_bag_offsets(dtype, step, with_last, bags):
    given = np.arange(bags * step, dtype=dtype).reshape(bags, step) * 3 + 1
    offsets = upload(0, given)[:, 0]
    got, unknown = BACKEND.bag_offsets(offsets, 2**33, with_last, check=False)
    assert unknown is None
    want = np.append(given[:, 0].astype(np.int64), [] if with_last else [2**33]).astype(np.int64)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got.copy_to_host(), want)


@pytest.mark.parametrize("bags", [0, 1, 300])
@pytest.mark.parametrize("width", [0, 3, 2**33])
def test_regular_offsets(bags, width):
    got, want = BACKEND.regular_offsets(bags, width), cpu.regular_offsets(bags, width)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got.copy_to_host(), want)


@pytest.mark.parametrize("falls", [[], [0], [254, 255, 256], [70_000, 99_998], [99_998]])
def test_check_offsets(falls):
    offsets = np.arange(100_000) // 2 * 2 + 5
    for at in falls:
        offsets[at + 1] = offsets[at] - 1
    _, got = BACKEND.bag_offsets(upload(0, offsets), offsets.size, True)
    assert got == (offsets[0], offsets[-1], min(falls, default=-1))
    _, got = BACKEND.bag_offsets(upload(0, offsets[:1]), 0, True)
    assert got == (offsets[0], offsets[0], -1)
