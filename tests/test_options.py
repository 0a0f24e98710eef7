"""Options given as NumPy scalars, arrays and tensors: the numbers that they hold when a step is made."""

import math

import ml_dtypes
import numpy as np
import pytest

import fastopt

torch = pytest.importorskip("torch")

G = np.array([1.0, -2.0, 0.5])
HOLDERS = {
    "array": np.array,
    "one element": lambda x: np.array([x]),
    "float32 array": lambda x: np.array(x, np.float32),
    "bfloat16 array": lambda x: np.array(x, ml_dtypes.bfloat16),
    "tensor": lambda x: torch.tensor(x, dtype=torch.float64),
    "float32 tensor": torch.tensor,
    "one-element tensor": lambda x: torch.tensor([x]),
    "tensor with a graph": lambda x: torch.tensor(x, requires_grad=True) * 1.0,
    "parameter": lambda x: torch.nn.Parameter(torch.tensor(x)),
}
SCALARS = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


def trained(lrs, **options):
    """Parameters after a step at each of the learning rates, given as numbers."""
    p = np.ones(3)
    opt = fastopt.Adam(p, **options)
    for lr in lrs:
        opt.param_groups[0]["lr"] = lr
        opt.step(G)
    return p


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_a_learning_rate_in_an_array_is_read_at_each_step(hold):
    lr = hold(0.25)
    inside = lr.detach() if isinstance(lr, torch.Tensor) else lr
    p = np.ones(3)
    opt = fastopt.Adam(p, lr=lr)
    for number in (0.25, 0.25, 0.5, 0.125):
        inside[...] = number
        opt.step(G)
    np.testing.assert_array_equal(p, trained([0.25, 0.25, 0.5, 0.125]))


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_a_learning_rate_in_an_array_serves_all_groups_and_can_be_assigned_later(hold):
    lr = hold(0.25)
    inside = lr.detach() if isinstance(lr, torch.Tensor) else lr
    a, b, c = np.ones(3), np.ones(3), np.ones(3)
    opt = fastopt.Adam([{"params": a}, {"params": b}, {"params": c, "lr": 0.0625}], lr=lr)
    opt.step([G, G, G])
    inside[...] = 0.5
    opt.param_groups[2]["lr"] = lr
    opt.step([G, G, G])
    inside[...] = 0.125
    opt.step([G, G, G])
    np.testing.assert_array_equal(a, trained([0.25, 0.5, 0.125]))
    np.testing.assert_array_equal(b, a)
    np.testing.assert_array_equal(c, trained([0.0625, 0.5, 0.125]))


@pytest.mark.parametrize("scalar", SCALARS.values(), ids=SCALARS)
def test_a_scalar_of_few_bits_is_the_number_that_it_holds(scalar):
    """It equals, as NumPy compares, the number that it was rounded from."""
    p = np.ones(3)
    opt = fastopt.Adam(p, lr=0.1)
    opt.step(G)
    opt.param_groups[0]["lr"] = scalar(0.1)
    opt.step(G)
    np.testing.assert_array_equal(p, trained([0.1, float(scalar(0.1))]))


@pytest.mark.parametrize("rows", ["lazy", "dense"])
def test_a_learning_rate_in_an_array_serves_sparse_steps(rows):
    lr, tables = torch.tensor(0.5), [np.ones((4, 2)), np.ones((4, 2))]
    opts = [fastopt.SGD(t, lr=r, momentum=0.5, rows=rows) for t, r in zip(tables, (lr, 0.5), strict=True)]
    for number, row in ((0.5, 1), (0.25, 2), (0.125, 2)):
        lr.fill_(number)
        opts[1].param_groups[0]["lr"] = number
        for opt in opts:
            opt.step(fastopt.IndexedSlices(np.array([row]), np.ones((1, 2))))
    for opt in opts:
        opt.flush()
    np.testing.assert_array_equal(*tables)


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, -math.inf])
def test_a_learning_rate_in_an_array_is_checked_at_each_step(hold, bad):
    with pytest.raises(ValueError, match=r"(?s)lr of params is .*: expected a finite number, at least 0"):
        fastopt.Adam(np.ones(3), lr=hold(bad))
    lr, p = hold(0.25), np.ones(3)
    opt = fastopt.Adam(p, lr=lr)
    opt.step(G)
    before = p.copy()
    (lr.detach() if isinstance(lr, torch.Tensor) else lr)[...] = bad
    with pytest.raises(ValueError, match=r"(?s)lr of params is .*: expected a finite number, at least 0"):
        opt.step(G)
    np.testing.assert_array_equal(p, before)
    assert opt.steps == 1


@pytest.mark.parametrize(
    "bad",
    [
        np.array([0.1, 0.1]),
        torch.tensor([0.1, 0.1]),
        np.zeros(0),
        np.array(True),
        np.array(1j),
        np.array("0.1"),
        np.ma.masked_array(0.1, mask=True),
        torch.tensor(True),
    ],
    ids=repr,
)
def test_what_holds_no_single_number_is_refused(bad):
    with pytest.raises(TypeError, match=r"lr of params is "):
        fastopt.SGD(np.ones(3), lr=bad)
    p = np.ones(3)
    opt = fastopt.SGD(p, lr=0.1)
    opt.step(G)
    before = p.copy()
    opt.param_groups[0]["lr"] = bad
    with pytest.raises(TypeError, match=r"lr of params is "):
        opt.step(G)
    np.testing.assert_array_equal(p, before)


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_the_state_holds_the_number_of_a_learning_rate_in_an_array(hold, tmp_path):
    lr = hold(0.25)
    opt = fastopt.Adam(np.ones(3), lr=lr, betas=(hold(0.5), 0.75), weight_decay=hold(0.5))
    (lr.detach() if isinstance(lr, torch.Tensor) else lr)[...] = 0.5
    state = opt.state_dict()
    [options] = state["param_groups"]
    assert options["lr"] == 0.5 and type(options["lr"]) is float
    assert options["betas"] == (0.5, 0.75) and type(options["betas"][0]) is float
    assert type(options["weight_decay"]) is float
    opt.save(tmp_path / "opt.safetensors")
    for restore in (
        lambda other: other.load_state_dict(state),
        lambda other: other.load(tmp_path / "opt.safetensors"),
    ):
        other = fastopt.Adam(np.ones(3))
        restore(other)
        assert other.param_groups[0]["lr"] == 0.5
        assert other.param_groups[0]["betas"] == (0.5, 0.75)


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize("name", ["weight_decay", "eps", "momentum", "alpha", "clip_row_norm"])
def test_other_numbers_in_arrays_are_read_at_each_step(hold, name):
    shape = (3, 2)
    results = []
    for give in (hold, float):
        p, rng = np.ones(shape), np.random.default_rng(0)
        opt = fastopt.RMSProp(p, **{"lr": 0.5, "momentum": 0.5, name: give(0.25)})
        for number in (0.25, 0.125, 0.5):
            value = opt.param_groups[0][name]
            if isinstance(value, float):
                opt.param_groups[0][name] = number
            else:
                (value.detach() if isinstance(value, torch.Tensor) else value)[...] = number
            opt.step(rng.standard_normal(shape))
        results.append(p)
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(
    "betas",
    [
        [0.5, 0.75],
        np.array([0.5, 0.75]),
        torch.tensor([0.5, 0.75]),
        (torch.tensor(0.5), np.float32(0.75)),
        [np.array([0.5]), 0.75],
    ],
    ids=repr,
)
def test_betas_of_any_kind(betas):
    p, twin = np.ones(3), np.ones(3)
    opts = fastopt.Adam(p, betas=betas), fastopt.Adam(twin, betas=(0.5, 0.75))
    for _ in range(2):
        for opt in opts:
            opt.step(G)
    np.testing.assert_array_equal(p, twin)
    if not isinstance(betas, tuple):
        betas[1] = 0.25
        opts[1].param_groups[0]["betas"] = (0.5, 0.25)
        for opt in opts:
            opt.step(G)
        np.testing.assert_array_equal(p, twin)


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_limits_and_scales_in_arrays(hold):
    results = []
    for give in (hold, float):
        p, g = np.ones(3), G.copy()
        fastopt.SGD(p, lr=0.5).step(g, clip_norm=give(0.5), clip_value=give(0.125), grad_scale=give(0.25))
        fastopt.clip_grad_norm(g, give(0.5))
        fastopt.clip_grad_value(g, give(0.25))
        table = np.ones((2, 2))
        fastopt.embedding(table, np.array([1]), max_norm=give(0.5))
        results.append(np.concatenate([p, g, table.reshape(-1)]))
    np.testing.assert_array_equal(*results)


def test_flags_and_whole_numbers_of_numpy():
    p, twin = np.ones(3), np.ones(3)
    opt = fastopt.Adam(p, amsgrad=np.True_, maximize=np.False_, seed=np.int64(3))
    other = fastopt.Adam(twin, amsgrad=True, maximize=False, seed=3)
    assert opt.step(G * math.nan, skip_nonfinite=np.True_, zero_grads=np.False_).skipped
    for each in (opt, other):
        each.step(G.copy(), zero_grads=True)
    np.testing.assert_array_equal(p, twin)
    assert [type(opt.state_dict()["param_groups"][0][name]) for name in ("amsgrad", "seed")] == [bool, int]
    with pytest.raises(ValueError, match=r"seed of params is .*1\.5.*: expected a whole number"):
        fastopt.Adam(np.ones(3), seed=np.float64(1.5))
    with pytest.raises(TypeError, match=r"amsgrad of params is 1: expected True or False"):
        fastopt.Adam(np.ones(3), amsgrad=1)


@pytest.mark.parametrize("scale", [np.float32(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor([0.5])])
def test_schedules_are_multiplied_by_numbers_in_arrays(scale):
    for schedule in (scale * fastopt.schedules.constant(), fastopt.schedules.constant() * scale):
        assert type(schedule) is fastopt.schedules.constant and schedule(3) == 0.5
        assert type(schedule(3)) is float


def test_a_function_may_return_a_number_in_an_array():
    results = []
    for give in (torch.tensor, np.float32, float):
        p = np.ones(3)
        fastopt.SGD(p, lr=lambda step, give=give: give(0.5)).step(G)
        results.append(p)
    for got in results:
        np.testing.assert_array_equal(got, results[-1])
    with pytest.raises(ValueError, match="lr of params, at step 0, is tensor"):
        fastopt.SGD(np.ones(3), lr=lambda step: torch.tensor(-1.0)).step(G)
