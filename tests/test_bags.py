"""Pooled lookups and their gradients, against torch and plain NumPy."""

import cases
import ml_dtypes
import numba
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import fastopt
from fastopt.kernels.cpu import threads

SEEDS = st.integers(0, 2**32 - 1)
DIMS = [0, 1, 3, 7, 8, 64, 100, 128, 1024]
MODES = ["sum", "mean", "max"]
DTYPES = [np.float32, np.float64]
RTOL = {np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-14}


class Problem:
    """A table of ``rows`` and bags of it: ``indices``, ``offsets`` and ``options`` as they are passed,
    and ``bag_of`` each index, ``weights`` and ``padding`` as a naive loop needs them.

    Numbers are multiples of powers of 2, few enough bits for sums of float32 to be exact.
    """

    def __init__(
        self,
        rng,
        mode,
        dtype,
        *,
        dim,
        form="offsets",
        weighted=False,
        padding=None,
        bags=6,
        rows=9,
        longest=6,
    ):
        self.mode, self.dtype = mode, np.dtype(dtype)
        self.table = cases.gradient(rng, (rows, dim), dtype)
        if mode == "max":
            self.table = np.sign(self.table)  # so that there are ties
        index_type, offset_type = rng.choice([np.int32, np.int64], 2)
        if form == "2d":
            width = int(rng.integers(0, longest, endpoint=True))
            lengths = np.full(bags, width)
            self.indices = rng.integers(0, rows, (bags, width)).astype(index_type)
            self.offsets = None
        else:
            lengths = rng.integers(0, longest, bags, endpoint=True) * rng.integers(0, 2, bags)
            self.indices = rng.integers(0, rows, lengths.sum()).astype(index_type)
            ends = np.concatenate([[0], np.cumsum(lengths)])
            self.offsets = (ends if form == "last" else ends[:-1]).astype(offset_type)
        self.bag_of = np.repeat(np.arange(bags), lengths)
        self.options = {"mode": mode, "include_last_offset": form == "last"}
        self.weights = np.ones(self.indices.shape, dtype)
        if weighted and mode != "max":
            self.weights = np.asarray(rng.integers(-16, 17, self.indices.shape) / 8, dtype)
            self.options["per_sample_weights"] = self.weights
        self.padding = -1
        if padding is not None:
            self.padding = int(rng.integers(rows))
            self.options["padding_idx"] = self.padding - rows * (padding == "negative")
        self.grad_output = cases.gradient(rng, (bags, dim), dtype)

    @property
    def counted(self):
        """Which positions are not of the padding row."""
        return self.indices.reshape(-1) != self.padding

    @property
    def scales(self):
        """Factor on each position's row, in float64."""
        scales = self.weights.reshape(-1) * self.counted.astype(np.float64)
        if self.mode == "mean":
            scales /= np.maximum(np.bincount(self.bag_of[self.counted], minlength=len(self.grad_output)), 1)[
                self.bag_of
            ]
        return scales

    def pooled(self):
        """The naive result, in float64, and what its rounding errors scale with."""
        table, flat = self.table.astype(np.float64), self.indices.reshape(-1)
        out, scale = np.zeros(self.grad_output.shape), np.ones(self.grad_output.shape)
        for bag in range(len(out)):
            mine = self.counted & (self.bag_of == bag)
            if self.mode == "max":
                out[bag] = table[flat[mine]].max(axis=0) if mine.any() else 0
            else:
                parts = table[flat[mine]] * self.scales[mine, None]
                out[bag], scale[bag] = parts.sum(axis=0), np.abs(parts).sum(axis=0)
        return out, scale

    def winners(self):
        """For mode "max": of each position and element, whether the maximum comes from it."""
        won = np.zeros((self.indices.size, self.table.shape[1]), bool)
        for bag in range(len(self.grad_output)):
            mine = np.flatnonzero(self.counted & (self.bag_of == bag))
            if mine.size:
                first = self.table[self.indices.reshape(-1)[mine]].argmax(axis=0)
                won[mine[first], np.arange(won.shape[1])] = True
        return won

    def materialised(self):
        """Gradient of each position, in float64."""
        values = self.grad_output.astype(np.float64)[self.bag_of] * self.scales[:, None]
        return values * self.winners() if self.mode == "max" else values

    def dense(self):
        """Gradient of the table, in float64."""
        total = np.zeros(self.table.shape)
        np.add.at(total, self.indices.reshape(-1), self.materialised())
        return total

    def lookup(self, **changed):
        return fastopt.embedding_bag(self.table, self.indices, self.offsets, **{**self.options, **changed})

    def gradient(self, **changed):
        options = {**self.options, "grad_output": self.grad_output, **changed}
        return fastopt.BagGradient(self.indices, self.offsets, **options)

    def through_torch(self):
        """Output, and gradients of the table and of the weights."""
        torch = pytest.importorskip("torch")
        table = torch.tensor(self.table, requires_grad=True)
        options = {**self.options}
        weights = None
        if "per_sample_weights" in options:
            weights = options["per_sample_weights"] = torch.tensor(self.weights, requires_grad=True)
        offsets = None if self.offsets is None else torch.tensor(self.offsets.astype(np.int64))
        indices = torch.tensor(self.indices.astype(np.int64))
        out = torch.nn.functional.embedding_bag(indices, table, offsets, **options)
        out.backward(torch.tensor(self.grad_output))
        return (
            out.detach().numpy(),
            table.grad.numpy(),
            None if weights is None else weights.grad.numpy(),
        )


PROBLEMS = st.fixed_dictionaries(
    {
        "dim": st.sampled_from(DIMS),
        "form": st.sampled_from(["offsets", "last", "2d"]),
        "weighted": st.booleans(),
        "padding": st.sampled_from([None, "positive", "negative"]),
        "bags": st.integers(0, 9),
        "rows": st.integers(1, 12),
        "longest": st.sampled_from([0, 1, 6, 70]),
    }
)


def known_to_torch(problem):
    """Whether torch takes it: neither weights of a mean nor bags or rows without anything in them."""
    weighted_mean = problem.mode == "mean" and "per_sample_weights" in problem.options
    return (
        problem.grad_output.size and not weighted_mean and (problem.indices.ndim == 1 or problem.indices.size)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@given(options=PROBLEMS, seed=SEEDS)
def test_bags_are_pooled_as_by_torch(mode, dtype, options, seed):
    problem = Problem(np.random.default_rng(seed), mode, dtype, **options)
    before = problem.table.tobytes(), problem.indices.tobytes(), problem.weights.tobytes()
    got = problem.lookup()
    want, scale = problem.pooled()
    assert (got.dtype, got.shape) == (problem.dtype, want.shape)
    rtol = RTOL[problem.dtype] if mode == "mean" else 0
    assert (np.abs(got - want) <= rtol * scale).all()
    assert (problem.table.tobytes(), problem.indices.tobytes(), problem.weights.tobytes()) == before
    if known_to_torch(problem):
        assert (np.abs(got - problem.through_torch()[0]) <= rtol * scale).all()


# All terms of five bags are added up in one row
ONE_ROW = {"dim": 7, "form": "2d", "weighted": False, "padding": None, "bags": 5, "rows": 1, "longest": 70}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@given(options=PROBLEMS, seed=SEEDS)
@example(options=ONE_ROW, seed=0)
def test_a_step_takes_the_gradient_that_torch_finds(mode, dtype, options, seed):
    problem = Problem(np.random.default_rng(seed), mode, dtype, **options)
    p = problem.table.copy()
    gradient = problem.gradient()
    given_g = problem.grad_output.tobytes()
    fastopt.SGD(p, lr=1.0).step(gradient)
    assert problem.grad_output.tobytes() == given_g
    scale = np.abs(problem.table) + np.zeros(problem.table.shape)
    np.add.at(scale, problem.indices.reshape(-1), np.abs(problem.materialised()))
    # n numbers that are not exact, added one after the other, are off by n half ulps of the sum of their
    # magnitudes (Higham 2002, "Accuracy and Stability of Numerical Algorithms", 4.2), here and in torch
    terms = np.bincount(problem.indices.reshape(-1), minlength=len(p))[:, None]
    bound = (terms + 4) * np.finfo(problem.dtype).eps * scale if mode == "mean" else 0 * scale
    assert (np.abs(p - (problem.table - problem.dense())) <= bound).all()
    if known_to_torch(problem):
        assert (np.abs(p - (problem.table - problem.through_torch()[1])) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["sum", "mean"])
@given(options=PROBLEMS, seed=SEEDS)
def test_the_gradient_of_weights_is_that_of_torch(mode, dtype, options, seed):
    problem = Problem(np.random.default_rng(seed), mode, dtype, **options)
    got = problem.gradient().per_sample_weights_grad(problem.table)
    assert (got.dtype, got.shape) == (problem.dtype, problem.indices.shape)
    rows = problem.table.astype(np.float64)[problem.indices.reshape(-1)]
    products = rows * problem.grad_output.astype(np.float64)[problem.bag_of]
    problem.weights = np.ones_like(problem.weights)
    unweighted = problem.scales
    want = (products.sum(axis=1) * unweighted).reshape(got.shape)
    scale = (np.abs(products).sum(axis=1) * unweighted).reshape(got.shape)
    rtol = 4 * RTOL[problem.dtype]
    assert (np.abs(got - want) <= rtol * scale).all()
    if options["weighted"] and known_to_torch(problem):
        assert (np.abs(got - problem.through_torch()[2].reshape(got.shape)) <= rtol * scale).all()


@pytest.mark.parametrize("mode", MODES)
def test_many_bags_and_a_long_one_are_pooled(mode):
    rng = np.random.default_rng(1)
    for bags, longest, rows in ((9_000, 12, 500), (3, 200_000, 70)):
        problem = Problem(rng, mode, np.float64, dim=8, bags=bags, longest=longest, rows=rows)
        problem.indices = problem.indices.astype(np.int64)  # one kernel to compile for both
        problem.offsets = problem.offsets.astype(np.int64)
        lengths = np.bincount(problem.bag_of, minlength=bags)
        filled = lengths > 0
        starts = np.cumsum(lengths) - lengths
        add = np.maximum if mode == "max" else np.add
        want = np.zeros((bags, 8))
        want[filled] = add.reduceat(problem.table[problem.indices], starts[filled])
        if mode == "mean":
            want[filled] /= lengths[filled, None]
        np.testing.assert_array_equal(problem.lookup(), want)
        if bags == 3:
            continue
        p = problem.table.copy()
        fastopt.SGD(p, lr=1.0).step(problem.gradient())
        torch = pytest.importorskip("torch")
        table = torch.tensor(problem.table, requires_grad=True)
        where = torch.tensor(problem.indices), torch.tensor(problem.offsets.astype(problem.indices.dtype))
        out = torch.nn.functional.embedding_bag(where[0], table, where[1], mode=mode)
        out.backward(torch.tensor(problem.grad_output))
        np.testing.assert_allclose(p, problem.table - table.grad.numpy(), rtol=0, atol=1e-12)


def stepped(case, table, gradients, **options):
    """Bytes of the parameter and its state after steps with ``gradients``."""
    p = table.copy()
    opt = case.make(p, case.options(np.random.default_rng(2), weight_decay=False))
    infos = [opt.step(gradient, **options) for gradient in gradients]
    state = opt.state_dict()["state"][0]
    return infos, [p.tobytes(), *((k, np.asarray(a).tobytes()) for k, a in sorted(state.items()))]


# backwards, as another process may come from the other end and compile the same kernels
@pytest.mark.parametrize("case", cases.RULES[::-1], ids=str)
def test_steps_have_the_bits_of_those_with_the_gradients_of_positions(case):
    rng = np.random.default_rng(3)
    table = rng.standard_normal((12, 7)).astype(np.float32)
    bags, slices = [], []
    for form, weighted, padding in (("2d", False, None), ("last", True, "negative"), ("offsets", True, None)):
        problem = Problem(rng, "sum", np.float32, dim=7, rows=12, form=form, padding=padding, longest=9)
        problem.grad_output = rng.standard_normal(problem.grad_output.shape).astype(np.float32)
        weights = None
        values = problem.grad_output[problem.bag_of]
        if weighted:
            weights = rng.standard_normal(problem.indices.shape).astype(np.float32)
            values = values * weights.reshape(-1, 1)
        kept = problem.counted
        bags.append(problem.gradient(per_sample_weights=weights))
        slices.append(fastopt.IndexedSlices(problem.indices.reshape(-1)[kept], values[kept]))
    for options in ({}, {"clip_norm": 0.5}):
        assert stepped(case, table, bags, **options) == stepped(case, table, slices, **options)


@pytest.mark.parametrize("weights", [None, np.array([1.0, -1.0], np.float32)], ids=["plain", "weighted"])
def test_negative_zeros_come_as_from_the_gradients_of_positions(weights):
    g = np.array([[-0.0], [0.0]], np.float32)
    tables = [np.full((2, 1), -0.0, np.float32) for _ in range(2)]
    where, start = np.array([0, 1]), np.array([0, 1])
    values = g if weights is None else g * weights[:, None]
    gradient = fastopt.BagGradient(where, start, g, "sum", weights)
    fastopt.SGD(tables[0], lr=1.0).step(gradient)
    fastopt.SGD(tables[1], lr=1.0).step(fastopt.IndexedSlices(where, values))
    assert tables[0].tobytes() == tables[1].tobytes()


@pytest.mark.parametrize("mode", MODES)
def test_rows_in_no_bag_and_the_padding_row_are_left_alone(mode):
    rng = np.random.default_rng(4)
    table = rng.standard_normal((20, 5)).astype(np.float32)
    indices = np.array([3, 7, 3, 9, 7, 7, 15])
    p = table.copy()
    opt = fastopt.AdamW(p, lr=0.1, weight_decay=0.5)
    gradient = fastopt.BagGradient(
        indices, np.array([0, 2, 2, 5]), np.ones((4, 5), np.float32), mode, padding_idx=-13
    )
    for _ in range(2):
        opt.step(gradient, clip_norm=100.0)
    touched = np.isin(np.arange(20), [3, 9, 15])
    assert p[~touched].tobytes() == table[~touched].tobytes()
    assert (p[touched] != table[touched]).all()
    for name in ("exp_avg", "exp_avg_sq"):
        state = opt.state_dict()["state"][0][name]
        assert not state[~touched].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_go_through(dtype):
    nan, inf = np.nan, np.inf
    table = np.array([[nan, 1.0], [inf, -inf], [2.0, inf], [0.0, 5.0]], dtype)
    indices, offsets = np.array([3, 0, 1, 2, 3, 3, 0]), np.array([0, 2, 4, 6])
    for mode, want in (
        ("sum", [[nan, 6], [inf, nan], [0, 10], [nan, 1]]),
        ("mean", [[nan, 3], [inf, nan], [0, 5], [nan, 1]]),
        ("max", [[nan, 5], [inf, inf], [0, 5], [nan, 1]]),
    ):
        np.testing.assert_array_equal(fastopt.embedding_bag(table, indices, offsets, mode=mode), want)
    below = np.array([[-inf, -3.0], [-inf, -2.0]], dtype)
    np.testing.assert_array_equal(fastopt.embedding_bag(below, np.array([[0, 1]]), mode="max"), [[-inf, -2]])
    backwards = np.array([[1, 3], [0, 3]])
    np.testing.assert_array_equal(fastopt.embedding_bag(table, backwards, mode="max")[1], [nan, 5])

    weights = np.array([inf, nan, 1, 0], dtype)
    got = fastopt.embedding_bag(
        np.ones((1, 2), dtype), np.zeros((4, 1), int), mode="sum", per_sample_weights=weights[:, None]
    )
    np.testing.assert_array_equal(got[:, 0], weights)

    p = np.zeros((4, 2), dtype)
    g = np.array([[nan, 1.0], [inf, -inf], [-inf, 2.0]], dtype)
    where, start = np.array([0, 1, 2, 2, 3]), np.array([0, 1, 3])
    fastopt.SGD(p, lr=1.0).step(fastopt.BagGradient(where, start, g, mode="sum"))
    np.testing.assert_array_equal(p, [[nan, -1], [-inf, inf], [nan, inf], [inf, -2]])
    got = fastopt.BagGradient(where, start, g, mode="sum").per_sample_weights_grad(np.ones((4, 2), dtype))
    np.testing.assert_array_equal(got, [nan, nan, nan, -inf, -inf])


def test_nan_of_empty_bags_and_of_the_padding_row_counts_for_nothing():
    g = np.array([[np.nan, np.nan], [1.0, 2.0], [np.nan, np.inf]])
    table = np.zeros((3, 2))
    table[2] = np.nan
    gradient = fastopt.BagGradient(np.array([0, 2, 2]), np.array([0, 0, 2]), g, padding_idx=2, mode="sum")
    np.testing.assert_array_equal(
        fastopt.embedding_bag(table, gradient.indices, gradient.offsets, padding_idx=2, mode="sum"),
        np.zeros((3, 2)),
    )
    np.testing.assert_array_equal(gradient.per_sample_weights_grad(table), 0)
    assert fastopt.grad_norm(gradient) == np.sqrt(5)
    info = fastopt.SGD(table, lr=1.0).step(gradient, skip_nonfinite=True)
    assert info == fastopt.StepInfo(np.sqrt(5), False, False)
    np.testing.assert_array_equal(table, [[-1, -2], [0, 0], [np.nan, np.nan]])


def test_torch_tensors_serve():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    table = torch.nn.Parameter(torch.randn(9, 4))
    twin = table.detach().clone().numpy()
    indices, offsets = torch.tensor([3, 0, 3, 8]), torch.tensor([0, 3])
    weights = torch.randn(4, requires_grad=True)
    out = torch.nn.functional.embedding_bag(indices, table, offsets, mode="sum", per_sample_weights=weights)
    out.sum().backward()
    got = fastopt.embedding_bag(table, indices, offsets, per_sample_weights=weights, mode="sum")
    np.testing.assert_allclose(got, out.detach().numpy(), rtol=1e-5, atol=1e-6)
    gradient = fastopt.BagGradient(indices, offsets, torch.ones(2, 4), per_sample_weights=weights, mode="sum")
    np.testing.assert_allclose(
        gradient.per_sample_weights_grad(table), weights.grad.numpy(), rtol=1e-5, atol=1e-6
    )
    fastopt.SGD(table, lr=1.0).step(gradient)
    np.testing.assert_allclose(table.detach().numpy(), twin - table.grad.numpy(), rtol=1e-5, atol=1e-6)


def test_strided_and_read_only_arrays_serve():
    rng = np.random.default_rng(5)
    indices, offsets = rng.integers(0, 9, 5_000), np.array([0, 10, 10, 4_000])
    weights, g, table = rng.standard_normal(5_000), rng.standard_normal((4, 3)), rng.standard_normal((9, 3))
    want = fastopt.embedding_bag(table, indices, offsets, per_sample_weights=weights, mode="sum")
    strided = [np.repeat(array, 2)[::2] for array in (indices, offsets, weights)]
    p, twin = table.copy(), table.copy()
    fastopt.SGD(twin).step(fastopt.BagGradient(indices, offsets, g, per_sample_weights=weights, mode="sum"))
    for array in (indices, offsets, weights, g, table, *strided):
        array.flags.writeable = False
    for where, start, factors in ((indices, offsets, weights), strided):
        got = fastopt.embedding_bag(table, where, start, per_sample_weights=factors, mode="sum")
        assert got.tobytes() == want.tobytes()
    fastopt.SGD(p).step(fastopt.BagGradient(strided[0], strided[1], g, "sum", strided[2]))
    assert p.tobytes() == twin.tobytes()
    two_d = indices.reshape(50, 100)
    np.testing.assert_array_equal(
        fastopt.embedding_bag(table, two_d.T, mode="max"), table[two_d.T].max(axis=1)
    )


@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_pool_gives_zeros_and_no_update(mode):
    p = np.ones((5, 2))
    opt = fastopt.Adam(p)
    for indices, offsets, bags in (
        (np.zeros(0, np.int32), np.zeros(0, np.int64), 0),
        (np.zeros(0, np.int32), np.zeros(4, np.int32), 4),
        (np.zeros((3, 0), np.int64), None, 3),
        (np.zeros((0, 3), np.int64), None, 0),
    ):
        got = fastopt.embedding_bag(p, indices, offsets, mode=mode)
        np.testing.assert_array_equal(got, np.zeros((bags, 2)), strict=True)
        opt.step(fastopt.BagGradient(indices, offsets, np.full((bags, 2), np.inf), mode), clip_norm=1.0)
    got = fastopt.embedding_bag(p, np.full((2, 3), 4), mode=mode, padding_idx=4)
    np.testing.assert_array_equal(got, np.zeros((2, 2)))
    opt.step(fastopt.BagGradient(np.full((2, 3), 4), None, np.ones((2, 2)), mode, padding_idx=4))
    np.testing.assert_array_equal(p, 1)
    assert fastopt.embedding_bag(np.ones((0, 2)), np.zeros((3, 0), int), mode=mode).shape == (3, 2)
    assert fastopt.embedding_bag(np.ones((2, 0)), np.zeros((3, 1), int), mode=mode).shape == (3, 0)


def test_the_rows_of_a_maximum_are_those_of_the_table_as_it_is():
    p = np.array([[1.0, 5.0], [2.0, 4.0]])
    gradient = fastopt.BagGradient(np.array([[0, 1]]), None, np.array([[1.5, 1.5]]), "max")
    opt = fastopt.SGD(p, lr=1.0)
    opt.step(gradient)
    np.testing.assert_array_equal(p, [[1.0, 3.5], [0.5, 4.0]])
    opt.step(gradient)
    np.testing.assert_array_equal(p, [[-0.5, 3.5], [0.5, 2.5]])


def test_the_rows_of_a_bag_are_added_in_the_order_of_their_indices():
    table = np.array([[1e8], [1.0], [-1e8]], np.float32)
    got = fastopt.embedding_bag(table, np.array([[0, 1, 2], [0, 2, 1]]), mode="sum")
    np.testing.assert_array_equal(got, [[0.0], [1.0]])


# Determinism


def large(mode, weighted):
    """Bytes of lookups, steps and norms, large enough to run in parallel."""
    rng = np.random.default_rng(6)
    table = rng.standard_normal((3_000, 9)).astype(np.float32)
    lengths = rng.integers(0, 30, 4_000)
    indices = np.minimum(rng.zipf(1.2, lengths.sum()), 3_000) - 1
    options = {"mode": mode, "padding_idx": 2, "include_last_offset": True}
    if weighted:
        options["per_sample_weights"] = rng.standard_normal(indices.size).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    out = [fastopt.embedding_bag(table, indices, offsets, max_norm=2.5, **options), table]
    g = rng.standard_normal((4_000, 9)).astype(np.float32)
    gradient = fastopt.BagGradient(indices, offsets, g, **options)
    opt = fastopt.Adam(table)
    for _ in range(2):
        out.append(np.array(opt.step(gradient, clip_norm=0.5).norm))
    out.append(opt.state_dict()["state"][0]["exp_avg_sq"])
    if mode != "max":
        out.append(gradient.per_sample_weights_grad(table))
    return [array.tobytes() for array in out]


@pytest.mark.parametrize(
    ("mode", "weighted"), [("sum", False), ("sum", True), ("mean", True), ("max", False)]
)
@cases.needs_two_threads
def test_bags_have_the_same_bits_for_any_number_of_threads_variant_and_run(
    mode, weighted, restored_threads, monkeypatch
):
    numba.set_num_threads(2)
    monkeypatch.setattr(threads, "PARALLEL_FROM", 0)
    first = large(mode, weighted)
    assert large(mode, weighted) == first
    numba.set_num_threads(1)
    assert large(mode, weighted) == first
    monkeypatch.setattr(threads, "PARALLEL_FROM", 262_144)
    assert large(mode, weighted) == first
    monkeypatch.setattr(threads, "PARALLEL_FROM", 2**62)
    assert large(mode, weighted) == first


# What does not fit


FIVE = np.array([0, 1, 2, 3, 4])
GIVEN = {"indices": FIVE, "offsets": np.array([0, 2]), "mode": "sum"}
BOTH = [
    ({"mode": "add"}, ValueError, r"{}mode is 'add': expected 'sum', 'mean' or 'max'"),
    ({"mode": None}, ValueError, r"{}mode is None: expected 'sum'"),
    (
        {"indices": np.array([0, 1, 2, 3, 5])},
        ValueError,
        r"{}indices holds 5: expected every index in \[0, 5\)",
    ),
    ({"indices": np.array([0, 1, 2, 3, -1])}, ValueError, r"{}indices holds -1"),
    ({"indices": FIVE.astype(float)}, TypeError, r"{}indices has dtype float64: expected int32 or int64"),
    ({"indices": [0, 1, 2, 3, 4]}, TypeError, r"{}indices is a list"),
    (
        {"indices": FIVE.reshape(5, 1)},
        ValueError,
        r"{}indices has shape \(5, 1\) and there are offsets: .*1-D",
    ),
    ({"indices": np.array(1)}, ValueError, r"{}indices has shape \(\) and there are offsets"),
    ({"offsets": None}, ValueError, r"{}offsets is None but indices has shape \(5,\): expected 2-D indices"),
    (
        {"offsets": None, "indices": FIVE.reshape(1, 1, 5)},
        ValueError,
        r"{}offsets is None but indices has shape \(1, 1, 5\)",
    ),
    ({"offsets": np.array([1, 2])}, ValueError, r"{}offsets begin with 1: expected the first to be 0"),
    ({"offsets": np.array([-1, 2])}, ValueError, r"{}offsets begin with -1"),
    ({"offsets": np.zeros(0, int)}, ValueError, r"{}offsets are empty, and there are 5 indices: expected"),
    ({"offsets": np.array([0, 3, 2])}, ValueError, r"{}offsets has 3 before 2: .* do not fall, up to 5"),
    ({"offsets": np.array([0, -1])}, ValueError, r"{}offsets has 0 before -1"),
    ({"offsets": np.array([0, 6])}, ValueError, r"{}offsets has 6 before 5: .* up to 5"),
    ({"offsets": np.array([0, 2**62])}, ValueError, r"{}offsets has 4611686018427387904 before 5"),
    ({"offsets": np.array([0.0, 2.0])}, TypeError, r"{}offsets has dtype float64: expected int32 or int64"),
    ({"offsets": np.array([0, 2], np.uint64)}, TypeError, r"{}offsets has dtype uint64"),
    ({"offsets": np.array([[0, 2]])}, ValueError, r"{}offsets has shape \(1, 2\): expected one dimension"),
    ({"offsets": np.array(0)}, ValueError, r"{}offsets has shape \(\): expected one dimension"),
    ({"offsets": [0, 2]}, TypeError, r"{}offsets is a list"),
    (
        {"include_last_offset": True},
        ValueError,
        r"the last of {}offsets is 2: expected 5, the number of indices",
    ),
    (
        {"include_last_offset": True, "offsets": np.array([0, 2, 6])},
        ValueError,
        r"the last of {}offsets is 6: expected 5",
    ),
    (
        {"include_last_offset": True, "offsets": np.zeros(0, int)},
        ValueError,
        r"the last of {}offsets is missing: expected 5",
    ),
    (
        {"include_last_offset": True, "offsets": np.array([0, 6, 5])},
        ValueError,
        r"{}offsets has 6 before 5",
    ),
    (
        {"include_last_offset": True, "offsets": np.array([5])},
        ValueError,
        r"{}offsets .*expected the first to be 0",
    ),
    (
        {"include_last_offset": True, "offsets": None, "indices": FIVE.reshape(1, 5)},
        ValueError,
        r"{}include_last_offset is True but offsets is None: expected offsets",
    ),
    ({"include_last_offset": 1}, TypeError, r"{}include_last_offset is 1: expected True or False"),
    (
        {"per_sample_weights": np.ones(4)},
        ValueError,
        r"{}per_sample_weights has shape \(4,\): expected \(5,\), that of indices",
    ),
    (
        {"per_sample_weights": np.ones((1, 5))},
        ValueError,
        r"{}per_sample_weights has shape \(1, 5\): expected \(5,\)",
    ),
    (
        {"per_sample_weights": np.ones(5, np.float32)},
        TypeError,
        r"{}per_sample_weights has dtype float32: expected float64",
    ),
    ({"per_sample_weights": [1.0] * 5}, TypeError, r"{}per_sample_weights is a list"),
    (
        {"per_sample_weights": np.ones(5), "mode": "max"},
        ValueError,
        r"{}per_sample_weights is given with mode 'max': expected mode 'sum' or 'mean'",
    ),
    ({"padding_idx": 5}, ValueError, r"{}padding_idx is 5: expected a row of the table, from -5 to 4"),
    ({"padding_idx": -6}, ValueError, r"{}padding_idx is -6: expected a row of the table"),
    ({"padding_idx": 1.0}, TypeError, r"{}padding_idx is 1\.0: expected a whole number or None"),
    ({"padding_idx": "1"}, TypeError, r"{}padding_idx is '1': expected a whole number or None"),
]


def refused(use, table, error, message, opt=None):
    before = table.tobytes()
    with pytest.raises(error, match=f"^{message}"):
        use()
    assert table.tobytes() == before
    assert opt is None or (
        opt.steps == 0 and not any("exp_avg" in s for s in opt.state_dict()["state"].values())
    )


@pytest.mark.parametrize(("changed", "error", "message"), BOTH, ids=[str(k) for k in range(len(BOTH))])
def test_bags_that_do_not_fit_are_refused_before_anything_is_written(changed, error, message):
    table = np.ones((5, 2))
    options = {**GIVEN, **changed}
    refused(lambda: fastopt.embedding_bag(table, max_norm=0.1, **options), table, error, message.format(""))
    bags = 2 if options["offsets"] is not None else 1
    gradient = fastopt.BagGradient(**options, grad_output=np.ones((bags, 2)))
    opt = fastopt.Adam(table)
    refused(lambda: opt.step(gradient), table, error, message.format(r"grads\."), opt)
    if changed.get("mode") != "max":
        refused(lambda: gradient.per_sample_weights_grad(table), table, error, message.format(""))


OUTPUTS = [
    (np.ones((3, 2)), ValueError, r"has shape \(3, 2\): expected \(2, "),
    (np.ones((1, 2)), ValueError, r"has shape \(1, 2\): expected \(2, "),
    (np.ones(2), ValueError, r"has shape \(2,\)"),
    (np.ones((2, 2, 1)), ValueError, r"has shape \(2, 2, 1\)"),
    (np.ones((2, 3)), ValueError, r"has (rows of 3 but params of 2|shape \(2, 3\): expected \(2, 2\))"),
    (np.ones((2, 2), np.float32), TypeError, r"has dtype float32 but (params|table) has float64"),
    (np.ones((2, 2), int), TypeError, r"has dtype int64"),
    (np.ones((2, 4))[:, ::2], ValueError, "has strides .* expected a C-contiguous array"),
    ([[1.0, 1.0], [1.0, 1.0]], TypeError, "is a list"),
    (None, TypeError, "is a NoneType"),
]


@pytest.mark.parametrize(("output", "error", "message"), OUTPUTS, ids=[m for *_, m in OUTPUTS])
def test_gradients_of_outputs_that_do_not_fit_are_refused(output, error, message):
    table = np.ones((5, 2))
    opt = fastopt.Adam(table)
    gradient = fastopt.BagGradient(**GIVEN, grad_output=output)
    refused(lambda: opt.step(gradient), table, error, rf"grads\.grad_output {message}", opt)
    refused(lambda: gradient.per_sample_weights_grad(table), table, error, f"grad_output {message}")


def test_gradients_of_outputs_in_the_memory_of_a_parameter_are_refused():
    params = [np.ones((5, 2)), np.ones((4, 2))]
    opt = fastopt.SGD(params, lr=1.0)
    for output in (params[0][1:3], params[1][:2]):
        grads = [fastopt.BagGradient(**GIVEN, grad_output=output), None]
        with pytest.raises(ValueError, match=r"shares memory with .*a copy of the gradient") as caught:
            opt.step(grads)
        assert "grads[0].grad_output" in str(caught.value)
    assert all((p == 1).all() for p in params)


def test_parameters_that_are_no_tables_are_refused():
    for shape in ((5,), (5, 2, 1)):
        p = np.ones(shape)
        gradient = fastopt.BagGradient(**GIVEN, grad_output=np.ones((2, 2)))
        message = rf"grads is a BagGradient but params has shape \({shape[0]}.*expected a 2-D parameter"
        refused(lambda p=p, g=gradient: fastopt.SGD(p).step(g), p, ValueError, message)
        message = r"table has shape .*: expected \(rows, dim\)"
        refused(lambda p=p: fastopt.embedding_bag(p, **GIVEN), p, ValueError, message)
        refused(lambda p=p, g=gradient: g.per_sample_weights_grad(p), p, ValueError, message)


def test_a_maximum_has_no_gradient_of_weights():
    gradient = fastopt.BagGradient(**{**GIVEN, "mode": "max"}, grad_output=np.ones((2, 2)))
    with pytest.raises(ValueError, match="mode is 'max', which takes no per_sample_weights: expected 'sum'"):
        gradient.per_sample_weights_grad(np.ones((5, 2)))


def test_a_bad_gradient_in_a_list_is_named_and_changes_no_other():
    params = {"a": np.ones(3), "t": np.ones((5, 2))}
    opt = fastopt.SGD(params, lr=1.0)
    gradient = fastopt.BagGradient(FIVE, np.array([0, 9]), np.ones((2, 2)), mode="sum")
    with pytest.raises(ValueError, match=r"^grads\['t'\]\.offsets has 9 before 5"):
        opt.step({"a": np.ones(3), "t": gradient})
    assert (params["a"] == 1).all() and (params["t"] == 1).all()


@pytest.mark.parametrize("dtype", [np.float32, "bfloat16"])
@pytest.mark.parametrize("offsets", [None, np.array([0])])
def test_the_mode_of_pooling_is_always_given(dtype, offsets):
    """torch's function takes the mean by default and FBGEMM's the sum: neither is chosen silently."""
    table = np.ones((4, 2), ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    indices = np.array([[0, 1]]) if offsets is None else np.array([0, 1])
    plan = fastopt.IndexPlan(indices, 4)
    for where in (indices, plan):
        with pytest.raises(TypeError, match=r"embedding_bag.*'mode'"):
            fastopt.embedding_bag(table, where, offsets)
        with pytest.raises(TypeError, match="'mode'"):
            fastopt.BagGradient(where, offsets, np.ones((1, 2), np.float32))
        with pytest.raises(ValueError, match="mode is None: expected 'sum', 'mean' or 'max'"):
            fastopt.embedding_bag(table, where, offsets, mode=None)
