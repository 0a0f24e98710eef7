"""Lookups in embedding tables."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastopt


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
    table = torch.nn.Parameter(torch.randn(5, 3))
    indices = torch.tensor([[4, 0], [1, 4]])
    want = torch.nn.functional.embedding(indices, table).detach().numpy()
    np.testing.assert_array_equal(fastopt.embedding(table, indices), want)


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
