"""Which dtypes of tables, weights and gradients go together, in lookups and in gradients alike."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch

import fastopt

F16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
DTYPES = [F16, BF16, F32, F64]
INDICES, OFFSETS = np.array([3, 0, 3, 5, 1, 3]), np.array([0, 3, 3])
BAG = np.array([0, 0, 0, 2, 2, 2])
WEIGHTS = np.array([0.5, -1, 2, 1.5, 0.25, -3])
OUTPUT = np.array([[1, 2], [3, 4], [0.5, -2]])
TABLE = np.array([[1, -1], [2, 0.5], [3, 3], [-0.5, 4], [1, 1], [8, 0.25]])


def fits(dtype, table):
    """Gradients and weights have their table's dtype, or float32 for one of 16 bits."""
    return dtype == table or (table.itemsize == 2 and dtype == F32)


def tensor(array):
    """The same numbers as a torch tensor."""
    if array.dtype == BF16:
        return torch.tensor(array.astype(np.float32)).to(torch.bfloat16)
    return torch.tensor(array)


def numbers(array):
    return array.double().numpy() if isinstance(array, torch.Tensor) else np.asarray(array, np.float64)


def same(array):
    return array


PRODUCT = list(itertools.product(DTYPES, DTYPES, [None, *DTYPES], ["sum", "mean"], ["numpy", "torch"]))
IDS = ["-".join(map(str, case)) for case in PRODUCT]


@pytest.mark.parametrize(("dtype", "grad_dtype", "weights_dtype", "mode", "kind"), PRODUCT, ids=IDS)
def test_what_the_lookup_takes_the_gradient_takes(dtype, grad_dtype, weights_dtype, mode, kind):
    convert = tensor if kind == "torch" else same
    table, output = convert(TABLE.astype(dtype)), convert(OUTPUT.astype(grad_dtype))
    weights = None if weights_dtype is None else convert(WEIGHTS.astype(weights_dtype))
    gradient = fastopt.BagGradient(INDICES, OFFSETS, output, mode=mode, per_sample_weights=weights)
    opt = fastopt.SGD(table, lr=1.0)
    weights_fit = weights is None or fits(weights_dtype, dtype)
    lookup = {"mode": mode, "per_sample_weights": weights}
    if not weights_fit:
        with pytest.raises(
            TypeError, match=rf"^per_sample_weights has dtype {weights_dtype}: expected {dtype}"
        ):
            fastopt.embedding_bag(table, INDICES, OFFSETS, **lookup)
    if not (weights_fit and fits(grad_dtype, dtype)):
        with pytest.raises(TypeError, match="has dtype"):
            opt.step(gradient)
        with pytest.raises(TypeError, match="has dtype"):
            gradient.per_sample_weights_grad(table)
        np.testing.assert_array_equal(numbers(table), TABLE)
        return
    factors = np.ones(6) if weights is None else WEIGHTS
    counts = np.bincount(BAG)[BAG] if mode == "mean" else np.ones(6)
    # 1 / 3 is rounded
    tolerance = {"rtol": {F16: 2e-3, BF16: 2e-2, F32: 1e-6, F64: 1e-14}[dtype] if mode == "mean" else 0}
    want = np.zeros((3, 2))
    np.add.at(want, BAG, TABLE[INDICES] * (factors / counts)[:, None])
    got = fastopt.embedding_bag(table, INDICES, OFFSETS, **lookup)
    assert got.dtype == table.dtype
    np.testing.assert_allclose(numbers(got), want, **tolerance)
    got = gradient.per_sample_weights_grad(table)
    assert got.dtype == (table if weights is None else weights).dtype
    np.testing.assert_allclose(numbers(got), (TABLE[INDICES] * OUTPUT[BAG]).sum(1) / counts, **tolerance)
    want = np.zeros((6, 2))
    np.add.at(want, INDICES, OUTPUT[BAG] * (factors / counts)[:, None])
    assert fastopt.grad_norm(gradient) == pytest.approx(np.linalg.norm(want), rel=1e-6)
    opt.step(gradient)
    np.testing.assert_allclose(numbers(table), TABLE - want, **tolerance, atol=2e-2 if mode == "mean" else 0)


@pytest.mark.parametrize("weights_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_norms_take_the_weights_of_any_table_that_there_may_be(grad_dtype, weights_dtype):
    output, weights = OUTPUT.astype(grad_dtype), WEIGHTS.astype(weights_dtype)
    gradient = fastopt.BagGradient(INDICES, OFFSETS, output, mode="sum", per_sample_weights=weights)
    if not any(fits(grad_dtype, table) and fits(weights_dtype, table) for table in DTYPES):
        with pytest.raises(
            TypeError, match=rf"^grads\.per_sample_weights has dtype {weights_dtype}: expected"
        ):
            fastopt.grad_norm(gradient)
        return
    want = np.zeros((6, 2))
    np.add.at(want, INDICES, OUTPUT[BAG] * WEIGHTS[:, None])
    norm = np.linalg.norm(want)
    assert fastopt.grad_norm(gradient) == pytest.approx(norm, rel=1e-6)
    fastopt.clip_grad_norm(gradient, norm / 2)
    np.testing.assert_allclose(numbers(output), OUTPUT / 2, rtol=1e-2 if grad_dtype.itemsize == 2 else 1e-5)


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_take_the_same_mixtures(dtype, grad_dtype):
    table, values = TABLE.astype(dtype), OUTPUT[BAG].astype(grad_dtype)
    gradient = fastopt.IndexedSlices(INDICES, values)
    opt = fastopt.SGD(table, lr=1.0, clip_row_norm=100.0)
    if not fits(grad_dtype, dtype):
        with pytest.raises(TypeError, match=rf"^grads\.values has dtype {grad_dtype} but params has {dtype}"):
            opt.step(gradient)
        return
    want = np.zeros((6, 2))
    np.add.at(want, INDICES, OUTPUT[BAG])
    assert fastopt.grad_norm(gradient) == pytest.approx(np.linalg.norm(want), rel=1e-6)
    opt.step(gradient, clip_value=2.5)
    np.testing.assert_array_equal(table.astype(np.float64), TABLE - np.clip(want, -2.5, 2.5))
    if grad_dtype.itemsize > 2:
        fastopt.clip_grad_value(gradient, 2.5)
        np.testing.assert_array_equal(values[0], np.clip(want, -2.5, 2.5)[3])
