"""What a step does beside the update: clipping by value, zeroing gradients, naming what is not finite, the
norm."""

import math

import cases
import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

import fastopt
from fastopt import BagGradient, IndexedSlices

BFLOAT16 = ml_dtypes.bfloat16
SEEDS = st.integers(0, 2**32 - 1)
UNIT = 16 * np.finfo(np.float32).eps  # as in test_rules.py: 16 ulp of the peak of |p| and all updates
ADAM, MOMENTUM = cases.BY_NAME["adam"], cases.BY_NAME["momentum"]


def bits(opt, params):
    states = [
        [(k, np.asarray(v).tobytes()) for k, v in s.items()] for s in opt.state_dict()["state"].values()
    ]
    return [p.tobytes() for p in params], states, opt.steps


# Naive references of what comes before a rule


def dense_of(shape, indices, values):
    """The dense gradient that a sparse one stands for."""
    total = np.zeros(shape)
    np.add.at(total, np.asarray(indices).reshape(-1), np.asarray(values, np.float64).reshape(-1, shape[1]))
    return total


def prepared(grads, clip_norm=None, clip_value=None, grad_scale=1.0):
    """float64 gradients, scaled, clipped by norm, then by value."""
    grads = [np.asarray(g, np.float64) * grad_scale for g in grads]
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
    if clip_norm is not None:
        grads = [g * min(1.0, clip_norm / (norm + 1e-6)) for g in grads]
    if clip_value is not None:
        grads = [np.clip(g, -clip_value, clip_value) for g in grads]
    return grads, norm


def tracked(case, params, options):
    return [case.reference(p, options) for p in params]


def assert_follows(want, params):
    for one, p in zip(want, params, strict=True):
        np.testing.assert_allclose(p, one.p, rtol=0, atol=UNIT * one.scale)


# clip_value

SETTINGS = {
    "alone": {},
    "with clip_norm": {"clip_norm": 4.0},
    "with grad_scale": {"grad_scale": 1 / 64},
    "with both": {"clip_norm": 0.2, "grad_scale": 1 / 64},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("case", [ADAM, MOMENTUM], ids=str)
@given(seed=SEEDS, share=st.sampled_from([0.0, 0.1, 0.7, 10.0]))
def test_elements_are_clipped_after_scale_and_norm(case, settings, seed, share):
    # Momentum passes errors of a clipped gradient on; it is a multiple of 2^-k to some ulp, like an update.
    rng = np.random.default_rng(seed)
    options = {**case.options(rng, weight_decay=False), "maximize": bool(rng.integers(2))}
    params = [cases.parameter(rng, shape, np.float32) for shape in ((7,), (5, 3), (300,))]
    opt, want = case.make(params, options), tracked(case, params, options)
    clip_value = share * settings.get("grad_scale", 1.0)
    for _ in range(3):
        grads = [cases.gradient(rng, p.shape, np.float32) for p in params]
        kept = [g.copy() for g in grads]
        info = opt.step(grads, clip_value=clip_value, **settings)
        clipped, norm = prepared(grads, clip_value=clip_value, **settings)
        for one, g, old, now in zip(want, clipped, kept, grads, strict=True):
            one.step(g)
            assert now.tobytes() == old.tobytes()
        if "clip_norm" in settings:
            np.testing.assert_allclose(info.norm, norm, rtol=1e-12)
            assert info.clipped == (norm + 1e-6 > settings["clip_norm"])
        else:
            assert info == fastopt.StepInfo()
    if case is MOMENTUM or share:  # Adam's update by a gradient of zeros is eps, not rounding
        assert_follows(want, params)


def test_the_limit_is_met_exactly_and_below_it_nothing_changes():
    g = np.float32(
        [0.5, -0.5, np.nextafter(np.float32(0.5), np.float32(1)), -3, 0.25, 0, 1e30, -np.inf, np.inf]
    )
    p = np.zeros(9, np.float32)
    fastopt.SGD(p, lr=1.0).step(g, clip_value=0.5)
    np.testing.assert_array_equal(p, [-0.5, 0.5, -0.5, 0.5, -0.25, 0, -0.5, 0.5, -0.5])
    p = np.zeros(9, np.float32)
    fastopt.SGD(p, lr=1.0).step(g, clip_value=math.inf)
    np.testing.assert_array_equal(p, -g)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_nan_is_not_clipped_away(dtype):
    g = np.asarray([np.nan, 5, -np.nan, -5], dtype)
    p = np.zeros(4, dtype)
    fastopt.SGD(p, lr=1.0).step(g, clip_value=1.0)
    np.testing.assert_array_equal(p.astype(np.float64), [np.nan, -1, np.nan, 1])
    table = np.zeros((3, 4), dtype)
    fastopt.SGD(table, lr=1.0).step(IndexedSlices(np.array([1]), g[None]), clip_value=1.0)
    np.testing.assert_array_equal(table[1].astype(np.float64), [np.nan, -1, np.nan, 1])


def test_infinity_is_clipped_unless_the_norm_is_asked_for():
    p = np.zeros(2, np.float32)
    opt = fastopt.SGD(p, lr=1.0)
    opt.step(np.float32([np.inf, 0.5]), clip_value=1.0)
    np.testing.assert_array_equal(p, [-1, -0.5])
    info = opt.step(np.float32([np.inf, 0.5]), clip_value=1.0, skip_nonfinite=True)
    assert info.skipped
    np.testing.assert_array_equal(p, [-1, -0.5])
    # as torch's clip_grad_norm_: the factor is 0, and 0 * inf is NaN
    opt.step(np.float32([np.inf, 0.5]), clip_value=1.0, clip_norm=1.0)
    np.testing.assert_array_equal(p, [np.nan, -0.5])


def sparse_problems(rng):
    """A sparse gradient of a table of (9, 5), and the dense one that it stands for."""
    indices = rng.integers(0, 9, 30)
    values = cases.gradient(rng, (30, 5), np.float32)
    yield IndexedSlices(indices, values), dense_of((9, 5), indices, values), indices
    offsets = np.array([0, 4, 4, 11, 25])
    outputs = cases.gradient(rng, (5, 5), np.float32)
    bags = np.repeat(np.arange(5), np.diff([*offsets, 30]))
    yield (
        BagGradient(indices, offsets, outputs, mode="sum"),
        dense_of((9, 5), indices, outputs[bags]),
        indices,
    )
    weights = cases.gradient(rng, 30, np.float32)
    weighted = outputs[bags].astype(np.float64) * weights[:, None]
    gradient = BagGradient(indices, offsets, outputs, per_sample_weights=weights, mode="sum")
    yield gradient, dense_of((9, 5), indices, weighted), indices


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["slices", "bags", "weighted bags"])
def test_of_sparse_gradients_the_sums_of_rows_are_clipped(kind, settings):
    rng = np.random.default_rng(kind)
    for _ in range(5):
        p = cases.parameter(rng, (9, 5), np.float32)
        other = cases.parameter(rng, 7, np.float32)
        opt = fastopt.SGD([p, other], lr=0.1)
        want = tracked(cases.BY_NAME["sgd"], [p, other], {"lr": 0.1})
        clip_value = 0.3 * settings.get("grad_scale", 1.0)
        for _ in range(2):
            gradient, dense, indices = list(sparse_problems(rng))[kind]
            g = cases.gradient(rng, 7, np.float32)
            opt.step([gradient, g], clip_value=clip_value, **settings)
            clipped, _ = prepared([dense, g], clip_value=clip_value, **settings)
            rows = np.unique(indices)
            want[0].step((rows, clipped[0][rows]))
            want[1].step(clipped[1])
        assert_follows(want, [p, other])


def test_a_sum_beyond_the_limit_of_small_values_is_clipped_and_one_within_of_large_ones_is_not():
    table = np.zeros((3, 1), np.float32)
    indices, values = np.array([0, 0, 0, 2, 2]), np.float32([[0.4], [0.4], [0.4], [8], [-7.5]])
    fastopt.SGD(table, lr=1.0).step(IndexedSlices(indices, values), clip_value=1.0)
    np.testing.assert_array_equal(table, [[-1.0], [0], [-0.5]])


def test_rows_are_clipped_by_norm_before_value():
    table = np.zeros((2, 2), np.float32)
    opt = fastopt.SGD(table, lr=1.0, clip_row_norm=5.0)
    opt.step(IndexedSlices(np.array([1]), np.float32([[30, 40]])), clip_value=3.5)
    np.testing.assert_allclose(table, [[0, 0], [-3, -3.5]], rtol=1e-6)  # 5 / (50 + 1e-6)


# zero_grads


def test_gradients_are_zero_once_they_are_used():
    rng = np.random.default_rng(5)
    dtypes = [np.float32, np.float64, np.float16, BFLOAT16]
    params = [cases.parameter(rng, shape, d) for d in dtypes for shape in ((300,), (0,), (2, 3))]
    params.append(cases.parameter(rng, 9, BFLOAT16))
    copies = [p.copy() for p in params]
    options = {"lr": 0.01, "weight_decay": 0.1}
    opt, other = fastopt.Adam(params, **options), fastopt.Adam(copies, **options)
    buffers = [np.zeros(p.shape, np.float32 if p.size == 9 else p.dtype) for p in params]
    for _ in range(4):
        grads = [cases.gradient(rng, g.shape, g.dtype) for g in buffers]
        for buffer, g in zip(buffers, grads, strict=True):
            assert not np.asarray(buffer, np.float64).any()
            buffer += g
        opt.step(buffers, zero_grads=True)
        other.step(grads)
        assert all(g.any() or not g.size for g in grads)
        assert bits(opt, params) == bits(other, copies)
    for buffer in buffers:
        assert not any(buffer.tobytes())


def test_large_gradients_are_zero_once_they_are_used():
    params = [np.ones(150_001, np.float32), np.ones(3, np.float32), np.ones(70_000, np.float32)]
    grads = [np.ones_like(p) for p in params]
    fastopt.Adam(params).step(grads, zero_grads=True)
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_of_sparse_gradients_the_values_are_zero_once_they_are_used(dtype):
    rng = np.random.default_rng(6)
    tables = [cases.parameter(rng, (9, 5), dtype) for _ in range(4)]
    copies = [table.copy() for table in tables]
    opt, other = fastopt.SGD(tables, lr=0.1), fastopt.SGD(copies, lr=0.1)
    for _ in range(2):
        arrays = [cases.gradient(rng, (6, 5), dtype) for _ in range(3)] + [cases.gradient(rng, (9, 5), dtype)]
        kept = [array.copy() for array in arrays]
        indices, offsets = rng.integers(0, 9, 6), np.array([0, 0, 1, 2, 4, 5])

        def gradients(a, indices=indices, offsets=offsets):
            bags = BagGradient(indices, offsets, a[1], "mean"), BagGradient(indices, offsets, a[2], "max")
            return [IndexedSlices(indices, a[0]), *bags, a[3]]

        opt.step(gradients(arrays), zero_grads=True)
        other.step(gradients(kept))
        assert bits(opt, tables) == bits(other, copies)
        assert not any(any(array.tobytes()) for array in arrays)
        assert all(array.any() for array in kept)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def test_read_only_gradients_are_refused_with_zero_grads_alone():
    rng = np.random.default_rng(7)
    params = [cases.parameter(rng, shape, np.float32) for shape in ((4,), (5, 3))]
    opt = fastopt.SGD(params, lr=0.1)
    good = [cases.gradient(rng, p.shape, np.float32) for p in params]
    indices, offsets = np.array([0, 3]), np.array([0, 2])
    for number, bad, label in (
        (0, read_only(good[0]), r"grads\[0\]"),
        (1, read_only(good[1]), r"grads\[1\]"),
        (1, IndexedSlices(indices, read_only(good[1][:2])), r"grads\[1\].values"),
        (1, BagGradient(indices, offsets, read_only(good[1][:2]), mode="sum"), r"grads\[1\].grad_output"),
    ):
        grads = list(good)
        grads[number] = bad
        opt.step(grads)
        for _ in range(2):
            before, kept = bits(opt, params), good[1 - number].copy()
            with pytest.raises(
                ValueError, match=f"^{label} is read-only: expected a gradient that can be set"
            ):
                opt.step(grads, zero_grads=True)
            assert bits(opt, params) == before
            assert good[1 - number].tobytes() == kept.tobytes()
        opt.step(grads)


def test_gradients_made_read_only_between_steps_are_refused():
    params = [np.ones(4, np.float32), np.ones(3, np.float32)]
    grads = [np.ones_like(p) for p in params]
    opt = fastopt.SGD(params, lr=0.1)
    opt.step(grads, zero_grads=True)
    opt.step(grads, zero_grads=True)
    for g in grads:
        g[...] = 1
    grads[1].flags.writeable = False
    before = bits(opt, params)
    with pytest.raises(ValueError, match=r"grads\[1\] is read-only"):
        opt.step(grads, zero_grads=True)
    assert bits(opt, params) == before
    assert grads[1].all()
    assert grads[0].all()
    opt.step(grads)
    np.testing.assert_allclose(params[1], 1 - 0.1 * 2, rtol=1e-6)


def test_one_gradient_for_two_parameters_is_refused_with_zero_grads_alone():
    params = [np.ones(4, np.float32), np.ones(4, np.float32)]
    g = np.ones(5, np.float32)
    opt = fastopt.SGD(params, lr=0.5)
    for grads in ([g[:4], g[:4]], [g[:4], g[1:]]):
        opt.step(grads)
        before = bits(opt, params)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"grads\[\d\] shares memory with grads\[\d\]"):
                opt.step(grads, zero_grads=True)
        assert bits(opt, params) == before
        assert g.all()
        opt.step(grads)
    np.testing.assert_array_equal(params[0], -1)
    tables = [np.ones((4, 2), np.float32) for _ in range(2)]
    values = np.ones((3, 2), np.float32)
    slices = IndexedSlices(np.arange(3), values)
    opt = fastopt.SGD(tables, lr=0.5)
    opt.step([slices, slices])
    with pytest.raises(ValueError, match=r"grads\[\d\].values shares memory with grads\[\d\].values"):
        opt.step([slices, slices], zero_grads=True)
    assert values.all()


def test_gradients_of_skipped_steps_stay():
    params = [np.ones(4, np.float32), np.ones((3, 2), np.float32)]
    opt = fastopt.SGD(params, lr=0.5)
    g, values = np.float32([1, np.nan, 2, 3]), np.ones((1, 2), np.float32)
    grads = [g, IndexedSlices(np.array([1]), values)]
    assert opt.step(grads, skip_nonfinite=True, zero_grads=True).skipped
    np.testing.assert_array_equal(g, [1, np.nan, 2, 3])
    assert values.all()
    g[1] = 0
    assert not opt.step(grads, skip_nonfinite=True, zero_grads=True).skipped
    assert not g.any()
    assert not values.any()


def test_torch_gradients_are_zero_once_they_are_used():
    torch = pytest.importorskip("torch")
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]
    grads = [torch.ones_like(p) for p in params]
    opt = fastopt.SGD(params, lr=0.5)
    for _ in range(2):
        for g in grads:
            g += 1
        opt.step([g.detach() for g in grads], zero_grads=True)
        assert not any(g.any() for g in grads)


# What is not finite


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, BFLOAT16])
def test_the_first_parameter_whose_gradient_is_not_finite_is_named(dtype, bad):
    rng = np.random.default_rng(8)
    shapes = {"a": (3,), "b": (4, 2), "c": (300,), "d": (0,)}
    params = {name: cases.parameter(rng, shape, dtype) for name, shape in shapes.items()}
    opt = fastopt.SGD(params, lr=0.1)
    listed = fastopt.SGD([p.copy() for p in params.values()], lr=0.1)
    grouped = fastopt.SGD([{"params": {n: params[n].copy()}} for n in params])
    mixed = fastopt.SGD([{"params": [p.copy() for p in list(params.values())[:2]]},
                         {"params": [p.copy() for p in list(params.values())[2:]]}])  # fmt: skip
    for names in (["a"], ["b"], ["c"], ["c", "b"], ["c", "a"]):
        grads = {name: cases.gradient(rng, shape, dtype) for name, shape in shapes.items()}
        for name in names:
            grads[name].reshape(-1)[-1] = bad
        first = min(names)
        values = list(grads.values())
        position = "abcd".index(first)
        for one, given_grads, key in (
            (opt, grads, first),
            (listed, values, position),
            (grouped, [{name: g} for name, g in grads.items()], first),
            (mixed, [values[:2], values[2:]], position),
        ):
            for clip_norm in (None, 1.0):
                info = one.step(given_grads, skip_nonfinite=True, clip_norm=clip_norm)
                assert (info.skipped, info.clipped, info.nonfinite) == (True, False, key)
                assert not math.isfinite(info.norm)
            assert one.steps == 0
    grads = {name: cases.gradient(rng, shape, dtype) for name, shape in shapes.items()}
    info = opt.step(grads, skip_nonfinite=True)
    assert (info.skipped, info.nonfinite, opt.steps) == (False, None, 1)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_sparse_gradients_that_are_not_finite_are_named(dtype):
    rng = np.random.default_rng(9)
    params = {name: cases.parameter(rng, (5, 3), dtype) for name in ("none", "slices", "bags", "dense")}
    opt = fastopt.SGD(params, lr=0.1)
    indices, offsets = np.array([4, 0, 4]), np.array([0, 1, 1])
    before = [p.copy() for p in params.values()]
    for bad in (["slices"], ["bags"], ["dense"], ["dense", "bags"], ["bags", "slices"]):
        values = {name: cases.gradient(rng, (5, 3) if name == "dense" else (3, 3), dtype) for name in params}
        for name in bad:
            values[name][-1, 1] = np.nan if rng.integers(2) else np.inf
        grads = {
            "none": None,
            "slices": IndexedSlices(indices, values["slices"]),
            "bags": BagGradient(indices, offsets, values["bags"], mode="sum"),
            "dense": values["dense"],
        }
        info = opt.step(grads, skip_nonfinite=True)
        assert (info.skipped, info.nonfinite) == (True, next(name for name in params if name in bad))
    assert all((p == q).all() for p, q in zip(params.values(), before, strict=True))
    assert opt.steps == 0


def test_float32_gradients_of_16_bit_parameters_are_named_too():
    params = {"a": np.ones(2, BFLOAT16), "b": np.ones(2, np.float16)}
    opt = fastopt.SGD(params, lr=0.1)
    grads = {"a": np.float32([1, 2]), "b": np.float32([1, np.inf])}
    assert opt.step(grads, skip_nonfinite=True).nonfinite == "b"
    grads["b"][1] = 1e30  # beyond float16, but finite
    assert not opt.step(grads, skip_nonfinite=True).skipped


def test_of_several_bad_elements_only_the_norm_of_all_may_be_beyond_float64():
    params = [np.ones(2), np.ones(3)]
    info = fastopt.SGD(params).step([np.full(2, 1.7e308), np.full(3, 1.7e308)], skip_nonfinite=True)
    assert (info.norm, info.skipped, info.nonfinite) == (math.inf, True, None)


# The norm


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, BFLOAT16])
@given(
    seed=SEEDS,
    sizes=st.lists(st.sampled_from([0, 1, 5, 511, 512, 513, 8191, 8192, 8193, 20_000]), max_size=9),
)
def test_the_norm_has_the_same_bits_however_gradients_are_divided(dtype, seed, sizes):
    rng = np.random.default_rng(seed)
    sizes = [*sizes, 3]
    flat = np.asarray(rng.standard_normal(sum(sizes)) * 10.0 ** rng.uniform(-4, 3, sum(sizes)), dtype)
    pieces = np.split(flat, np.cumsum(sizes)[:-1])
    p = np.zeros(sum(sizes), dtype)
    split = np.split(np.zeros(sum(sizes), dtype), np.cumsum(sizes)[:-1])
    norms = {
        fastopt.SGD(p).step(flat, clip_norm=math.inf).norm,
        fastopt.SGD(split).step(pieces, clip_norm=math.inf).norm,
        fastopt.grad_norm(flat),
        fastopt.grad_norm(pieces),
        fastopt.SGD(p).step(flat, skip_nonfinite=True).norm,
    }
    assert len(norms) == 1
    # sums of 512 lanes, each of up to sum(sizes) / 512 terms and the halvings: n roundings of 2^-53
    want = math.fsum(float(x) ** 2 for x in flat) ** 0.5
    np.testing.assert_allclose(norms.pop(), want, rtol=len(flat) * 2.0**-53)


def test_the_norm_is_that_of_the_sums_of_rows_and_all_dtypes_together():
    rng = np.random.default_rng(10)
    slices, dense, _ = next(sparse_problems(rng))
    whole = [cases.gradient(rng, 40, dtype) for dtype in (np.float32, np.float64, np.float16, BFLOAT16)]
    params = [np.zeros((9, 5), np.float32), *(np.zeros(40, g.dtype) for g in whole)]
    info = fastopt.SGD(params).step([slices, *whole], clip_norm=1.0, grad_scale=0.5)
    _, norm = prepared([dense, *whole], grad_scale=0.5)
    np.testing.assert_allclose(info.norm, norm, rtol=1e-14)
    assert info.clipped
    assert reference.peak(params[0]) > 0


def test_bags_that_no_row_uses_are_not_named_as_not_finite():
    params = [np.ones((4, 2), np.float32), np.ones(3, np.float32)]
    output = np.float32([[1, 1], [np.nan, 1]])
    grads = [
        fastopt.BagGradient(np.array([0, 1]), np.array([0, 2]), output, mode="sum"),
        np.full(3, np.nan, np.float32),
    ]
    assert fastopt.SGD(params).step(grads, skip_nonfinite=True).nonfinite == 1


def test_a_grad_scale_that_would_become_0_is_refused():
    with pytest.raises(ValueError, match="grad_scale, with clipping, makes 1e-60"):
        fastopt.SGD(np.ones(3, np.float32)).step(np.ones(3, np.float32), grad_scale=1e-60)


@pytest.mark.parametrize(
    "option", [{"clip_row_norm": 1.0}, {"step_per_row": True}, {"rows": "dense"}], ids=str
)
def test_adafactor_refuses_what_goes_by_rows(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        fastopt.Adafactor(np.ones((3, 3)), **option)
