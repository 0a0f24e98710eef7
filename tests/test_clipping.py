"""Norms and clipping against plain NumPy."""

import math

import cases
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

import fastopt

SEEDS = st.integers(0, 2**32 - 1)


def naive_norm(grads):
    total = 0.0
    for g in grads:
        if isinstance(g, fastopt.IndexedSlices):
            g = reference.coalesce(g.indices, g.values)[1]
        total += float((np.asarray(g, np.float64) ** 2).sum())
    return math.sqrt(total)


def some_grads(rng, dtype):
    return [
        cases.gradient(rng, (), dtype),
        cases.gradient(rng, (0, 3), dtype),
        cases.gradient(rng, rng.integers(0, 300_000), dtype),
        fastopt.IndexedSlices(rng.integers(0, 9, 50), cases.gradient(rng, (50, 5), dtype)),
        fastopt.IndexedSlices(np.zeros((0, 2), np.int32), cases.gradient(rng, (0, 2, 5), dtype)),
    ]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seed=SEEDS)
def test_the_norm_is_over_all_gradients_with_duplicates_summed(dtype, seed):
    grads = some_grads(np.random.default_rng(seed), dtype)
    assert fastopt.grad_norm(grads) == pytest.approx(naive_norm(grads), rel=1e-14)


def test_the_norm_walks_nested_structures_and_skips_none():
    three, four = np.full(1, 3.0), np.full((1, 1), 4.0, np.float32)
    assert fastopt.grad_norm(three) == 3
    assert fastopt.grad_norm({"a": [three, None], "b": {"c": (four,)}}) == 5
    assert fastopt.grad_norm(None) == fastopt.grad_norm([]) == fastopt.grad_norm({}) == 0
    assert fastopt.grad_norm(fastopt.IndexedSlices(np.array([2, 2]), np.array([[1.0], [-1.0]]))) == 0


@pytest.mark.parametrize("size", [1e300, 1.3e154, 1e-155, 1e-160, 1e-162, 1e-300, 5e-324])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_norm_neither_overflows_nor_underflows(size, parts):
    g = np.array([3.0, 4.0])
    unit = 0.2 * size
    grads = [g * unit] * parts if size > 5e-324 else [np.array([size])] * parts
    want = math.hypot(*(float(x) for part in grads for x in part))
    assert fastopt.grad_norm(grads) == pytest.approx(want, rel=1e-14, abs=5e-324)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_norm_of_gradients_that_are_not_finite_is_not_finite(bad):
    grads = [np.ones(3), np.array([0.0, bad])]
    norm = fastopt.grad_norm(grads)
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf
    assert math.isnan(fastopt.grad_norm([np.array([math.inf]), np.array([math.nan])]))


def test_a_norm_beyond_float32_is_found_for_float32():
    g = np.full(4, 3e38, np.float32)
    assert fastopt.grad_norm(g) == pytest.approx(float(g[0]) * 2, rel=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seed=SEEDS, share=st.floats(0, 2))
def test_clipping_by_norm_scales_in_place_and_returns_the_old_norm(dtype, seed, share):
    grads = some_grads(np.random.default_rng(seed), dtype)
    before = [np.array(getattr(g, "values", g)) for g in grads]
    norm = naive_norm(grads)
    assert fastopt.clip_grad_norm(grads, share * norm) == pytest.approx(norm, rel=1e-14)
    factor = min(1.0, share * norm / (norm + 1e-6))
    for g, old in zip(grads, before, strict=True):
        np.testing.assert_allclose(getattr(g, "values", g), old * dtype(factor), rtol=4 * np.finfo(dtype).eps)


def test_gradients_within_the_norm_keep_their_bits():
    g = np.array([3.0, 4.0])
    assert fastopt.clip_grad_norm(g, 5.1) == 5
    np.testing.assert_array_equal(g, [3.0, 4.0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seed=SEEDS, limit=st.floats(0, 2))
def test_clipping_by_value_clips_sums_of_duplicates(dtype, seed, limit):
    grads = some_grads(np.random.default_rng(seed), dtype)
    want = []
    for g in grads:
        if isinstance(g, fastopt.IndexedSlices):
            g = reference.coalesce(g.indices, g.values)[1]
        want.append(np.clip(np.asarray(g, np.float64), -dtype(limit), dtype(limit)))
    assert fastopt.clip_grad_value(grads, limit) is None
    for g, one in zip(grads, want, strict=True):
        if isinstance(g, fastopt.IndexedSlices):
            g = reference.coalesce(g.indices, g.values)[1]
        np.testing.assert_array_equal(g, one)


def test_clipping_by_value_leaves_the_sum_in_the_first_place():
    slices = fastopt.IndexedSlices(np.array([4, 1, 4, 4]), np.array([[3.0], [9.0], [-1.0], [0.5]]))
    fastopt.clip_grad_value(slices, 5.0)
    np.testing.assert_array_equal(slices.values[:, 0], [2.5, 5.0, 0.0, 0.0])


@pytest.mark.parametrize("sparse", [False, True])
def test_a_step_with_clip_norm_equals_clipping_first_and_leaves_gradients(sparse):
    rng = np.random.default_rng(1)
    g = rng.standard_normal((6, 2))
    indices = np.array([0, 3, 3, 1, 0, 5])
    p, twin = np.ones((6, 2)), np.ones((6, 2))
    opt, opt_twin = fastopt.SGD(p, lr=1.0), fastopt.SGD(twin, lr=1.0)
    grad = fastopt.IndexedSlices(indices, g) if sparse else g
    before = g.copy()
    info = opt.step(grad, clip_norm=0.5)
    np.testing.assert_array_equal(g, before)
    norm = fastopt.clip_grad_norm(grad, 0.5)
    opt_twin.step(grad)
    assert info == fastopt.StepInfo(norm, clipped=True, skipped=False)
    np.testing.assert_allclose(p, twin, rtol=1e-15)


def test_clip_norm_applies_to_scaled_gradients():
    p = np.zeros(2)
    info = fastopt.SGD(p, lr=1.0).step(np.array([300.0, 400.0]), grad_scale=0.01, clip_norm=2.5)
    assert info == fastopt.StepInfo(5.0, True, False)
    np.testing.assert_allclose(p, [-1.5, -2.0], rtol=1e-6)
    assert fastopt.SGD(p).step(np.array([3.0, 4.0]), clip_norm=6.0) == fastopt.StepInfo(5.0, False, False)
    assert fastopt.SGD(p).step(np.array([3.0, 4.0])) == fastopt.StepInfo(None, False, False)


@pytest.mark.parametrize("limit", [-1.0, math.nan, -math.inf])
@pytest.mark.parametrize(("function", "name"), [(fastopt.clip_grad_norm, "max_norm"),
                                                (fastopt.clip_grad_value, "clip_value")])  # fmt: skip
def test_limits_below_0_are_refused(function, name, limit):
    g = np.ones(2)
    with pytest.raises(ValueError, match=f"{name} is .*: expected at least 0"):
        function(g, limit)
    for wrong in ("1", None, True, [1.0]):
        with pytest.raises(TypeError, match=f"{name} is .*: expected a number"):
            function(g, wrong)
    np.testing.assert_array_equal(g, 1.0)


def read_only(array):
    array.flags.writeable = False
    return array


TABLE = np.ones((4, 4))
REFUSED = [
    (np.ones(3, np.int64), TypeError, r"grads\[1\] has dtype int64: expected float32 or float64"),
    (np.ones(3, np.float16), TypeError, r"grads\[1\] has dtype float16"),
    ([1.0, 2.0], TypeError, r"grads\[1\]\[0\] is a float: expected a NumPy array or a torch CPU tensor"),
    ("x", TypeError, r"grads\[1\] is a str"),
    (np.ones((4, 4))[:, ::2], ValueError, r"grads\[1\] has strides .* expected a C-contiguous"),
    (read_only(np.ones(3)), ValueError, r"grads\[1\] is read-only"),
    (np.ma.ones(3), TypeError, r"grads\[1\] is a masked array"),
    (fastopt.IndexedSlices(np.array([-1]), np.ones((1, 2))), ValueError, "holds -1: .*not negative"),
    (fastopt.IndexedSlices(np.array([0.0]), np.ones((1, 2))), TypeError, "indices has dtype float64"),
    (fastopt.IndexedSlices(np.array([0]), np.ones((2, 2))), ValueError, "values has shape"),
    (fastopt.IndexedSlices(np.array([0]), read_only(np.ones((1, 2)))), ValueError, "values is read-only"),
]


@pytest.mark.parametrize(("bad", "error", "message"), REFUSED)
@pytest.mark.parametrize("function", [fastopt.clip_grad_norm, fastopt.clip_grad_value])
def test_gradients_that_do_not_fit_are_refused_before_any_is_changed(function, bad, error, message):
    good = np.full(3, 2.0)
    with pytest.raises(error, match=message):
        function([good, bad], 0.5)
    np.testing.assert_array_equal(good, 2.0)


@pytest.mark.parametrize("function", [fastopt.clip_grad_norm, fastopt.clip_grad_value])
def test_a_gradient_given_twice_is_refused(function):
    g = np.full(3, 2.0)
    for pair in ([g, g], [g, g[1:]], {"a": g, "b": fastopt.IndexedSlices(np.zeros(3, int), g[:, None])}):
        with pytest.raises(ValueError, match="shares memory with"):
            function(pair, 0.5)
    np.testing.assert_array_equal(g, 2.0)
    assert fastopt.grad_norm([g, g]) == pytest.approx(math.sqrt(24))
