"""Rules from outside: Signum, a rule whose numbers depend on the step, and mistakes."""

import pickle
from typing import NamedTuple

import cases
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from signum import Signum, SignumH, signum

import fastopt


class DecayingH(NamedTuple):
    """A learning rate that falls with a parameter's own steps, and a flag."""

    rate: float
    ascend: bool

    @classmethod
    def fold(cls, step, *, lr, power=0.5, ascend=False, **_):
        return cls(lr / step**power, ascend)


def decaying(h, p, g, total, count):
    if h.ascend:
        g = -g
    return p - h.rate * g, total + g, count + g * g


Decaying = fastopt.register_rule("Decaying", DecayingH, decaying, ["total", "count"])


@pytest.mark.parametrize(("dtype", "sparse"), [(np.float64, False), (np.float32, True)])
@given(
    seed=st.integers(0, 2**32 - 1),
    lr=st.floats(1e-3, 0.1),
    beta=st.floats(0.1, 0.95),
    decay=st.floats(0.01, 0.5),
    maximize=st.booleans(),
)
def test_signum_follows_the_paper(dtype, sparse, seed, lr, beta, decay, maximize):
    rng = np.random.default_rng(seed)
    p = cases.parameter(rng, (9, 3), dtype)
    options = {"lr": lr, "beta": beta, "weight_decay": decay, "maximize": maximize}
    opt = Signum(p, **options)
    want = reference.Tracked(reference.signum, p, {**options, "decoupled": True})
    for _ in range(4):
        # a direction within rounding of 0 may have either sign: keep gradients of steps far apart
        indices, g = rng.integers(0, 9, 9), np.asarray(rng.standard_normal((9, 3)), dtype)
        opt.step(fastopt.IndexedSlices(indices, g) if sparse else g)
        want.step((indices, g) if sparse else g)
    unit = 8 * np.finfo(dtype).eps
    np.testing.assert_allclose(p, want.p, rtol=0, atol=unit * want.scale)
    state = opt.state_dict()["state"][0]
    atol = 4 * unit * want.state_scale["exp_avg"]
    np.testing.assert_allclose(state["exp_avg"], want.state["exp_avg"], rtol=0, atol=atol)


def test_signum_leaves_a_parameter_without_direction():
    p = np.array([1.0, 1.0, 1.0])
    Signum(p, lr=0.5).step(np.array([0.0, 2.0, -2.0]))
    np.testing.assert_array_equal(p, [1.0, 0.5, 1.5])


def test_a_registered_optimizer_has_names_defaults_and_documentation():
    opt = Signum(np.ones(2))
    assert repr(opt) == (
        "Signum(1 array, 2 parameters: lr=0.0001, beta=0.9, weight_decay=0.0, maximize=False)"
    )
    assert Signum.__doc__ == signum.__doc__
    assert issubclass(Signum, fastopt.Optimizer)
    assert opt.state_dict()["optimizer"] == "Signum"


def test_numbers_may_depend_on_the_parameters_own_step():
    p, q = np.zeros(2), np.zeros((2, 1))
    opt = Decaying([p, q], lr=1.0, power=1.0, ascend=True)
    g = np.array([1.0, -2.0])
    opt.step([g, None])
    opt.step([g, fastopt.IndexedSlices(np.array([1, 1]), g[:, None])])
    np.testing.assert_array_equal(p, g * 1.5)
    np.testing.assert_array_equal(q, [[0], [-1]])
    state = opt.state_dict()["state"]
    assert [state[key]["step"] for key in (0, 1)] == [2, 1]
    np.testing.assert_array_equal(state[0]["total"], -2 * g)
    np.testing.assert_array_equal(state[1]["count"], [[0], [1]])


def test_registered_optimizers_are_saved_and_take_groups_schedules_and_clipping(tmp_path):
    def build():
        p = np.ones(2)
        lr = 0.5 * fastopt.schedules.cosine(4)
        return p, Decaying([{"params": p, "power": 1.0}], lr=lr)

    (p, opt), (q, twin) = build(), build()
    assert opt.step([np.full(2, 3.0)], clip_norm=1.0).clipped
    opt.save(tmp_path / "saved", params=True)
    twin.load(tmp_path / "saved", params=True)
    for one in (opt, twin):
        one.step([np.ones(2)])
    np.testing.assert_array_equal(p, q)
    assert twin.steps == 2


def test_registering_the_same_rule_again_gives_another_optimizer_of_it():
    again = fastopt.register_rule("Signum2", SignumH, signum, ["exp_avg"])
    p, q = np.ones(2), np.ones(2)
    Signum(p, lr=0.5).step(np.ones(2))
    again(q, lr=0.5).step(np.ones(2))
    np.testing.assert_array_equal(p, q)
    assert again.__name__ == "Signum2"


def test_what_is_no_rule_is_refused():
    class Plain:
        lr = 1.0

    class WithoutLR(NamedTuple):
        beta: float = 0.9

    class Own(NamedTuple):
        lr: float = 1.0

    for hyper in (Plain, dict, tuple, SignumH(), "SignumH", None):
        with pytest.raises(TypeError, match=r"hyper is .*: expected a NamedTuple class"):
            fastopt.register_rule("Bad", hyper, signum, ["exp_avg"])
    for update in (None, "signum", 3, SignumH):
        with pytest.raises(TypeError, match=r"update is .*: expected a function \(h, p, g, \*slots\)"):
            fastopt.register_rule("Bad", Own, update)
    with pytest.raises(ValueError, match="has beta: expected lr among them"):
        fastopt.register_rule("Bad", WithoutLR, signum, ["exp_avg"])
    for update, slots in ((decaying, ["exp_avg"]), (signum, ["other"]), (signum, [])):
        with pytest.raises(ValueError, match="hyper, SignumH, belongs to another rule: define a NamedTuple"):
            fastopt.register_rule("Bad", SignumH, update, slots)


@pytest.mark.parametrize(
    "update",
    [
        lambda h, p, g, s: p,
        lambda h, p, g, s: (p,),
        lambda h, p, g, s: (p, s, s),
        lambda h, p, g, s: [p, s],
        lambda h, p, g, s: None,
    ],
)
def test_a_rule_that_returns_no_tuple_of_all_is_refused_before_it_is_compiled(update):
    class Own(NamedTuple):
        lr: float = 1.0

    bad = fastopt.register_rule("Bad", Own, update, ["s"])
    with pytest.raises(ValueError, match=r"returned .*: expected a tuple of 2, the parameter, s"):
        bad(np.ones(2))


def test_a_rule_with_other_arguments_than_its_slots_is_refused_before_it_is_compiled():
    class Own(NamedTuple):
        lr: float = 1.0

    bad = fastopt.register_rule("Bad", Own, signum, [])
    with pytest.raises(TypeError, match="exp_avg"):
        bad(np.ones(2))


def test_a_rule_may_divide_by_a_state_that_is_still_0():
    class Own(NamedTuple):
        lr: float = 1.0

    divide = fastopt.register_rule("Divide", Own, lambda h, p, g, s: (p - h.lr * g / s, s + g), ["s"])
    p = np.zeros(2)
    opt = divide(p)
    opt.step(np.array([1.0, -2.0]))
    np.testing.assert_array_equal(p, [-np.inf, np.inf])


def test_whole_numbers_among_the_options_stay_whole(tmp_path):
    class Own(NamedTuple):
        rate: float

        @classmethod
        def fold(cls, step, *, lr=1.0, period=2, **_):
            return cls(lr / len(range(0, step, period)))

    halving = fastopt.register_rule("Halving", Own, lambda h, p, g: (p - h.rate * g,))
    p = np.zeros(1)
    opt = halving(p)
    for _ in range(3):
        opt.step(np.ones(1))
        opt.save(tmp_path / "saved")
        opt.load(tmp_path / "saved")
    assert p[0] == -2.5


def test_options_are_taken_by_keyword_and_checked():
    class Required(NamedTuple):
        lr: float
        beta: float

    p = np.ones(2)
    strict = fastopt.register_rule("Strict", Required, lambda h, p, g: (p - h.lr * g * h.beta,))
    with pytest.raises(TypeError, match="positional"):
        Signum(p, 1e-3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'beta2'"):
        Signum(p, beta2=1.0)
    with pytest.raises(TypeError, match=r"missing a required .*argument: 'beta'"):
        strict(p, lr=1.0)
    for options, name in (
        ({"lr": -1.0}, "lr"),
        ({"beta": 1.0}, "beta"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ):
        with pytest.raises(ValueError, match=f"{name} of params is .*: expected"):
            Signum(p, **options)
    np.testing.assert_array_equal(p, 1.0)


def test_a_registered_optimizer_is_pickled_by_name():
    p = np.ones(2)
    opt = Signum(p, lr=0.5)
    opt.step(np.ones(2))
    twin = pickle.loads(pickle.dumps(opt))
    for one in (opt, twin):
        one.step(np.ones(2))
    np.testing.assert_array_equal(p, twin.param_groups[0]["params"])


def test_names_that_can_not_serve_are_refused():
    class Own(NamedTuple):
        lr: float = 1.0

    class OwnDecay(NamedTuple):
        lr: float = 1.0
        weight_decay: float = 0.5

    for slots in ("total", ["step"], ["a", "a"], [1], [None]):
        with pytest.raises(ValueError, match="slots is"):
            fastopt.register_rule("Bad", Own, signum, slots)
    for name in ("", 5, "two words"):
        with pytest.raises(ValueError, match="name is"):
            fastopt.register_rule(name, Own, signum, ["exp_avg"])
    with pytest.raises(ValueError, match="has 'weight_decay', which every optimizer has"):
        fastopt.register_rule("Bad", OwnDecay, signum, ["exp_avg"])
