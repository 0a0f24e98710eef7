"""Every kernel, through the public API, against the float64 reference."""

import math

import cases
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastopt
from fastopt.kernels.rules import nadam

SHAPES = [(), (0,), (1,), (7,), (64,), (101,), (0, 4), (3, 0), (1, 1), (5, 3), (17, 8), (2, 3, 5)]
WIDTHS = [0, 1, 3, 7, 8, 64, 100]
INDEX_SHAPES = [(0,), (), (1,), (9,), (200,), (4, 5), (2, 3, 2), (3, 0)]
SEEDS = st.integers(0, 2**32 - 1)

# A step rounds p once and the update in some ten operations and casts, so errors are a few ulp of
# the peak of |p| plus all updates so far, and of the largest state. The cancellation in v - mean^2
# of a centered RMSProp loses up to a factor v / (v - mean^2), below 10 for alpha >= 0.8 and few steps.
ULPS = 16
CENTERED_ULPS = 160


def assert_follows(case, opt, tracked, params):
    dtype = params[0].dtype
    ulps = CENTERED_ULPS if "centered" in case.name else ULPS
    states = list(opt.state_dict()["state"].values())
    for want, got, state in zip(tracked, params, states, strict=True):
        unit = ulps * np.finfo(dtype).eps
        assert got.dtype == dtype
        np.testing.assert_allclose(got, want.p, rtol=0, atol=unit * want.scale)
        assert state.pop("step") == want.steps
        if want.steps:
            assert set(state) == set(want.state)
        for name, array in state.items():
            assert (array.dtype, array.shape) == (dtype, want.state[name].shape)
            atol = unit * want.state_scale[name]
            np.testing.assert_allclose(array, want.state[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize(("case", "dtype", "decay"), cases.COMBINATIONS, ids=cases.IDS)
@given(data=st.data(), shape=st.sampled_from(SHAPES), seed=SEEDS, steps=st.integers(1, 6))
def test_dense_steps_follow_the_formula(case, dtype, decay, data, shape, seed, steps):
    options = data.draw(case.strategy(decay))
    rng = np.random.default_rng(seed)
    p = cases.parameter(rng, shape, dtype)
    opt, want = case.make([p], options), case.reference(p, options)
    for _ in range(steps):
        g = cases.gradient(rng, shape, dtype)
        given_g = g.copy()
        opt.step([g])
        want.step(g)
        np.testing.assert_array_equal(g, given_g)
    assert_follows(case, opt, [want], [p])


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_large_dense_steps_follow_the_formula(case):
    rng = np.random.default_rng(7)
    for shape in ((300_001,), (40_001, 7)):
        p = cases.parameter(rng, shape, np.float32)
        options = case.options(rng, weight_decay=False)
        opt, want = case.make([p], options), case.reference(p, options)
        for _ in range(3):
            g = cases.gradient(rng, shape, np.float32)
            opt.step([g])
            want.step(g)
        assert_follows(case, opt, [want], [p])


@pytest.mark.parametrize("case", [cases.BY_NAME["adam"], cases.BY_NAME["rowwise_adagrad"]], ids=str)
def test_large_sparse_steps_follow_the_formula(case):
    rng = np.random.default_rng(8)
    p = cases.parameter(rng, (3_000, 8), np.float32)
    options = case.options(rng, weight_decay=False)
    opt, want = case.make([p], options), case.reference(p, options)
    for _ in range(3):
        indices = np.minimum(rng.zipf(1.2, 40_000), 3_000) - 1
        values = cases.gradient(rng, (40_000, 8), np.float32)
        opt.step([fastopt.IndexedSlices(indices, values)])
        want.step((indices, values))
    assert_follows(case, opt, [want], [p])


def draw_slices(data, rng, rows, width, dtype):
    index_shape = data.draw(st.sampled_from(INDEX_SHAPES if rows else [(0,), (3, 0)]))
    index_type = data.draw(st.sampled_from([np.int32, np.int64]))
    indices = np.asarray(rng.integers(0, max(rows, 1), index_shape), index_type)
    return indices, cases.gradient(rng, (*index_shape, width), dtype)


@pytest.mark.parametrize(("case", "dtype", "decay"), cases.SPARSE_COMBINATIONS, ids=cases.SPARSE_IDS)
@given(
    data=st.data(),
    rows=st.sampled_from([0, 1, 5, 40]),
    width=st.sampled_from(WIDTHS),
    seed=SEEDS,
    steps=st.integers(1, 4),
)
def test_sparse_steps_follow_the_formula_on_named_rows_and_leave_others(
    case, dtype, decay, data, rows, width, seed, steps
):
    options = data.draw(case.strategy(decay))
    rng = np.random.default_rng(seed)
    p = cases.parameter(rng, (rows, width), dtype)
    opt, want = case.make([p], options), case.reference(p, options)
    for _ in range(steps):
        indices, values = draw_slices(data, rng, rows, width, dtype)
        given_values, before = values.copy(), p.copy()
        state_before = opt.state_dict()["state"][0]
        opt.step([fastopt.IndexedSlices(indices, values)])
        want.step((indices, values))
        np.testing.assert_array_equal(values, given_values)
        others = np.setdiff1d(np.arange(rows), indices)
        assert p[others].tobytes() == before[others].tobytes()
        state = opt.state_dict()["state"][0]
        for name in set(state_before) - {"step"}:
            assert state[name][others].tobytes() == state_before[name][others].tobytes()
    assert_follows(case, opt, [want], [p])


@pytest.mark.parametrize("case", cases.RULES, ids=str)
@given(seed=SEEDS, width=st.sampled_from(WIDTHS), size=st.integers(0, 300))
def test_duplicates_are_one_update_with_their_sum(case, seed, width, size):
    rng = np.random.default_rng(seed)
    options = case.options(rng, weight_decay=False)
    p = cases.parameter(rng, (6, width), np.float32)
    once = p.copy()
    opt, opt_once = case.make(p, options), case.make(once, options)
    for _ in range(3):
        indices = rng.integers(0, 6, size)
        values = cases.gradient(rng, (size, width), np.float32)
        rows = np.unique(indices)
        sums = np.zeros((6, width), np.float32)
        np.add.at(sums, indices, values)
        opt.step(fastopt.IndexedSlices(indices, values))
        opt_once.step(fastopt.IndexedSlices(rows, sums[rows]))
    assert p.tobytes() == once.tobytes()
    state, state_once = opt.state_dict()["state"][0], opt_once.state_dict()["state"][0]
    for name in state:
        np.testing.assert_array_equal(state[name], state_once[name], err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seed=SEEDS, size=st.integers(1, 200))
def test_duplicates_are_summed_in_the_order_given(dtype, seed, size):
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, 4, size)
    values = np.asarray(rng.standard_normal((size, 3)) * 10.0 ** rng.integers(-3, 4, (size, 1)), dtype)
    sums = np.zeros((4, 3), dtype)
    for index, value in zip(indices, values, strict=True):
        sums[index] += value
    p = np.zeros((4, 3), dtype)
    fastopt.SGD(p, lr=1.0).step(fastopt.IndexedSlices(indices, values))
    np.testing.assert_array_equal(p, -sums)


@pytest.mark.parametrize("case", cases.RULES, ids=str)
@given(seed=SEEDS, width=st.sampled_from([0, 1, 7, 64]))
def test_naming_every_row_once_equals_a_dense_step(case, seed, width):
    rng = np.random.default_rng(seed)
    options = case.options(rng, weight_decay=False)
    dense = cases.parameter(rng, (9, width), np.float32)
    sparse = dense.copy()
    opt_dense, opt_sparse = case.make(dense, options), case.make(sparse, options)
    for _ in range(3):
        g = cases.gradient(rng, (9, width), np.float32)
        order = rng.permutation(9)
        opt_dense.step(g)
        opt_sparse.step(fastopt.IndexedSlices(order, g[order]))
    assert dense.tobytes() == sparse.tobytes()


@pytest.mark.parametrize("case", cases.DECAYED, ids=str)
@given(data=st.data(), seed=SEEDS)
def test_dense_sparse_and_no_gradients_mix_with_a_step_count_for_each_parameter(case, data, seed):
    rng = np.random.default_rng(seed)
    dtypes = [np.float32, np.float64] if data.draw(st.booleans()) else [np.float64, np.float32]
    options = case.options(rng, weight_decay=False)
    options_64 = case.options(rng, weight_decay=True)
    by_dtype = {np.float32: options, np.float64: options_64}
    params = [cases.parameter(rng, (8, 3), dtype) for dtype in dtypes]
    opt = case.make([{"params": [p], **by_dtype[p.dtype.type]} for p in params], {})
    want = [case.reference(p, by_dtype[p.dtype.type]) for p in params]
    for _ in range(5):
        grads, plain = [], []
        for p in params:
            kind = data.draw(st.sampled_from(["dense", "sparse", "none"]))
            g = cases.gradient(rng, p.shape, p.dtype)
            indices = rng.integers(0, 8, 8)
            grads.append({"dense": [g], "sparse": [fastopt.IndexedSlices(indices, g)], "none": [None]}[kind])
            plain.append({"dense": g, "sparse": (indices, g), "none": None}[kind])
        before = [p.copy() for p in params]
        opt.step(grads)
        for one, g, p, old in zip(want, plain, params, before, strict=True):
            one.step(g)
            assert g is not None or p.tobytes() == old.tobytes()
    assert opt.steps == 5
    for key, (one, p) in enumerate(zip(want, params, strict=True)):
        only = fastopt_state(opt, key)
        assert_follows(case, only, [one], [p])


class fastopt_state:
    """One parameter's share of an optimizer's state."""

    def __init__(self, opt, key):
        self.state = {key: opt.state_dict()["state"][key]}

    def state_dict(self):
        return {"state": self.state}


def test_nadam_by_hand():
    # 0.96^(t * momentum_decay) is 2^-t: mu is 3/8, 7/16 and 15/32, M 3/8, 21/128 and 315/4096
    options = {"lr": 1.0, "betas": (0.5, 0.75), "eps": 0.0, "momentum_decay": math.log(0.5, 0.96)}
    p = np.zeros(2)
    opt = fastopt.NAdam(p, **options)
    want = 0.0
    for gradient_rate, momentum_rate, m in ((1, 56 / 107, 1 / 2), (72 / 107, 1920 / 3781, 3 / 4)):
        opt.step(np.array([1.0, -4.0]))
        want -= gradient_rate + momentum_rate * m
        np.testing.assert_allclose(p, [want, -want], rtol=1e-14)
    np.testing.assert_array_equal(opt.state_dict()["state"][0]["exp_avg_sq"], [7 / 16, 7])


@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("momentum_decay", [0.0, 1e-300, 4e-3, 0.5, 50.0, 1e306])
def test_the_product_of_nadams_momenta(beta1, momentum_decay):
    product = 1.0
    for step in range(1, 1001):
        product *= beta1 * (1 - 0.5 * 0.96 ** (step * momentum_decay))
        got = nadam.mu_product(step, beta1, momentum_decay)
        np.testing.assert_allclose(got, product, rtol=2e-14, atol=1e-20)
    assert nadam.mu_product(2**53, beta1, momentum_decay) == 0


def test_lion_by_hand():
    p = np.ones(4)
    opt = fastopt.Lion(p, lr=0.5, betas=(0.5, 0.75), weight_decay=0.5)
    opt.step(np.array([2.0, -2.0, 0.0, 4.0]))
    np.testing.assert_array_equal(p, [0.25, 1.25, 0.75, 0.25])
    opt.step(np.array([-0.5, 0.0, 0.0, -4.0]))  # the first element's direction is 0
    np.testing.assert_array_equal(p, [0.1875, 1.4375, 0.5625, 0.6875])
    np.testing.assert_array_equal(opt.state_dict()["state"][0]["exp_avg"], [0.25, -0.375, 0, -0.25])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lions_direction_is_the_sign_that_torch_takes(dtype):
    tiny = np.finfo(dtype).smallest_subnormal
    g = np.tile(np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e30, -1e30, 4 * tiny, -4 * tiny], dtype), 9)
    p = np.full(g.size, 2, dtype)
    fastopt.Lion(p, lr=0.5, betas=(0.25, 0.0)).step(g)
    np.testing.assert_array_equal(p, 2 - np.sign(g) / 2)


@given(data=st.data(), seed=SEEDS, maximize=st.booleans())
def test_lion_follows_the_formula_with_any_betas(data, seed, maximize):
    rng = np.random.default_rng(seed)
    betas = data.draw(st.tuples(*(st.floats(*cases.RANGES[name]) for name in ("beta1", "beta2"))))
    options = {"lr": 0.01, "betas": betas, "weight_decay": 0.1, "maximize": maximize}
    p = cases.parameter(rng, (20, 3), np.float64)
    opt, want = fastopt.Lion(p, **options), cases.BY_NAME["lion"].reference(p, options)
    for _ in range(5):
        # no multiples of 1/64: a direction within rounding of 0 may have either sign
        g = rng.standard_normal((20, 3))
        opt.step(g)
        want.step(g)
    assert_follows(cases.BY_NAME["lion"], opt, [want], [p])


def test_read_only_gradients_and_strided_indices_are_taken():
    rng = np.random.default_rng(3)
    p, table = np.zeros(5, np.float32), np.zeros((9, 2), np.float32)
    g, values = np.ones(5, np.float32), np.ones((4, 2), np.float32)
    g.flags.writeable = values.flags.writeable = False
    indices = rng.permutation(9).astype(np.int64)[::2][:4]
    fastopt.SGD([p, table], lr=0.5).step([g, fastopt.IndexedSlices(indices, values)])
    np.testing.assert_array_equal(p, np.full(5, -0.5, np.float32))
    assert sorted(np.flatnonzero(table[:, 0])) == sorted(indices)


def test_row_numbers_above_the_first_digit_of_the_sort_are_grouped():
    rng = np.random.default_rng(5)
    rows = 5_000_011
    table = np.zeros((rows, 1), np.float64)
    indices = np.concatenate([rng.integers(0, rows, 500), [0, rows - 1, 2047, 2048, 2**22 - 1, 2**22] * 3])
    indices = rng.permutation(indices)
    fastopt.SGD(table, lr=1.0).step(fastopt.IndexedSlices(indices, np.ones((indices.size, 1))))
    want = np.zeros(rows)
    np.add.at(want, indices, -1.0)
    np.testing.assert_array_equal(table[:, 0], want)
