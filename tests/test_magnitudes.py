"""Numbers whose squares are too large or too small for their type: norms are right all the same, and where a
rule keeps squares these are infinite, and the parameter stays a number, as with torch."""

import math
import os

import ml_dtypes
import numpy as np
import pytest
import torch

import fastopt

F32, F64 = np.float32, np.float64
ROOT = math.sqrt(0.5)


def gradient(kind, values):
    """The rows ``values`` as a gradient of a table, of one of the kinds."""
    if kind == "dense":
        return values
    rows = np.arange(len(values))
    if kind == "slices":
        return fastopt.IndexedSlices(rows, values)
    return fastopt.BagGradient(rows, rows, values, mode="sum")


# Norms


@pytest.mark.parametrize("kind", ["dense", "slices", "bags"])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(F64, 1e154), (F64, 1e160), (F64, 1e300), (F64, 1.7e308), (F32, 1e20), (F32, 3e37)],
    ids=str,
)
def test_rows_of_any_size_are_clipped_to_their_norm(kind, dtype, size):
    rows = np.array([[size, size], [-size, 0], [0.5, 0]], dtype)
    p = np.zeros((3, 2), dtype)
    fastopt.SGD(p, lr=1.0, clip_row_norm=1.0).step(gradient(kind, rows))
    np.testing.assert_allclose(p, [[-ROOT, -ROOT], [1, 0], [-0.5, 0]], rtol=1e-5)


def test_many_elements_of_any_size_are_clipped_to_their_norm():
    p = np.zeros((1, 1000))
    fastopt.SGD(p, lr=1.0, clip_row_norm=2.0).step(np.full((1, 1000), 1.7e308))
    np.testing.assert_allclose(p, -2 / math.sqrt(1000), rtol=1e-12)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_rows_that_are_not_finite_become_nan(dtype, bad):
    p = np.zeros((2, 2), dtype)
    fastopt.SGD(p, lr=1.0, clip_row_norm=1.0).step(np.array([[bad, 1], [1, 0]], dtype))
    np.testing.assert_allclose(p, [[np.nan, 0 if bad == np.inf else np.nan], [-1, 0]], rtol=1e-5)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("part", [0.25, 0.9])
def test_rows_of_any_size_are_scaled_to_max_norm(dtype, part):
    info = np.finfo(dtype)
    for size in (info.max / 4, math.sqrt(info.max) * 3, 1.0, 1e-30, math.sqrt(info.tiny) / 16):
        table = np.full((1, 4), size, dtype)
        fastopt.embedding(table, np.array([0]), max_norm=float(size) * 2 * part)
        # torch's 1e-7 is added to the norm
        want = size * part * (2 * size / (2 * size + 1e-7))
        np.testing.assert_allclose(table, want, rtol=1e-5, atol=info.tiny)


def test_max_norm_leaves_rows_within_it_alone():
    for size in (1e300, 1e160, 1e-170):
        table = np.full((1, 4), size)
        fastopt.embedding(table, np.array([0]), max_norm=2.001 * size)
        np.testing.assert_array_equal(table, size)


SIZES = [1e-300, 1e-170, 1e-150, 1e150, 1e160, 1e300]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dim", [3, 200])
@pytest.mark.parametrize("kind", ["dense", "slices"])
def test_lamb_moves_a_layer_in_proportion_to_its_norm(kind, dim, size):
    p = np.full((1, dim), size)
    opt = fastopt.LAMB(p, lr=0.1, eps=0.0, weight_decay=0.0)
    opt.step(gradient(kind, np.ones((1, dim))))
    np.testing.assert_allclose(p, size * 0.9, rtol=1e-12)


@pytest.mark.parametrize("kind", ["dense", "slices"])
def test_lamb_takes_directions_of_any_size(kind):
    """With weight decay the direction is of the size of the parameter."""
    for size in (1e160, 1e300):
        p = np.full((2, 5), size)
        fastopt.LAMB(p, lr=0.1, weight_decay=0.5).step(gradient(kind, np.ones((2, 5))))
        np.testing.assert_allclose(p, size * 0.9, rtol=1e-12)


def test_lamb_finds_the_ratio_of_each_layer_whatever_the_size_of_others():
    params = [np.full(9_000, size) for size in (1e160, 1.0, 1e-170, 0.0)]
    fastopt.LAMB(params, lr=0.1, eps=0.0, weight_decay=0.0).step([np.ones(9_000) for _ in params])
    for p, want in zip(params, (0.9e160, 0.9, 0.9e-170, -0.1), strict=True):
        np.testing.assert_allclose(p, want, rtol=1e-12)


@pytest.mark.parametrize("shape", [(6,), (3, 2), (40, 600)], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_adafactor_moves_in_proportion_to_the_root_mean_square(shape, size):
    p = np.full(shape, size)
    fastopt.Adafactor(p, lr=0.1, eps=(None, 0.0)).step(np.ones(shape))
    np.testing.assert_allclose(p, size * 0.9, rtol=1e-12)


@pytest.mark.parametrize("name", ["RowwiseAdaGrad", "RowwiseAdam"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_mean_of_squares_is_finite_where_it_fits(name, dtype):
    """The sum of the squares is infinite."""
    size = dtype(math.sqrt(np.finfo(dtype).max) * 0.9)
    p = np.zeros((2, 64), dtype)
    opt = getattr(fastopt, name)(p, lr=1.0)
    opt.step(np.full((2, 64), size))
    np.testing.assert_allclose(p, -1.0, rtol=1e-5)
    share = 1.0 if name == "RowwiseAdaGrad" else 1e-3
    found = next(s["sum" if share == 1.0 else "exp_avg_sq"] for s in opt.state_dict()["state"].values())
    np.testing.assert_allclose(np.asarray(found) / size / size, share, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "slices", "bags"])
@pytest.mark.parametrize("size", [5e-324, 1e-310, *SIZES])
def test_norms_of_gradients_of_any_size(kind, size):
    values = np.array([[3 * size, 0], [0, 4 * size]])
    assert fastopt.grad_norm(gradient(kind, values)) == pytest.approx(5 * size, rel=1e-13, abs=0)
    values = np.array([[size, size], [0, -size]])
    fastopt.clip_grad_norm(gradient(kind, values), 2.0)
    if size > 1:
        np.testing.assert_allclose(values * math.sqrt(3), [[2, 2], [0, -2]], rtol=1e-12)


# Squares that rules keep

TORCH = torch.optim
RULES = {
    "adam": (fastopt.Adam, TORCH.Adam, {}),
    "adamw": (fastopt.AdamW, TORCH.AdamW, {"weight_decay": 0.0}),
    "amsgrad": (fastopt.AMSGrad, lambda p, **o: TORCH.Adam(p, amsgrad=True, **o), {}),
    "nadam": (fastopt.NAdam, TORCH.NAdam, {}),
    "radam": (fastopt.RAdam, TORCH.RAdam, {"betas": (0.8, 0.9)}),
    "adagrad": (fastopt.AdaGrad, TORCH.Adagrad, {"lr": 0.01}),
    "rmsprop": (fastopt.RMSProp, TORCH.RMSprop, {"lr": 0.01}),
    "rmsprop_momentum": (fastopt.RMSProp, TORCH.RMSprop, {"lr": 0.01, "momentum": 0.9}),
    "centered": (fastopt.RMSProp, TORCH.RMSprop, {"lr": 0.01, "centered": True}),
    "centered_momentum": (
        fastopt.RMSProp,
        TORCH.RMSprop,
        {"lr": 0.01, "centered": True, "momentum": 0.9},
    ),
}


def gradients_of(dtype):
    """From ordinary ones to the largest, infinity and NaN."""
    most = np.finfo(dtype).max
    large = [1.0, most**0.5 * 3, most**0.75, most * 0.011, most * 0.1, most * 0.4, most * 0.9, -most * 0.9]
    return np.array([*large, np.inf, np.nan], dtype)


@pytest.mark.parametrize("later", ["same", "opposite", "ordinary"])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", RULES)
def test_parameters_are_finite_where_those_of_torch_are(name, dtype, later):
    ours, theirs, options = RULES[name]
    first = gradients_of(dtype)
    p = np.ones(first.size, dtype)
    q = torch.ones(first.size, dtype=torch.float32 if dtype is F32 else torch.float64, requires_grad=True)
    opt, twin = ours(p, **options), theirs([q], **options)
    for step in range(30):
        g = first if step == 0 or later == "same" else np.sign(first) if later == "ordinary" else first
        g = g * dtype(-1) if later == "opposite" and step % 2 else g.copy()
        opt.step(g)
        q.grad = torch.tensor(g)
        twin.step()
        np.testing.assert_array_equal(np.isnan(p), np.isnan(q.detach().numpy()))
        np.testing.assert_array_equal(np.isinf(p), np.isinf(q.detach().numpy()))


WITHOUT_TORCH = {
    "lamb": (fastopt.LAMB, {"weight_decay": 0.0}),
    "lion": (fastopt.Lion, {}),
    "rowwise_adagrad": (fastopt.RowwiseAdaGrad, {}),
    "rowwise_adam": (fastopt.RowwiseAdam, {}),
}


@pytest.mark.parametrize("kind", ["dense", "slices"])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_infinite_squares_move_nothing(name, dtype, kind):
    make, options = WITHOUT_TORCH[name]
    size = np.finfo(dtype).max * 0.4
    p = np.ones((1, 3), dtype)
    opt = make(p, lr=0.5, **options)
    for step in range(12):
        opt.step(gradient(kind, np.full((1, 3), size, dtype)))
        want = 1 - 0.5 * (step + 1) if name == "lion" else 1.0
        np.testing.assert_array_equal(p, want)


KEPT = 1 << 10  # steps, that a history has room for here
# In float64 too, for which each rule's kernels are compiled apart: by element, and by sums over rows.
IN_BOTH = "adam", "adamw", "rowwise_adam", "rowwise_adagrad"
CATCHING_UP = [
    (name, dtype)
    for name in (*RULES, "rowwise_adam", "rowwise_adagrad")
    for dtype in (F32, F64)
    if dtype is F32 or name in IN_BOTH or os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
]


@pytest.mark.parametrize("missed", [1, 7, 150, 2 * KEPT + 7])
@pytest.mark.parametrize(("name", "dtype"), CATCHING_UP)
def test_rows_with_infinite_squares_catch_up_with_dense_steps(name, dtype, missed, monkeypatch):
    monkeypatch.setattr("fastopt.kernels.cpu.backend.history.History.MOST_STEPS", KEPT)
    make, options = WITHOUT_TORCH[name] if name in WITHOUT_TORCH else (RULES[name][0], RULES[name][2])
    size = np.finfo(dtype).max ** 0.75
    p = np.ones((2, 3), dtype)
    opt = make(p, rows="dense", **options)
    grad = fastopt.IndexedSlices(np.array([0, 1]), np.array([[size] * 3, [1] * 3], dtype))
    other = fastopt.IndexedSlices(np.array([1]), np.zeros((1, 3), dtype))
    opt.step(grad)
    after = p.copy()
    for _ in range(missed):
        opt.step(other)
    opt.step(grad)
    opt.flush()
    assert np.isfinite(p).all()
    squares = opt.state_dict()["state"][0].get("exp_avg_sq", opt.state_dict()["state"][0].get("square_avg"))
    if squares is not None:
        assert np.isinf(np.asarray(squares)[0]).all()
        if name not in ("radam", "rmsprop_momentum", "centered_momentum"):
            np.testing.assert_array_equal(p[0], after[0])


@pytest.mark.parametrize(
    ("name", "kept"),
    [("nadam", "bfloat16"), ("adam", "bfloat16"), ("nadam", "master"), ("centered", "master")],
)
def test_other_formats_of_state_keep_parameters_finite(name, kept):
    make, _, options = RULES[name]
    size = float(np.finfo(F32).max) * 0.4
    p = np.ones(300, F32) if kept == "bfloat16" else np.ones(300, ml_dtypes.bfloat16)
    more = {"state_dtype": "bfloat16"} if kept == "bfloat16" else {"master_weights": True}
    opt = make(p, **options, **more)
    for _ in range(12):
        opt.step(np.full(300, size, F32))
        np.testing.assert_array_equal(p.astype(F32), 1)
