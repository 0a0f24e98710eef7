"""Lookups in embedding tables."""

import math

import numba
import numpy as np
import pytest
from devices import CUDA, REAL, Cpu
from hypothesis import given
from hypothesis import strategies as st

import fastopt
from fastopt.kernels.cpu import threads as kernel_threads
from fastopt.kernels.cuda.array import DeviceArray


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(
    rows=st.integers(1, 50),
    width=st.sampled_from([0, 1, 3, 64, 100]),
    shape=st.sampled_from([(), (0,), (1,), (17,), (3, 4), (2, 0, 5), (2, 3, 2)]),
    index_type=st.sampled_from([np.int32, np.int64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_lookup_equals_indexing(dtype, rows, width, shape, index_type, seed):
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((rows, width)).astype(dtype)
    indices = np.asarray(rng.integers(0, rows, shape), index_type)
    found = fastopt.embedding(table, indices)
    assert found.dtype == dtype
    assert found.shape == (*shape, width)
    np.testing.assert_array_equal(found, table[indices])
    assert not np.shares_memory(found, table)


@pytest.mark.parametrize("at", [0, 17_000, 39_999])
@pytest.mark.parametrize("bad", [-1, 1_000, -(2**62), 2**62])
def test_bags_name_rows_of_the_table(at, bad):
    table = np.ones((1_000, 16), np.float32)
    indices = np.random.default_rng(0).integers(0, 1_000, 40_000)
    indices[at] = bad
    for mode, own in (("sum", table), ("mean", table), ("max", table), ("sum", table.astype(np.float16))):
        with pytest.raises(ValueError, match=rf"indices holds {bad}: expected every index in \[0, 1000\)"):
            fastopt.embedding_bag(own, indices.reshape(-1, 20), mode=mode)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_empty_rows_name_rows_of_the_table(mode):
    table = np.ones((5, 0), np.float32)
    assert fastopt.embedding_bag(table, np.array([[4, 1]]), mode=mode).shape == (1, 0)
    with pytest.raises(ValueError, match="indices holds 7"):
        fastopt.embedding_bag(table, np.array([[7, 1]]), mode=mode)


def test_bags_of_16_bits_leave_out_padding():
    table = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float16)
    indices = np.array([[3, 7, 3], [7, 7, 7], [1, 2, 4]])
    for mode, of in (("sum", np.sum), ("max", np.max)):
        found = fastopt.embedding_bag(table, indices, mode=mode, padding_idx=7)
        wide = table.astype(np.float32)
        want = [of(wide[[3, 3]], 0), np.zeros(4), of(wide[[1, 2, 4]], 0)]
        np.testing.assert_array_equal(found, np.array(want).astype(np.float16))


def test_a_large_lookup_equals_indexing():
    rng = np.random.default_rng(0)
    table = rng.standard_normal((1_000, 10)).astype(np.float32)
    indices = rng.integers(0, 1_000, (300, 100))
    np.testing.assert_array_equal(fastopt.embedding(table, indices), table[indices])


def test_strided_indices_and_an_empty_table_serve():
    table = np.arange(12, dtype=np.float32).reshape(6, 2)
    np.testing.assert_array_equal(fastopt.embedding(table, np.arange(6)[::-2]), table[::-2])
    assert fastopt.embedding(np.zeros((0, 3)), np.zeros((2, 0), np.int64)).shape == (2, 0, 3)


def test_torch_tensors_serve():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    table = torch.nn.Parameter(torch.randn(5, 3))
    indices = torch.tensor([[4, 0], [1, 4]])
    want = torch.nn.functional.embedding(indices, table).detach().numpy()
    np.testing.assert_array_equal(fastopt.embedding(table, indices), want)


@pytest.mark.parametrize("device", [pytest.param(Cpu, id="cpu"), REAL])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_lookups_of_torch_tables_give_tensors(device, dtype):
    torch = pytest.importorskip("torch")
    own = device()
    put, dtype = lambda values: own.tensor(np.asarray(values)), getattr(torch, dtype)
    table = torch.nn.Parameter(put(np.arange(10, dtype=np.float32).reshape(5, 2)).to(dtype))
    indices, offsets = put([[4, 0], [1, 4]]), put([0, 3])
    pooled = put([[8 + 0 + 2, 9 + 1 + 3], [8, 9]]).to(dtype)
    bags = fastopt.BagGradient(indices.reshape(-1), offsets, torch.ones_like(pooled), mode="sum")
    found = {
        "rows": (fastopt.embedding(table, indices), table.detach()[indices]),
        "none": (fastopt.embedding(table, indices[:0]), table.detach()[indices[:0]]),
        "pooled": (fastopt.embedding_bag(table, indices.reshape(-1), offsets, mode="sum"), pooled),
        "largest": (fastopt.embedding_bag(table, indices, mode="max"), put([[8, 9], [8, 9]]).to(dtype)),
        "of weights": (bags.per_sample_weights_grad(table), put([17, 1, 5, 17]).to(dtype)),
    }
    for name, (got, want) in found.items():
        assert type(got) is torch.Tensor and got.dtype == dtype and got.device == table.device, name
        assert torch.equal(got, want) and not got.requires_grad, name
        got.add_(1)  # it is memory of its own, which may be written
    assert table.detach().flatten().tolist() == list(range(10))


@pytest.mark.parametrize("device", CUDA)
def test_lookups_of_other_arrays_of_a_device_give_its_own(device):
    own = device()
    table, indices = own.put(np.ones((5, 2), np.float32)), own.put(np.array([[1, 4]]))
    gradient = fastopt.BagGradient(indices, None, own.put(np.ones((1, 2), np.float32)), mode="sum")
    for got in (
        fastopt.embedding(table, indices),
        fastopt.embedding_bag(table, indices, mode="mean"),
        gradient.per_sample_weights_grad(table),
    ):
        assert type(got) is DeviceArray


def test_the_weights_of_a_torch_table_have_a_tensor_of_their_dtype():
    torch = pytest.importorskip("torch")
    table, weights = torch.ones(5, 2, dtype=torch.bfloat16), torch.ones(1, 2)
    gradient = np.ones((1, 2), np.float32)  # what the table is decides
    bags = fastopt.BagGradient(np.array([[1, 4]]), None, gradient, "sum", per_sample_weights=weights)
    assert torch.equal(bags.per_sample_weights_grad(table), torch.tensor([[2.0, 2.0]]))


TABLE = np.ones((5, 2), np.float32)
REFUSED = [
    (TABLE, np.array([0, 5]), ValueError, r"indices holds 5: expected every index in \[0, 5\)"),
    (TABLE, np.array([0, -1]), ValueError, "indices holds -1"),
    (TABLE, np.array([0.0]), TypeError, "indices has dtype float64: expected int32 or int64"),
    (TABLE, np.array([0], np.uint8), TypeError, "indices has dtype uint8"),
    (TABLE, np.array([True]), TypeError, "indices has dtype bool"),
    (TABLE, np.array([0], ">i4"), TypeError, "indices has dtype >i4"),
    (TABLE, [0, 1], TypeError, "indices is a list"),
    (TABLE, np.ma.array([0]), TypeError, "indices is a masked array"),
    (np.zeros((0, 2)), np.array([0]), ValueError, "indices holds 0"),
    (np.ones(5), np.array([0]), ValueError, r"table has shape \(5,\): expected \(rows, dim\)"),
    (np.ones((2, 2, 2)), np.array([0]), ValueError, "table has shape"),
    (np.ones((5, 4))[:, ::2], np.array([0]), ValueError, "table has strides"),
    (np.ones((5, 2), np.int32), np.array([0]), TypeError, "table has dtype int32"),
    (np.ones((5, 2), ">f4"), np.array([0]), TypeError, "table has dtype >f4"),
    ([[1.0]], np.array([0]), TypeError, "table is a list"),
]


@pytest.mark.parametrize(("table", "indices", "error", "message"), REFUSED)
def test_what_does_not_fit_is_refused(table, indices, error, message):
    with pytest.raises(error, match=message):
        fastopt.embedding(table, indices)


# max_norm


RTOL = {np.dtype(np.float32): 2e-6, np.dtype(np.float64): 1e-14}


def uneven_table(rng, rows, width, dtype):
    """Rows of norms from 0 to some hundred, none of them near 1.5."""
    table = rng.standard_normal((rows, width))
    norms = rng.choice([0.0, 0.5, 1.4, 1.6, 10.0, 300.0], rows)
    return np.asarray(table * (norms / np.maximum(np.linalg.norm(table, axis=1), 1e-9))[:, None], dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(
    rows=st.integers(1, 50),
    width=st.sampled_from([1, 3, 8, 64, 100]),
    shape=st.sampled_from([(0,), (1,), (17,), (3, 4), (2, 3, 2)]),
    index_type=st.sampled_from([np.int32, np.int64]),
    max_norm=st.sampled_from([0.0, 1.5, 1_000.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_norms_are_limited_in_place_as_by_torch(dtype, rows, width, shape, index_type, max_norm, seed):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    table = uneven_table(rng, rows, width, dtype)
    before, twin = table.copy(), torch.tensor(table)
    indices = np.asarray(rng.integers(0, rows, shape), index_type)
    found = fastopt.embedding(table, indices, max_norm=max_norm)
    want = torch.nn.functional.embedding(torch.tensor(indices), twin, max_norm=max_norm).numpy()
    rtol = RTOL[table.dtype]
    np.testing.assert_allclose(found, want, rtol=rtol, atol=0)
    np.testing.assert_allclose(table, twin.numpy(), rtol=rtol, atol=0)
    np.testing.assert_array_equal(found, table[indices])
    changed = np.isin(np.arange(rows), indices) & (np.linalg.norm(before, axis=1) > max_norm)
    assert table[~changed].tobytes() == before[~changed].tobytes()
    assert (table[changed] != before[changed]).any(axis=1).all()
    assert (np.linalg.norm(table[changed], axis=1) <= max_norm * (1 + rtol)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 7])
def test_norms_are_limited_before_bags_are_pooled_as_by_torch(dtype, mode, padding_idx):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    table = uneven_table(rng, 30, 8, dtype)
    twin = torch.tensor(table)
    indices, offsets = rng.integers(0, 20, 60), np.array([0, 5, 5, 40])
    indices[::9] = 7
    options = {"mode": mode, "padding_idx": padding_idx, "max_norm": 1.5}
    got = fastopt.embedding_bag(table, indices, offsets, **options)
    want = torch.nn.functional.embedding_bag(torch.tensor(indices), twin, torch.tensor(offsets), **options)
    rtol = RTOL[table.dtype]
    np.testing.assert_allclose(table, twin.numpy(), rtol=rtol, atol=0)
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=60 * rtol)
    again = fastopt.embedding_bag(table, indices, offsets, mode=mode, padding_idx=padding_idx)
    np.testing.assert_array_equal(got, again)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_without_a_norm_are_limited_as_by_torch(dtype):
    torch = pytest.importorskip("torch")
    nan, inf = np.nan, np.inf
    table = np.array([[nan, 9.0], [inf, 1.0], [0.0, 0.0], [-0.0, 0.0], [3.0, 4.0], [30.0, 40.0]], dtype)
    before, twin = table.copy(), torch.tensor(table)
    indices = np.arange(6)
    fastopt.embedding(table, indices, max_norm=5.0)
    torch.nn.functional.embedding(torch.tensor(indices), twin, max_norm=5.0)
    np.testing.assert_allclose(table, twin.numpy(), rtol=RTOL[table.dtype])
    assert table[[0, 2, 3, 4]].tobytes() == before[[0, 2, 3, 4]].tobytes()


def test_a_row_named_many_times_is_limited_once():
    table = np.full((3, 4), 2.0)
    fastopt.embedding(table, np.full(10_000, 1), max_norm=1.0)
    np.testing.assert_array_equal(table[[0, 2]], 2.0)
    np.testing.assert_array_equal(table[1], 2.0 * (1.0 / (4.0 + 1e-7)))


def test_an_infinite_limit_changes_nothing():
    table = np.array([[np.inf, 1.0], [1e30, np.nan]])
    before = table.tobytes()
    found = fastopt.embedding(table, np.array([0, 1]), max_norm=math.inf)
    assert found.tobytes() == table.tobytes() == before


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one thread")
def test_limits_and_lookups_have_the_same_bits_for_any_number_of_threads_and_variant(monkeypatch):
    rng = np.random.default_rng(2)
    table = rng.standard_normal((20_000, 17)).astype(np.float32)
    indices = rng.integers(0, 20_000, 40_000)

    def run():
        own = table.copy()
        return fastopt.embedding(own, indices, max_norm=4.0).tobytes(), own.tobytes()

    threads = numba.get_num_threads()
    try:
        numba.set_num_threads(2)
        first = run()
        numba.set_num_threads(1)
        assert run() == first
    finally:
        numba.set_num_threads(threads)
    monkeypatch.setattr(kernel_threads, "PARALLEL_FROM", 2**62)
    assert run() == first
    assert first[1] != table.tobytes()


@pytest.mark.parametrize(
    "lookup",
    [
        lambda table, indices, limit: fastopt.embedding(table, indices, max_norm=limit),
        lambda table, indices, limit: fastopt.embedding_bag(
            table, indices, np.array([0]), max_norm=limit, mode="sum"
        ),
    ],
    ids=["embedding", "embedding_bag"],
)
def test_limits_that_do_not_fit_are_refused_before_any_row_is_changed(lookup):
    table, indices = np.full((5, 2), 9.0), np.array([0, 3])
    for limit in (-1.0, math.nan, -math.inf, -(10**400)):
        with pytest.raises(ValueError, match=r"max_norm is .*: expected at least 0"):
            lookup(table, indices, limit)
    for limit in ("1", True, [1.0]):
        with pytest.raises(TypeError, match=r"max_norm is .*: expected a number"):
            lookup(table, indices, limit)
    with pytest.raises(ValueError, match="indices holds 5"):
        lookup(table, np.array([0, 5]), 1.0)
    np.testing.assert_array_equal(table, 9.0)
    table.flags.writeable = False
    with pytest.raises(ValueError, match="table is read-only: expected one whose rows can be scaled"):
        lookup(table, indices, 1.0)
    np.testing.assert_array_equal(table, 9.0)
    lookup(table, indices, None)
