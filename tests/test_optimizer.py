"""The optimizer around the rules: parameters, groups, state, files."""

import copy
import os
import pickle

import cases
import numpy as np
import pytest

import fastopt

RULES = pytest.mark.parametrize("case", cases.RULES, ids=str)


def steps(opt, params, seed, count=3):
    """Dense and sparse steps."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        dense = cases.gradient(rng, params[0].shape, np.float32)
        values = cases.gradient(rng, (8, 2), np.float32)
        opt.step([dense, fastopt.IndexedSlices(rng.integers(0, 5, 8), values)])


def some_params(seed=31):
    rng = np.random.default_rng(seed)
    return [cases.parameter(rng, 4, np.float32), cases.parameter(rng, (5, 2), np.float32)]


def some_options(case):
    return case.options(np.random.default_rng(32), weight_decay=False)


def assert_same(opt, params, twin, twin_params):
    for p, q in zip(params, twin_params, strict=True):
        assert p.tobytes() == q.tobytes()
    state, twin_state = opt.state_dict(), twin.state_dict()
    assert state["steps"] == twin_state["steps"]
    assert list(state["state"]) == list(twin_state["state"])
    for key, slots in state["state"].items():
        assert list(slots) == list(twin_state["state"][key])
        for slot, array in slots.items():
            np.testing.assert_array_equal(array, twin_state["state"][key][slot], strict=True)


# Parameters and groups


@pytest.mark.parametrize(
    ("wrap", "grads"),
    [
        (lambda a, b: [a, b], lambda g, h: [g, h]),
        (lambda a, b: (a, b), lambda g, h: (g, h)),
        (lambda a, b: (p for p in (a, b)), lambda g, h: [g, h]),
        (lambda a, b: {"a": a, "b": b}, lambda g, h: {"b": h, "a": g}),
        (lambda a, b: {"a": a, "b": b}.values(), lambda g, h: [g, h]),
        (lambda a, b: [{"params": a}, {"params": b}], lambda g, h: [g, h]),
        (lambda a, b: ({"params": [a]}, {"params": iter([b])}), lambda g, h: ([g], [h])),
        (lambda a, b: [{"params": [a, b]}], lambda g, h: [{"params": [g, h]}]),
        (lambda a, b: [{"params": {"a": a, "b": b}}], lambda g, h: [{"a": g, "b": h}]),
        (lambda a, b: [{"params": a}, {"params": {"b": b}}], lambda g, h: [g, {"b": h}]),
        (lambda a, b: iter([{"params": a}, {"params": b}]), lambda g, h: [{"params": g}, {"params": h}]),
    ],
)
def test_parameters_come_in_many_structures_and_gradients_in_the_same(wrap, grads):
    a, b = np.zeros(2), np.zeros((2, 2))
    opt = fastopt.SGD(wrap(a, b), lr=1.0)
    opt.step(grads(np.full(2, 1.0), np.full((2, 2), 2.0)))
    np.testing.assert_array_equal(a, -1.0)
    np.testing.assert_array_equal(b, -2.0)
    assert len(opt.state_dict()["state"]) == 2


def test_one_array_takes_one_gradient():
    p = np.zeros((2, 2))
    opt = fastopt.SGD(p, lr=1.0)
    opt.step(np.ones((2, 2)))
    opt.step(fastopt.IndexedSlices(np.array([1]), np.ones((1, 2))))
    opt.step(None)
    np.testing.assert_array_equal(p, [[-1, -1], [-2, -2]])
    assert opt.steps == 3
    assert opt.state_dict()["state"][0]["step"] == 2


def test_a_gradient_may_be_none():
    a, b = np.zeros(2), np.zeros(2)
    opt = fastopt.Adam({"a": a, "b": b})
    opt.step({"a": np.ones(2), "b": None})
    state = opt.state_dict()["state"]
    assert state["a"]["step"] == 1
    assert state["b"] == {"step": 0}
    assert b.tobytes() == bytes(16)


def test_groups_have_options_and_schedules_of_their_own():
    a, b, c = np.zeros(1), np.zeros(1), np.ones(1)
    opt = fastopt.SGD(
        [
            {"params": a, "lr": 1.0 * fastopt.schedules.exponential(0.5)},
            {"params": b},
            {"params": [c], "weight_decay": 0.5, "lr": 1.0, "maximize": True},
        ],
        lr=0.25,
    )
    for _ in range(3):
        opt.step([np.ones(1), np.ones(1), [np.zeros(1)]])
    assert (a[0], b[0], c[0]) == (-1.75, -0.75, 0.125)
    assert [group["lr"] for group in opt.param_groups[1:]] == [0.25, 1.0]


def test_groups_may_have_different_rules():
    a, b = np.zeros(1), np.zeros(1)
    opt = fastopt.SGD([{"params": a, "momentum": 0.5}, {"params": b}], lr=1.0)
    for _ in range(2):
        opt.step([np.ones(1), np.ones(1)])
    assert (a[0], b[0]) == (-2.5, -2)
    assert set(opt.state_dict()["state"][0]) == {"step", "momentum_buffer"}
    assert set(opt.state_dict()["state"][1]) == {"step"}


def test_options_may_change_between_steps():
    p = np.ones(1)
    opt = fastopt.SGD(p, lr=1.0)
    opt.step(np.ones(1))
    opt.param_groups[0]["lr"] = 0.25
    opt.step(np.ones(1))
    assert p[0] == -0.25
    opt.param_groups[0].update(maximize=True, lr=lambda step: step)
    opt.step(np.ones(1))
    assert p[0] == 1.75
    opt.param_groups[0].update(maximize=False, lr=1.0, weight_decay=1.0)
    opt.step(np.zeros(1))
    assert p[0] == 0


def test_numpy_numbers_serve_as_hyperparameters(tmp_path):
    p = np.zeros(1, np.float32)
    opt = fastopt.Adam(p, lr=np.float32(0.5), betas=(np.float32(0.5), np.float64(0.75)), eps=np.float64(0))
    opt.step(np.ones(1, np.float32))
    assert p[0] == -0.5
    opt.save(tmp_path / "saved")
    twin = fastopt.Adam(p)
    twin.load(tmp_path / "saved")
    assert twin.param_groups[0]["betas"] == (0.5, 0.75)


def test_the_repr_names_sizes_and_options_of_each_group():
    opt = fastopt.SGD([np.ones((1_000, 3)), np.ones(5)], lr=0.5)
    assert repr(opt) == (
        "SGD(2 arrays, 3,005 parameters: lr=0.5, momentum=0.0, dampening=0.0, weight_decay=0.0, "
        "nesterov=False, maximize=False)"
    )
    lr = 0.1 * fastopt.schedules.cosine(9)
    opt = fastopt.RMSProp([{"params": np.ones(())}, {"params": np.ones(2), "lr": lr}])
    common = "alpha=0.99, eps=1e-08, weight_decay=0.0, momentum=0.0, centered=False, maximize=False"
    assert repr(opt) == (
        f"RMSProp(\n  1 array, 1 parameters: lr=0.01, {common}\n"
        f"  1 array, 2 parameters: lr=0.1 * cosine(total=9, final=0.0), {common}\n)"
    )


# Steps


@pytest.mark.parametrize("scale", [1 / 1024, 3.0])
def test_grad_scale_multiplies_gradients_before_weight_decay(scale):
    p, twin = np.ones(3), np.ones(3)
    opt = fastopt.SGD(p, lr=0.5, weight_decay=0.25)
    opt_twin = fastopt.SGD(twin, lr=0.5, weight_decay=0.25)
    g = np.array([1.0, -2.0, 8.0])
    opt.step(g, grad_scale=scale)
    opt_twin.step(g * scale)
    np.testing.assert_allclose(p, twin, rtol=1e-15)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sparse", [False, True])
def test_skip_nonfinite_leaves_everything_untouched(bad, sparse):
    a, b = np.ones(3), np.ones((2, 2))
    opt = fastopt.Adam([a, b])
    opt.step([np.ones(3), np.ones((2, 2))])
    before = a.tobytes(), b.tobytes(), pickle.dumps(opt.state_dict())
    values = np.array([[1.0, bad]])
    grad = fastopt.IndexedSlices(np.array([1]), values) if sparse else np.repeat(values, 2, 0)
    info = opt.step([np.ones(3), grad], skip_nonfinite=True)
    assert info.skipped
    assert not info.clipped
    assert not np.isfinite(info.norm)
    assert (a.tobytes(), b.tobytes(), pickle.dumps(opt.state_dict())) == before
    info = opt.step([np.ones(3), None], skip_nonfinite=True)
    assert info == fastopt.StepInfo(pytest.approx(3**0.5), False, False)
    assert opt.steps == 2


def test_a_gradient_that_is_huge_but_finite_is_not_skipped():
    p = np.zeros(4)
    info = fastopt.SGD(p, lr=1e-300).step(np.full(4, 1e300), skip_nonfinite=True)
    assert not info.skipped
    np.testing.assert_allclose(p, -1.0)


# State


@RULES
def test_a_restored_state_continues_bit_for_bit(case):
    params, options = some_params(), some_options(case)
    opt = case.make(params, options)
    steps(opt, params, 1)
    state = opt.state_dict()
    twin_params = [p.copy() for p in params]
    twin = case.make(
        twin_params, {"lr": 0.5, **case.fixed, **{k: v for k, v in options.items() if k == "momentum"}}
    )
    twin.load_state_dict(state)
    for opt_one, own in ((opt, params), (twin, twin_params)):
        steps(opt_one, own, 2)
    assert_same(opt, params, twin, twin_params)
    assert twin.state_dict()["param_groups"] == opt.state_dict()["param_groups"]


def test_a_state_dict_is_a_copy_in_both_directions():
    p = np.ones(3)
    opt = fastopt.Adam(p)
    opt.step(np.ones(3))
    state = opt.state_dict()
    state["state"][0]["exp_avg"][:] = 7
    state["param_groups"][0]["lr"] = 7
    assert opt.state_dict()["state"][0]["exp_avg"][0] != 7
    assert opt.param_groups[0]["lr"] != 7
    opt.load_state_dict(state)
    state["state"][0]["exp_avg"][:] = 8
    assert opt.state_dict()["state"][0]["exp_avg"][0] == 7
    assert opt.param_groups[0]["lr"] == 7


def test_a_state_dict_has_names_steps_slots_and_options():
    opt = fastopt.Adam([{"params": {"w": np.ones((2, 2))}}, {"params": np.ones(1), "lr": 0.5}])
    opt.step([{"w": np.ones((2, 2))}, None])
    state = opt.state_dict()
    assert set(state) == {"optimizer", "steps", "state", "param_groups"}
    assert (state["optimizer"], state["steps"]) == ("Adam", 1)
    assert list(state["state"]) == ["w", 1]
    assert set(state["state"]["w"]) == {"step", "exp_avg", "exp_avg_sq"}
    assert state["state"][1] == {"step": 0}
    assert [group["params"] for group in state["param_groups"]] == [["w"], [1]]
    assert [group["lr"] for group in state["param_groups"]] == [0.001, 0.5]


def test_a_state_from_before_the_first_step_is_restored():
    p = np.ones(2)
    opt = fastopt.Adam(p)
    state = opt.state_dict()
    opt.step(np.ones(2))
    opt.load_state_dict(state)
    assert opt.state_dict() == state
    opt.step(np.ones(2))
    assert opt.steps == 1


def test_the_initial_accumulator_fills_the_state_at_the_first_gradient():
    p, table = np.zeros(2), np.zeros((3, 2))
    opt = fastopt.RowwiseAdaGrad([p, table], initial_accumulator_value=0.5)
    opt.step([None, fastopt.IndexedSlices(np.array([1]), np.full((1, 2), 2.0))])
    state = opt.state_dict()["state"]
    assert state[0] == {"step": 0}
    np.testing.assert_array_equal(state[1]["sum"], [0.5, 4.5, 0.5])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
@RULES
def test_a_copied_optimizer_goes_on_alone_with_the_same_bits(case, duplicate):
    params = some_params()
    opt = case.make(params, some_options(case))
    steps(opt, params, 1)
    twin = duplicate(opt)
    twin_params = twin.param_groups[0]["params"]
    before = [p.copy() for p in params]
    steps(twin, twin_params, 2)
    for p, old in zip(params, before, strict=True):
        assert p.tobytes() == old.tobytes()
    steps(opt, params, 2)
    assert_same(opt, params, twin, twin_params)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_a_copied_optimizer_takes_changed_options_and_states(duplicate):
    p = np.ones(2)
    opt = fastopt.Adam(p, lr=0.5 * fastopt.schedules.cosine(10))
    opt.step(np.ones(2))
    twin = duplicate(opt)
    twin.load_state_dict(opt.state_dict())
    twin.param_groups[0]["lr"] = 0.25
    twin.step(np.ones(2))
    assert twin.steps == 2


# Files


@RULES
def test_a_loaded_file_continues_bit_for_bit(case, tmp_path):
    params, options = some_params(), some_options(case)
    opt = case.make(params, options)
    steps(opt, params, 1)
    opt.save(tmp_path / "saved", params=True, metadata={"epoch": 3, "note": ["é", None]})
    twin_params = [np.zeros_like(p) for p in params]
    own = [*twin_params]
    twin = case.make(twin_params, options)
    assert twin.load(tmp_path / "saved", params=True) == {"epoch": 3, "note": ["é", None]}
    assert all(a is b for a, b in zip(twin_params, own, strict=True))
    for opt_one, mine in ((opt, params), (twin, twin_params)):
        steps(opt_one, mine, 2)
    assert_same(opt, params, twin, twin_params)
    assert twin.state_dict()["param_groups"] == opt.state_dict()["param_groups"]
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_file_without_parameters_leaves_them(tmp_path):
    p, q = np.ones(2), np.full(2, 5.0)
    opt = fastopt.Adam(p)
    opt.step(np.ones(2))
    opt.save(tmp_path / "saved")
    twin = fastopt.Adam(q)
    assert twin.load(tmp_path / "saved") == {}
    np.testing.assert_array_equal(q, 5.0)
    assert twin.steps == 1
    opt.save(tmp_path / "saved", params=True)
    twin.load(tmp_path / "saved", params=False)
    np.testing.assert_array_equal(q, 5.0)


def test_a_file_holds_options_changed_since_the_last_step(tmp_path):
    opt = fastopt.Adam(np.ones(2), lr=0.5)
    opt.param_groups[0].update(lr=0.25, betas=(0.5, 0.75), maximize=True)
    opt.save(tmp_path / "saved")
    twin = fastopt.Adam(np.ones(2))
    twin.load(tmp_path / "saved")
    assert twin.state_dict()["param_groups"] == opt.state_dict()["param_groups"]


def test_scalars_empty_arrays_names_and_stateless_rules_are_saved(tmp_path):
    arrays = {
        "scalar": np.ones(()),
        "no rows": np.ones((0, 3)),
        "äöü.\n": np.ones((2, 0)),
        "unseen": np.ones(2),
    }
    for optimizer in (fastopt.SGD, fastopt.Adam, fastopt.RowwiseAdaGrad):
        opt = optimizer(arrays)
        opt.step({name: None if name == "unseen" else np.ones_like(p) for name, p in arrays.items()})
        opt.save(tmp_path / "saved", params=True)
        twin_arrays = {name: np.zeros_like(p) for name, p in arrays.items()}
        twin = optimizer(twin_arrays)
        twin.load(tmp_path / "saved", params=True)
        assert_same(opt, list(arrays.values()), twin, list(twin_arrays.values()))


def test_a_schedule_is_kept_and_goes_on_where_it_was(tmp_path):
    def build():
        return fastopt.SGD([{"params": np.zeros(1), "lr": 0.5 * fastopt.schedules.exponential(0.5)},
                            {"params": np.zeros(1), "lr": lambda step: float(step)}])  # fmt: skip

    opt, twin = build(), build()
    opt.step([np.ones(1), np.ones(1)])
    opt.save(tmp_path / "saved", params=True)
    twin.load(tmp_path / "saved", params=True)
    for one in (opt, twin):
        one.step([np.ones(1), np.ones(1)])
    a, b = (group["params"][0] for group in twin.param_groups)
    assert (a, b) == (-0.75, -1.0)
    np.testing.assert_array_equal(a, opt.param_groups[0]["params"][0])


def failing(*arguments, **named):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("target", ["os.replace", "os.fsync", "zlib.crc32", "pathlib.Path.mkdir"])
def test_a_failing_write_leaves_the_old_file_and_no_other(target, tmp_path, monkeypatch):
    path = tmp_path / "saved"
    opt = fastopt.Adam(np.ones(2))
    opt.save(path)
    before = path.read_bytes()
    opt.step(np.ones(2))
    with monkeypatch.context() as patch:
        patch.setattr(target, failing)
        with pytest.raises(OSError, match="No space left"):
            opt.save(path)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["saved"]
    opt.save(path)
    assert path.read_bytes() != before


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "saved"
    p = np.ones(100_000)
    opt = fastopt.Adam(p)
    opt.save(path)
    before = path.read_bytes()
    opt.step(p.copy())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # no file may grow beyond
    try:
        with pytest.raises(OSError, match="saved"):
            opt.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["saved"]


def test_saving_through_a_symbolic_link_replaces_the_file_it_points_to(tmp_path):
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "folder" / "file")
    opt = fastopt.Adam(np.ones(2))
    opt.save(link)
    assert link.is_symlink()
    assert fastopt.Adam(np.ones(2)).load(os.fspath(link)) == {}


# Torch


def test_a_torch_parameter_that_moved_is_still_updated():
    torch = pytest.importorskip("torch")
    p = torch.nn.Parameter(torch.zeros(3))
    opt = fastopt.Adam([p], lr=0.5, eps=0.0)
    opt.step([torch.ones(3)])
    old = p.data
    p.data = torch.full((3,), 5.0)
    opt.step([torch.ones(3)])
    np.testing.assert_allclose(p.detach().numpy(), 4.5, rtol=1e-6)
    np.testing.assert_allclose(old.numpy(), -0.5, rtol=1e-6)
    state = opt.state_dict()["state"][0]
    assert state["step"] == 2
    assert type(state["exp_avg"]) is np.ndarray
    assert state["exp_avg"].dtype == np.float32


def test_torch_parameters_and_states_are_saved_restored_and_copied(tmp_path):
    torch = pytest.importorskip("torch")
    p = torch.nn.Parameter(torch.zeros(3, 2))
    opt = fastopt.Adam({"p": p})
    opt.step({"p": torch.ones(3, 2)})
    opt.save(tmp_path / "saved", params=True)
    q = torch.nn.Parameter(torch.ones(3, 2))
    twin = fastopt.Adam({"p": q})
    pointer = q.data_ptr()
    twin.load(tmp_path / "saved", params=True)
    assert q.data_ptr() == pointer
    copied = copy.deepcopy(opt)
    r = copied.param_groups[0]["params"]["p"]
    for one in (opt, twin, copied):
        one.step({"p": torch.ones(3, 2)})
    assert torch.equal(p, q)
    assert torch.equal(p, r)
    assert r.data_ptr() != p.data_ptr()

    state = opt.state_dict()
    state["state"]["p"]["exp_avg"] = torch.tensor(state["state"]["p"]["exp_avg"])
    twin.load_state_dict(state)
    opt.step({"p": torch.ones(3, 2)})
    twin.step({"p": torch.ones(3, 2)})
    assert torch.equal(p, q)
