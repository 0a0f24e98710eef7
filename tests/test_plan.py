"""Indices grouped by row, against NumPy, and the memory that the grouping uses again."""

import copy
import os
import pickle
import signal
import sys
import threading
import tracemalloc

import cases
import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastopt
from fastopt import IndexPlan
from fastopt.kernels.cpu import memory, threads

SEEDS = st.integers(0, 2**32 - 1)
ROWS = [1, 5, 2048, 2049, 5_000_011, 2**31 + 7, 2**40]
KINDS = ["uniform", "skewed", "constant", "ends"]


def some_indices(rng, shape, rows, kind, dtype=np.int64):
    last = min(rows, np.iinfo(dtype).max + 1) - 1
    if kind == "skewed":
        drawn = np.minimum(rng.zipf(1.2, shape), last + 1) - 1
    elif kind == "constant":
        drawn = np.full(shape, rng.integers(0, last, endpoint=True))
    elif kind == "ends":
        drawn = rng.integers(0, 2, shape) * last
    else:
        drawn = rng.integers(0, last, shape, endpoint=True)
    return np.asarray(drawn, dtype)


def assert_segments(plan, indices, rows):
    flat = indices.reshape(-1)
    distinct, counts = np.unique(flat, return_counts=True)
    assert plan.rows == rows
    assert plan.indices.dtype == indices.dtype
    assert plan.distinct.dtype == np.int64
    np.testing.assert_array_equal(plan.indices, indices, strict=True)
    np.testing.assert_array_equal(plan.distinct, distinct)
    np.testing.assert_array_equal(plan.counts, counts)
    np.testing.assert_array_equal(plan._segments.order, np.argsort(flat, kind="stable"))
    np.testing.assert_array_equal(plan._segments.starts, np.concatenate([[0], np.cumsum(counts)]))


def contents(plan):
    segments = plan._segments
    return [a.tobytes() for a in (plan.indices, plan.distinct, plan.counts, segments.order, segments.starts)]


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@given(
    rows=st.sampled_from(ROWS),
    shape=st.sampled_from([(), (0,), (1,), (2,), (1_000,), (3, 4), (2, 0, 5), (2, 3, 2)]),
    kind=st.sampled_from(KINDS),
    seed=SEEDS,
)
def test_indices_are_grouped_as_by_a_stable_sort(dtype, rows, shape, kind, seed):
    indices = some_indices(np.random.default_rng(seed), shape, rows, kind, dtype)
    assert_segments(IndexPlan(indices, rows), indices, rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ROWS)
def test_many_indices_are_grouped_as_by_a_stable_sort(rows, kind):
    rng = np.random.default_rng(1)
    for dtype in (np.int32, np.int64):
        indices = some_indices(rng, (100, 1_000), rows, kind, dtype)
        assert_segments(IndexPlan(indices, rows), indices, rows)


@pytest.mark.parametrize("size", [32_767, 32_768, 32_769, 65_536, 65_537])
def test_sizes_about_those_of_blocks_are_grouped(size):
    indices = np.random.default_rng(size).integers(0, 3_000, size)
    assert_segments(IndexPlan(indices, 3_000), indices, 3_000)


def test_no_indices_of_no_rows_are_grouped():
    for dtype in (np.int32, np.int64):
        for shape in ((0,), (3, 0)):
            assert_segments(IndexPlan(np.zeros(shape, dtype), 0), np.zeros(shape, dtype), 0)


@pytest.mark.parametrize("rows", [5, 2049, 2**40])
@cases.needs_two_threads
def test_segments_are_the_same_for_any_number_of_threads_and_variant(rows, restored_threads, monkeypatch):
    rng = np.random.default_rng(2)
    for size, kind in ((300_001, "skewed"), (300_001, "uniform"), (70, "uniform")):
        indices = some_indices(rng, size, rows, kind)
        monkeypatch.setattr(threads, "PARALLEL_FROM", 0)
        numba.set_num_threads(2)
        two = IndexPlan(indices, rows)
        assert_segments(two, indices, rows)
        numba.set_num_threads(1)
        assert contents(IndexPlan(indices, rows)) == contents(two)
        monkeypatch.setattr(threads, "PARALLEL_FROM", 2**62)
        assert contents(IndexPlan(indices, rows)) == contents(two)


def test_strided_read_only_and_torch_indices_serve():
    torch = pytest.importorskip("torch")
    indices = np.arange(10_000).reshape(100, 100) % 7
    fixed = indices.copy()
    fixed.flags.writeable = False
    misaligned = np.empty(indices.nbytes + 1, np.uint8)[1:].view(np.int64).reshape(indices.shape)
    misaligned[:] = indices
    assert_segments(IndexPlan(fixed, 7), indices, 7)
    assert_segments(IndexPlan(misaligned, 7), indices, 7)
    assert_segments(IndexPlan(torch.from_numpy(indices), 7), indices, 7)
    assert_segments(IndexPlan(indices.T[::-2], 7), indices.T[::-2], 7)
    assert_segments(IndexPlan(np.broadcast_to(np.int32(3), (50, 100)), 7), np.full((50, 100), 3, np.int32), 7)


def test_indices_are_a_copy_that_can_not_be_written():
    indices = np.array([3, 1, 3])
    plan = IndexPlan(indices, 5)
    indices[:] = 99
    np.testing.assert_array_equal(plan.indices, [3, 1, 3])
    with pytest.raises(ValueError, match="read-only"):
        plan.indices[0] = 0


@pytest.mark.parametrize(
    "again",
    [copy.copy, copy.deepcopy, *[lambda plan, p=p: pickle.loads(pickle.dumps(plan, p)) for p in range(2, 6)]],
    ids=["copy", "deepcopy", *[f"pickle{protocol}" for protocol in range(2, 6)]],
)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (30_000,)])
def test_copied_and_pickled_plans_are_as_good(again, shape):
    indices = some_indices(np.random.default_rng(3), shape, 2_049, "skewed", np.int32)
    plan = again(IndexPlan(indices, 2_049))
    assert_segments(plan, indices, 2_049)
    table = np.random.default_rng(4).standard_normal((2_049, 3))
    np.testing.assert_array_equal(fastopt.embedding(table, plan), table[indices])
    assert not plan.indices.flags.writeable


def test_what_a_plan_found_can_not_be_written():
    plan = IndexPlan(np.arange(20_000) % 7, 7)
    assert not plan.distinct.flags.writeable


def test_a_plan_says_what_it_holds():
    assert repr(IndexPlan(np.arange(5_000) % 1_200, 2_000)) == (
        "IndexPlan(5,000 indices, 1,200 distinct, of 2,000 rows)"
    )


def uses(table, where, one_dimension, rng):
    """Bytes of all that is computed with ``where`` and the same indices in one dimension."""
    size = one_dimension.indices.size if isinstance(one_dimension, IndexPlan) else one_dimension.size
    shape = where.indices.shape if isinstance(where, IndexPlan) else where.shape
    offsets = np.sort(np.append(0, rng.integers(0, size, 30, endpoint=True)))
    out = [fastopt.embedding(table, where), fastopt.embedding(table.copy(), where, max_norm=0.5)]
    for mode in ("sum", "mean", "max"):
        out.append(fastopt.embedding_bag(table, where, mode=mode))
        out.append(fastopt.embedding_bag(table, one_dimension, offsets, mode=mode))
    values = rng.standard_normal((*shape, table.shape[1])).astype(table.dtype)
    of_bags = rng.standard_normal((31, table.shape[1])).astype(table.dtype)
    params = [table.copy() for _ in range(4)]
    opt = fastopt.Adam(params)
    grads = [fastopt.IndexedSlices(where, values)]
    grads += [fastopt.BagGradient(one_dimension, offsets, of_bags, mode) for mode in ("sum", "mean", "max")]
    for _ in range(2):
        opt.step(grads)
    out += params
    out.append(grads[1].per_sample_weights_grad(table))
    out.append(np.array(fastopt.grad_norm(grads[:3])))
    slices = fastopt.IndexedSlices(where, values.copy())
    fastopt.clip_grad_value(slices, 0.5)
    return [array.tobytes() for array in [*out, slices.values]]


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_plan_gives_the_same_bits_as_its_indices(dtype):
    rng = np.random.default_rng(5)
    table = rng.standard_normal((50, 7)).astype(np.float32)
    for shape in ((20, 9), (150, 40)):
        indices = some_indices(rng, shape, 50, "skewed", dtype)
        flat = indices.reshape(-1)
        with_plans = uses(table, IndexPlan(indices, 50), IndexPlan(flat, 50), np.random.default_rng(6))
        plain = uses(table, indices, flat, np.random.default_rng(6))
        mixed = uses(table, indices, IndexPlan(flat, 50), np.random.default_rng(6))
        assert with_plans == plain == mixed


def test_a_plan_serves_two_tables_in_one_step():
    rng = np.random.default_rng(7)
    indices, values = rng.integers(0, 9, 40), rng.standard_normal((40, 3)).astype(np.float32)
    params = [np.ones((9, 3), np.float32) for _ in range(3)]
    plan = IndexPlan(indices, 9)
    where = [plan, indices, plan]
    opt = fastopt.Adam(params)
    for _ in range(2):
        opt.step([fastopt.IndexedSlices(one, values) for one in where])
    assert params[0].tobytes() == params[1].tobytes() == params[2].tobytes()
    assert (params[0] != 1).any()


def test_a_plan_for_another_number_of_rows_is_refused():
    table = np.ones((5, 2))
    plan = IndexPlan(np.array([3, 1]), 4)
    message = r"indices is a plan for a table of 4 rows: expected one for 5 rows"
    ones, start = np.ones((2, 2)), np.array([0, 1])
    opt = fastopt.Adam(table)
    for use in (
        lambda: fastopt.embedding(table, plan, max_norm=0.1),
        lambda: fastopt.embedding_bag(table, plan, start, max_norm=0.1, mode="sum"),
        lambda: opt.step(fastopt.IndexedSlices(plan, ones)),
        lambda: opt.step(fastopt.BagGradient(plan, start, ones, mode="sum")),
        lambda: fastopt.BagGradient(plan, start, ones, mode="sum").per_sample_weights_grad(table),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    np.testing.assert_array_equal(table, 1.0)
    assert opt.steps == 0


REFUSED = [
    (np.array([0]), 5.0, TypeError, r"rows is 5\.0: expected a whole number"),
    (np.array([0]), "5", TypeError, "rows is '5': expected a whole number"),
    (np.array([0]), None, TypeError, "rows is None: expected a whole number"),
    (np.array([0]), -1, ValueError, r"rows is -1: expected a whole number from 0 to 2\*\*40"),
    (np.array([0]), 2**40 + 1, ValueError, "rows is 1099511627777: expected a whole number from 0"),
    (np.array([0, 5]), 5, ValueError, r"indices holds 5: expected every index in \[0, 5\)"),
    (np.array([0, -1]), 5, ValueError, r"indices holds -1: expected every index in \[0, 5\)"),
    (np.array([0]), 0, ValueError, r"indices holds 0: expected every index in \[0, 0\)"),
    (np.array([2**40]), 2**40, ValueError, "indices holds 1099511627776"),
    (np.append(np.zeros(9_000, np.int64), 5), 5, ValueError, "indices holds 5"),
    (np.append(np.zeros(40_000, np.int32), -3).astype(np.int32), 5, ValueError, "indices holds -3"),
    (np.array([0.0]), 5, TypeError, "indices has dtype float64: expected int32 or int64$"),
    (np.array([0], np.uint32), 5, TypeError, "indices has dtype uint32"),
    (np.array([True]), 5, TypeError, "indices has dtype bool"),
    (np.array([0], ">i8"), 5, TypeError, "indices has dtype >i8"),
    ([0, 1], 5, TypeError, "indices is a list: expected a NumPy array"),
    (np.ma.array([0]), 5, TypeError, "indices is a masked array"),
    (None, 5, TypeError, "indices is a NoneType"),
    (
        np.broadcast_to(np.int32(0), (2**24 + 1,)),
        2**40,
        ValueError,
        "16777217 indices of tables of 1099511627776 rows are too many at once: .* split the batch",
    ),
]


@pytest.mark.parametrize(("indices", "rows", "error", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_what_does_not_fit_is_refused(indices, rows, error, message):
    with pytest.raises(error, match=f"^{message}"):
        IndexPlan(indices, rows)


# Memory


def test_plans_stay_right_while_memory_is_used_again():
    rng = np.random.default_rng(8)
    kept = []
    for turn in range(60):
        rows = ROWS[2 + turn % 5]
        indices = some_indices(rng, rng.integers(5_000, 40_000), rows, KINDS[turn % 2])
        plan = IndexPlan(indices, rows)
        fastopt.grad_norm(fastopt.BagGradient(plan, np.array([0]), np.ones((1, 1)), mode="sum"))
        if turn % 3 == 0:
            kept.append((plan, indices, rows))
        elif turn % 3 == 1 and len(kept) > 5:
            del kept[rng.integers(len(kept))]
    assert len(kept) > 4
    for plan, indices, rows in kept:
        assert_segments(plan, indices, rows)


def test_parts_of_a_plan_outlive_it():
    indices = np.random.default_rng(9).integers(0, 10_000, 30_000)
    distinct = IndexPlan(indices, 10_000).distinct
    for _ in range(10):
        IndexPlan(np.zeros(30_000, np.int64), 10_000)
    np.testing.assert_array_equal(distinct, np.unique(indices))


def test_memory_does_not_grow_with_the_table(monkeypatch):
    indices = np.random.default_rng(10).integers(0, 1_000, 10_000)
    peaks = []
    for rows in (1_000, 1_000, 2**40):  # the first one compiles
        monkeypatch.setattr(memory, "_waiting", {})
        tracemalloc.start()
        plan = IndexPlan(indices, rows)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert plan.distinct.size == 1_000
    assert peaks[1] > indices.nbytes
    assert peaks[2] < peaks[1] + 50_000


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float64])
@pytest.mark.parametrize("size", [0, 1, 1_000, 8_191, 8_192, 65_535, 65_536, 65_537, 300_001])
def test_scratch_arrays_are_as_numpys(size, dtype):
    array = memory.empty(size, dtype)
    assert (array.shape, array.dtype) == ((size,), np.dtype(dtype))
    assert array.flags.c_contiguous and array.flags.aligned and array.flags.writeable
    assert array.nbytes < memory.SMALLEST or array.ctypes.data % memory.ALIGNMENT == 0
    array[:] = 1
    assert array.sum() == size


def test_scratch_memory_is_used_again_once_nothing_sees_it(monkeypatch):
    monkeypatch.setattr(memory, "_waiting", {})
    monkeypatch.setattr(memory, "_waiting_bytes", 0)
    first = memory.empty(20_000, np.int64)
    view, where = first[5:9], first.ctypes.data
    view[:] = 7
    del first
    second = memory.empty(20_000, np.int64)
    second[:] = 1
    np.testing.assert_array_equal(view, 7)
    del view
    third = memory.empty(39_900, np.int32)
    assert third.ctypes.data == where
    assert not np.shares_memory(second, third)


def test_little_scratch_memory_waits(monkeypatch):
    monkeypatch.setattr(memory, "_waiting", {})
    monkeypatch.setattr(memory, "_waiting_bytes", 0)
    monkeypatch.setattr(memory, "MOST_WAITING", 500_000)
    alive = [memory.empty(98_304 + 16_384 * (k % 2), np.uint8) for k in range(9)]
    for k, array in enumerate(alive):
        array[:] = k
    assert [int(array[-1]) for array in alive] == list(range(9))
    del alive, array
    waiting = [memory.size for same in memory._waiting.values() for memory in same]
    assert 0 < sum(waiting) == memory._waiting_bytes <= 500_000
    memory.empty(2_000_000, np.uint8)
    assert memory._waiting_bytes == 0


def test_memory_that_is_lent_until_the_interpreter_ends_goes_quietly(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    lent = memory.empty(1 << 17, np.uint8)
    monkeypatch.setattr(memory, "_lock", None)  # as the interpreter clears modules
    del lent
    assert told == []


def test_threads_do_not_share_scratch_memory():
    wrong = []

    def work(number):
        rng = np.random.default_rng(number)
        alive = []
        for turn in range(300):
            array = memory.empty(int(rng.integers(70_000, 200_000)), np.uint8)
            mark = (number * 64 + turn % 64) % 256
            array[::1_000] = mark
            alive.append((array, mark))
            if len(alive) > 3:
                old, mark = alive.pop(int(rng.integers(4)))
                wrong.extend(old[::1_000][old[::1_000] != mark])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_build_plans_at_once():
    wrong = []

    def work(number):
        rng = np.random.default_rng(number)
        for _ in range(20):
            indices = rng.integers(0, 5_000, 20_000)
            try:
                assert_segments(IndexPlan(indices, 5_000), indices, 5_000)
            except AssertionError as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_child_forked_while_another_thread_takes_memory_does_not_hang():
    held, done = threading.Event(), threading.Event()

    def hold():
        with memory._lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(3)
        memory.empty(100_000, np.uint8)
        os._exit(0)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
