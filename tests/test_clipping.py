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
    (
        np.ones(3, np.int64),
        TypeError,
        r"grads\[1\] has dtype int64: expected float32, float64, float16 or bfloat16",
    ),
    (
        [1.0, 2.0],
        TypeError,
        r"grads\[1\]\[0\] is a float: expected a NumPy array, a torch tensor or a CUDA array",
    ),
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


# Gradients of bags


def some_bags(rng, dtype, mode="sum", weighted=False, padding_idx=None, rows=9):
    """The gradient of 20 bags, and the same as the gradients of positions."""
    ends = np.sort(np.append(rng.integers(0, 90, 19, endpoint=True), [0, 90]))
    lengths = np.diff(ends)
    indices, bag_of = rng.integers(0, rows, 90), np.repeat(np.arange(20), lengths)
    g = cases.gradient(rng, (20, 5), dtype)
    weights = np.asarray(rng.integers(-8, 9, 90) / 8, dtype) if weighted else None
    bags = fastopt.BagGradient(indices, ends[:-1], g, mode, weights, padding_idx)
    kept = indices != (-1 if padding_idx is None else padding_idx)
    values = g[bag_of] if weights is None else g[bag_of] * weights[:, None]
    if mode == "mean":
        values = (values / np.maximum(np.bincount(bag_of[kept], minlength=20), 1)[bag_of, None]).astype(dtype)
    return bags, fastopt.IndexedSlices(indices[kept], values[kept])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@given(seed=SEEDS, weighted=st.booleans(), padding_idx=st.sampled_from([None, 0, 3]))
def test_the_norm_of_bags_is_that_of_the_gradients_of_their_rows(dtype, mode, seed, weighted, padding_idx):
    rng = np.random.default_rng(seed)
    bags, slices = some_bags(rng, dtype, mode, weighted, padding_idx)
    other = some_grads(rng, dtype)
    rel = 1e-14 if mode == "sum" else 4 * float(np.finfo(dtype).eps)
    assert fastopt.grad_norm(bags) == pytest.approx(naive_norm([slices]), rel=rel)
    together = naive_norm([slices, *other])
    assert fastopt.grad_norm({"a": other, "b": [None, bags]}) == pytest.approx(together, rel=rel)


@given(seed=SEEDS, share=st.floats(0, 2))
def test_clipping_bags_by_norm_scales_the_gradient_of_their_output(seed, share):
    rng = np.random.default_rng(seed)
    bags, slices = some_bags(rng, np.float64, weighted=True, padding_idx=2)
    other = cases.gradient(rng, 7, np.float64)
    before, norm = bags.grad_output.copy(), naive_norm([slices, other])
    factor = min(1.0, share * norm / (norm + 1e-6))
    old = other.copy()
    assert fastopt.clip_grad_norm([bags, other], share * norm) == pytest.approx(norm, rel=1e-14)
    np.testing.assert_allclose(bags.grad_output, before * factor, rtol=1e-15)
    np.testing.assert_allclose(other, old * factor, rtol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_steps_with_bags_clip_as_with_the_gradients_of_their_rows(dtype, weighted):
    bags, slices = some_bags(np.random.default_rng(2), dtype, weighted=weighted, padding_idx=4)
    norm = naive_norm([slices])
    before = bags.grad_output.copy()
    for options in (
        {"clip_norm": norm / 3},
        {"clip_norm": norm * 3},
        {"clip_norm": norm / 3, "grad_scale": 0.5, "skip_nonfinite": True},
    ):
        p, twin = np.ones((9, 5), dtype), np.ones((9, 5), dtype)
        info = fastopt.Adam(p, lr=0.1).step(bags, **options)
        assert info == fastopt.Adam(twin, lr=0.1).step(slices, **options)
        assert info.norm == pytest.approx(norm * options.get("grad_scale", 1.0), rel=1e-14)
        assert info.clipped == (options["clip_norm"] < info.norm)
        assert p.tobytes() == twin.tobytes()
        assert (p[4] == 1).all() and (p[0] != 1).any()
    assert bags.grad_output.tobytes() == before.tobytes()


def test_steps_with_maxima_clip_by_the_norm_of_what_comes_through():
    table = np.array([[1.0, 9.0], [5.0, 2.0], [3.0, 3.0]])
    bags = fastopt.BagGradient(np.array([[0, 1], [2, 0]]), None, np.array([[3.0, 1.0], [5.0, 3.0]]), "max")
    p = table.copy()  # rows get [0, 1 + 3], [3, 0] and [5, 0]
    info = fastopt.SGD(p, lr=1.0).step(bags, clip_norm=math.sqrt(50) / 2)
    assert info == fastopt.StepInfo(pytest.approx(math.sqrt(50), rel=1e-14), True, False)
    np.testing.assert_allclose(p, table - [[0, 2], [1.5, 0], [2.5, 0]], rtol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_steps_skip_bags_that_are_not_finite(bad):
    p = np.ones((4, 2))
    opt = fastopt.Adam(p)
    where, start, g = np.array([0, 1, 1]), np.array([0, 1]), np.ones((2, 2))
    for options in (
        {"grad_output": g * bad},
        {"grad_output": g, "per_sample_weights": np.array([1, 1, bad])},
    ):
        bags = fastopt.BagGradient(where, start, mode="sum", **options)
        info = opt.step(bags, skip_nonfinite=True, clip_norm=1.0)
        assert info.skipped and not math.isfinite(info.norm)
        assert not math.isfinite(fastopt.grad_norm(bags))
    maxima = fastopt.BagGradient(where, start, g * bad, "max")
    assert opt.step(maxima, skip_nonfinite=True).skipped
    np.testing.assert_array_equal(p, 1.0)
    assert opt.steps == 0


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_the_norm_of_bags_neither_overflows_nor_underflows(size):
    bags = fastopt.BagGradient(
        np.array([[0, 1], [0, 2]]), None, np.array([[1.5 * size], [2.5 * size]]), mode="sum"
    )
    want = size * math.sqrt(4**2 + 1.5**2 + 2.5**2)
    assert fastopt.grad_norm(bags) == pytest.approx(want, rel=1e-14)


def test_the_norm_of_many_bags_is_that_of_the_gradients_of_their_rows():
    rng = np.random.default_rng(3)
    indices = rng.integers(0, 700, (3_000, 20))
    g = cases.gradient(rng, (3_000, 9), np.float32)
    bags = fastopt.BagGradient(indices, None, g, mode="sum")
    values = np.repeat(g, 20, axis=0).reshape(3_000, 20, 9)
    want = fastopt.grad_norm(fastopt.IndexedSlices(indices, values))
    assert fastopt.grad_norm(bags) == pytest.approx(want, rel=1e-14)
    assert want == pytest.approx(naive_norm([fastopt.IndexedSlices(indices, values)]), rel=1e-14)


BAGS = {"indices": np.array([0, 1]), "offsets": np.array([0, 1]), "mode": "sum"}
TWO = np.full((2, 2), 3.0)
BAD_BAGS = [
    (
        {"mode": "max"},
        ValueError,
        r"grads\[1\]\.mode is 'max', whose gradient depends on the table: use step",
    ),
    ({"mode": "min"}, ValueError, r"grads\[1\]\.mode is 'min': expected 'sum', 'mean' or 'max'"),
    ({"indices": np.array([0, -1])}, ValueError, r"grads\[1\]\.indices holds -1: .*not negative"),
    ({"offsets": np.array([0, 3])}, ValueError, r"grads\[1\]\.offsets has 3 before 2"),
    ({"padding_idx": -1}, ValueError, r"grads\[1\]\.padding_idx is -1: expected at least 0 where no table"),
    ({"per_sample_weights": np.ones(2, np.float32)}, TypeError, r"grads\[1\]\.per_sample_weights has dtype"),
    ({"grad_output": np.ones((3, 2))}, ValueError, r"grads\[1\]\.grad_output has shape \(3, 2\)"),
    ({"grad_output": np.ones((2, 2), int)}, TypeError, r"grads\[1\]\.grad_output has dtype int64"),
    ({"grad_output": np.ones((2, 4))[:, ::2]}, ValueError, r"grads\[1\]\.grad_output has strides"),
    ({"grad_output": read_only(np.ones((2, 2)))}, ValueError, r"grads\[1\]\.grad_output is read-only"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD_BAGS, ids=[m for *_, m in BAD_BAGS])
def test_bags_that_do_not_fit_are_refused_before_any_is_changed(changed, error, message):
    good = np.full(3, 2.0)
    bags = fastopt.BagGradient(**{"grad_output": TWO.copy(), **BAGS, **changed})
    before = bags.grad_output.copy()
    functions = [lambda grads: fastopt.clip_grad_norm(grads, 0.5), fastopt.grad_norm]
    for function in functions[: 1 if "read-only" in message else 2]:
        with pytest.raises(error, match=f"^{message}"):
            function([good, bags])
    np.testing.assert_array_equal(good, 2.0)
    np.testing.assert_array_equal(bags.grad_output, before)


def test_bags_are_not_clipped_by_value():
    good, g = np.full(3, 2.0), TWO.copy()
    message = r"grads\['b'\]\.grad_output belongs to a BagGradient, whose rows can't be clipped by value"
    with pytest.raises(ValueError, match=message):
        fastopt.clip_grad_value({"a": good, "b": fastopt.BagGradient(**BAGS, grad_output=g)}, 0.5)
    np.testing.assert_array_equal(good, 2.0)
    np.testing.assert_array_equal(g, 3.0)


def test_bags_that_share_the_gradient_of_their_output_are_refused():
    g = TWO.copy()
    bags = fastopt.BagGradient(**BAGS, grad_output=g)
    for other in (bags, g[1:], fastopt.IndexedSlices(np.array([0]), g[1:])):
        with pytest.raises(ValueError, match="grad_output"):
            fastopt.clip_grad_norm([bags, other], 0.5)
    np.testing.assert_array_equal(g, 3.0)


def test_int32_indices_of_tables_that_are_large_together_keep_apart():
    rng = np.random.default_rng(12)
    grads, total = [], 0.0
    for limit in (2**31 - 1, 2**31 - 1, 40):
        indices = np.append(rng.integers(0, limit, 20), [limit - 1, 5]).astype(np.int32)
        values = rng.standard_normal((22, 3)).astype(np.float32)
        grads.append(fastopt.IndexedSlices(indices, values))
        _, sums = reference.coalesce(indices, values)
        total += np.square(sums).sum()
    np.testing.assert_allclose(fastopt.grad_norm(grads), np.sqrt(total), rtol=1e-6)
