"""Missed steps, all at once, against the reference going through them with a zero gradient."""

import math

import numba
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from fastopt.kernels import catch_up, rules
from fastopt.kernels.at_once import at_once
from fastopt.kernels.cpu.backend.history import History
from fastopt.kernels.element import load, store
from fastopt.kernels.rule import L2, Adaptive, Decoupled, Linear, Loop, Rule, Scaled
from fastopt.kernels.rules.sgd import SGDH, sgd

ADAM = ("betas", "eps")
RMSPROP = ("alpha", "eps")

# rule, reference, the options of the latter
CASES = {
    "sgd": (rules.SGD, reference.sgd, ()),
    "momentum": (rules.MOMENTUM, reference.momentum, ("momentum", "dampening", "nesterov")),
    "adagrad": (rules.ADAGRAD, reference.adagrad, ("eps", "lr_decay")),
    "rmsprop": (rules.RMSPROP, reference.rmsprop, RMSPROP),
    "rmsprop_momentum": (rules.RMSPROP_MOMENTUM, reference.rmsprop, (*RMSPROP, "momentum")),
    "centered": (rules.CENTERED_RMSPROP, reference.rmsprop, (*RMSPROP, "centered")),
    "centered_momentum": (rules.CENTERED_RMSPROP_MOMENTUM, reference.rmsprop,
                          (*RMSPROP, "centered", "momentum")),
    "adam": (rules.ADAM, reference.adam, ADAM),
    "amsgrad": (rules.AMSGRAD, reference.adam, (*ADAM, "amsgrad")),
    "radam": (rules.RADAM, reference.radam, ADAM),
    "nadam": (rules.NADAM, reference.nadam, (*ADAM, "momentum_decay")),
}  # fmt: skip
DECAYS = Scaled, L2, Decoupled
VARIANTS = [(name, decay) for name, (rule, *_) in CASES.items() for decay in DECAYS
            if (rule.missed_l2 if decay is L2 else rule.missed) is not Loop]  # fmt: skip
IDS = [f"{name}-{decay.__name__}" for name, decay in VARIANTS]

# of the movement without weight decay: somewhat above what kernels/catch_up.py says, for t0 = 0 too
TOLERANCE = {
    (0.9, 0.999): 5e-6,
    (0.9, 0.99): 1.5e-5,
    (0.95, 0.999): 1.5e-5,
    (0.5, 0.9): 1e-6,
    (0.99, 0.9999): 2e-4,
    (0.9, 0.95): 5e-3,
    (0.0, 0.9): 0.0,
}
OPTIONS = st.fixed_dictionaries({
    "lr": st.floats(1e-4, 0.1),
    "betas": st.sampled_from(list(TOLERANCE)),
    "eps": st.sampled_from([1e-10, 1e-8, 1e-3]),
    "momentum": st.floats(0.1, 0.99),
    "dampening": st.sampled_from([0.0, 0.3]),
    "nesterov": st.booleans(),
    "alpha": st.sampled_from([0.0, 1.0]) | st.floats(0.1, 0.999),
    "lr_decay": st.sampled_from([0.0, 0.1]),
    "momentum_decay": st.sampled_from([0.0, 4e-3, 0.5]),
    "weight_decay": st.floats(1e-3, 5.0),
})  # fmt: skip
SCHEDULES = {
    "constant": lambda t, rng: np.ones(t.size),
    "zero": lambda t, rng: np.zeros(t.size),
    "warmup": lambda t, rng: np.minimum(t / 20, 1),
    "cosine": lambda t, rng: 0.5 * (1 + np.cos(np.pi * t / t.size)),
    "jumps": lambda t, rng: rng.choice([0.0, 1e-3, 1.0], t.size),
}
SEEDS = st.integers(0, 2**32 - 1)
ULPS = 16


@numba.njit(error_model="numpy")
def take(kind, steps, window, base, t0, t1, h, p, slots):
    """Take the steps t0 + 1 .. t1."""
    k = catch_up.coefficients(kind, steps, window, base, t0, t1, p[0])
    for i in range(p.size):
        new = catch_up.caught_up(k, h, p[i], *load(slots, i))
        p[i] = new[0]
        store(slots, i, new[1:])


@numba.njit(error_model="numpy")
def take_row(kind, steps, window, base, t0, t1, h, p, slots, row_slots):
    """The same for a row with state of its own, arrays of one element."""
    k = catch_up.coefficients(kind, steps, window, base, t0, t1, p[0])
    old = load(row_slots, 0)
    for i in range(p.size):
        new = catch_up.caught_up(k, h, p[i], *load(slots, i), *old)
        p[i] = new[0]
        store(slots, i, new[1:])
    store(row_slots, 0, catch_up.row_caught_up(k, h, *old))


def arrived(history, lrs):
    for lr in lrs:
        at_once(history.advance(lr))
    return history


def cast(h, dtype):
    return type(h)(*(value if isinstance(value, bool) else dtype(value) for value in h))


def hyper(rule, options, dtype):
    return cast(rule.fold(1, options, np.float64), dtype)


def place(history, t0, t1):
    return history.kind(), history.steps, history.window, history.base, t0, t1


def new_elements(rng, rule, dtype):
    """A parameter and its slots, of very different sizes, some of them 0."""
    sizes = np.array([0, 1e-30, 1e-20, 1e-12, 1e-9, 1e-7, 1e-5, 1e-3, 1, 1e3])
    m = sizes[rng.permutation(np.repeat(np.arange(10), 5))] * rng.standard_normal(50)
    v = sizes[rng.permutation(np.repeat(np.arange(10), 5))] ** 2 + m**2
    square = np.asarray(m**2, dtype)
    v[::7] = sizes[rng.integers(0, 5, v[::7].size)]  # small against m
    values = {"momentum_buffer": m, "square_avg": square, "grad_avg": 0.5 * np.sqrt(square), "sum": v,
              "exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": v * rng.choice([1, 5], v.size)}  # fmt: skip
    slots = {name: values[name].astype(dtype) for name in rule.state_slots}
    return rng.standard_normal(50).astype(dtype), slots


def went_through(name, decay, options, p, slots, lrs, t0):
    """p and slots after steps with these learning rates and no gradient, and how far p went in all."""
    _, rule, names = CASES[name]
    given_options = {"centered": True, "amsgrad": True, **options}
    own = {key: given_options[key] for key in names}
    own["weight_decay"] = options["weight_decay"] if decay is not Scaled else 0.0
    own["decoupled"] = decay is Decoupled
    p, state = p.astype(np.float64), {slot: array.astype(np.float64) for slot, array in slots.items()}
    way = np.abs(p)
    for n, lr in enumerate(lrs):
        before = p
        p = rule(p, np.zeros_like(p), state, t0 + 1 + n, **{**own, "lr": lr})
        way += np.abs(p - before)
    return p, state, way


def assert_same_as_going_through(name, decay, options, schedule, base, t0, gap, later, dtype, rng):
    rule = CASES[name][0]
    count = t0 - base + gap + later
    lrs = options["lr"] * SCHEDULES[schedule](base + np.arange(count + 1.0), rng)[1:]
    history = arrived(History(rule, decay, options, base), lrs)
    p, slots = new_elements(rng, rule, dtype)
    missed = lrs[t0 - base : t0 - base + gap]
    with np.errstate(over="ignore"):
        want, state, way = went_through(name, decay, options, p, slots, missed, t0)
    got, arrays = p.copy(), tuple(array.copy() for array in slots.values())
    take(*place(history, t0, t0 + gap), hyper(rule, options, dtype), got, arrays)

    # what is computed in dtype, and one rounding in float64 a step since base, in sums of logarithms
    unit = ULPS * np.finfo(dtype).eps + count * np.finfo(np.float64).eps
    allowed = unit * way
    if history.kind is Adaptive:
        moved, *_ = went_through(name, Scaled, options, np.zeros_like(p), slots, missed, t0)
        allowed += TOLERANCE[options["betas"]] * np.abs(moved)
    assert got.dtype == dtype
    assert np.all(np.abs(got - want) <= allowed), np.max(np.abs(got - want) / allowed)
    for array, (slot, wanted) in zip(arrays, state.items(), strict=True):
        rtol = unit * 4 if dtype == np.float32 else 1e-12
        atol = np.finfo(dtype).tiny
        if decay is L2 and slot == "momentum_buffer":  # which p feeds
            atol = unit * options["weight_decay"] * way / (1 - options["momentum"])
        assert np.all(np.abs(array - wanted) <= rtol * np.abs(wanted) + atol), slot
    if not gap:
        assert got.tobytes() == p.tobytes()


@pytest.mark.parametrize(("name", "decay"), VARIANTS, ids=IDS)
@given(
    options=OPTIONS,
    schedule=st.sampled_from(list(SCHEDULES)),
    base=st.sampled_from([0, 1, 7]),
    start=st.sampled_from([0, 1, 2, 5, 30, 200]),
    gap=st.one_of(st.integers(0, 6), st.integers(0, 500)),
    later=st.integers(0, 9),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=SEEDS,
)
def test_missed_steps_are_steps_with_zero_gradient(
    name, decay, options, schedule, base, start, gap, later, dtype, seed
):
    if catch_up.missed_kind(CASES[name][0], decay, options) is Adaptive:
        later = 0  # it keeps the sums up to its last step alone
    rng = np.random.default_rng(seed)
    assert_same_as_going_through(name, decay, options, schedule, base, base + start, gap, later, dtype, rng)


FIXED = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "momentum": 0.9, "dampening": 0.0, "nesterov": False,
         "alpha": 0.99, "lr_decay": 0.0, "momentum_decay": 4e-3, "weight_decay": 1e-2}  # fmt: skip


@pytest.mark.parametrize("name", ["sgd", "momentum", "rmsprop_momentum", "adam", "radam"])
def test_a_long_absence(name):
    rng = np.random.default_rng(1)
    for dtype in (np.float32, np.float64):
        assert_same_as_going_through(name, Decoupled, FIXED, "cosine", 0, 3, 20_000, 0, dtype, rng)


@pytest.mark.parametrize("t0", [1, 10, 1000])
@pytest.mark.parametrize("name", ["adam", "amsgrad"])
def test_eps_of_any_size_against_the_second_moment(name, t0):
    rule, formula, _ = CASES[name]
    options = {**FIXED, "weight_decay": 0.0}
    history = arrived(History(rule, Scaled, options, 0), np.full(t0 + 200, 1e-2))
    root = options["eps"] * 10.0 ** np.arange(-3, 6.1, 0.25)
    m, v = np.ones(root.size), root**2 * (1 - options["betas"][1] ** t0)
    state = {"exp_avg": m.copy(), "exp_avg_sq": v.copy(), "max_exp_avg_sq": v.copy()}
    want = np.zeros(root.size)
    for step in range(t0 + 1, t0 + 201):
        extra = {"amsgrad": name == "amsgrad"}
        want = formula(want, 0.0, state, step, lr=1e-2, betas=options["betas"], eps=options["eps"], **extra)
    got, slots = np.zeros(root.size), (m, v, v.copy())[: len(rule.state_slots)]
    take(*place(history, t0, t0 + 200), hyper(rule, options, np.float64), got, slots)
    np.testing.assert_allclose(got, want, rtol={1: 1e-6, 10: 1e-8, 1000: 1e-11}[t0])


@pytest.mark.parametrize(("name", "decay"), VARIANTS, ids=IDS)
@pytest.mark.parametrize("lr", [0.0, 1e-2])
def test_rows_without_a_past_move_by_weight_decay_alone(name, decay, lr):
    rule = CASES[name][0]
    history = arrived(History(rule, decay, FIXED, 0), [lr] * 400)
    p = np.linspace(-3, 3, 9, dtype=np.float32)
    slots = tuple(np.zeros(9, np.float32) for _ in rule.state_slots)
    got = p.copy()
    take(*place(history, 0, 400), hyper(rule, FIXED, np.float32), got, slots)
    if decay is Scaled or lr == 0:
        assert got.tobytes() == p.tobytes()
    elif history.kind is not Linear or decay is Decoupled:
        np.testing.assert_allclose(got, p * (1 - 1e-4) ** 400, rtol=1e-6)
    assert all(not slot.any() for slot in slots) or decay is L2


@pytest.mark.parametrize("decay", [Scaled, Decoupled])
def test_rowwise_adagrad_keeps_its_sum(decay):
    history = arrived(History(rules.ROWWISE_ADAGRAD, decay, FIXED, 0), [0.1] * 10)
    p, total = np.ones(3, np.float32), np.full(1, 0.3, np.float32)
    take_row(*place(history, 0, 10), hyper(rules.ROWWISE_ADAGRAD, FIXED, np.float32), p, (), (total,))
    assert total[0] == np.float32(0.3)
    np.testing.assert_allclose(p, (1 - 1e-3) ** 10 if decay is Decoupled else 1.0, rtol=1e-6)


def test_a_second_moment_for_a_row():
    rule = rules.ROWWISE_ADAM
    history = arrived(History(rule, Decoupled, FIXED, 0), [1e-2] * 60)
    rng = np.random.default_rng(2)
    for dtype in (np.float32, np.float64):
        p, m = rng.standard_normal((2, 8)).astype(dtype)
        v = np.full(1, 0.2, dtype)
        slots = {"exp_avg": m, "exp_avg_sq": np.repeat(v, 8)}
        want, state, way = went_through("adam", Decoupled, FIXED, p, slots, [1e-2] * 50, 10)
        got = p.copy()
        take_row(*place(history, 10, 60), hyper(rule, FIXED, dtype), got, (m,), (v,))
        unit = ULPS * np.finfo(dtype).eps
        assert np.all(np.abs(got - want) <= unit * way)
        np.testing.assert_allclose(m, state["exp_avg"], rtol=unit)
        np.testing.assert_allclose(v[0], state["exp_avg_sq"][0], rtol=unit)


def test_products_of_matrices_between_any_two_steps():
    options = {**FIXED, "nesterov": True, "momentum": 0.7, "weight_decay": 0.5}
    rng = np.random.default_rng(3)
    history = arrived(History(rules.MOMENTUM, L2, options, 5), rng.uniform(0, 0.5, 70))
    own = history.steps[:, catch_up.OWN : catch_up.OWN + 4].reshape(-1, 2, 2)
    h = hyper(rules.MOMENTUM, options, np.float64)
    for t0 in range(5, 76):
        want = np.eye(2)
        for t1 in range(t0, 76):
            if t1 > t0:
                want = own[t1 - 5] @ want
            p, b = np.eye(2)
            take(*place(history, t0, t1), h, p, (b,))
            np.testing.assert_allclose([p, b], want, rtol=1e-12, atol=1e-14)


def test_the_first_step_is_undampened():
    options = {**FIXED, "dampening": 0.5, "weight_decay": 0.1}
    history = arrived(History(rules.MOMENTUM, L2, options, 0), [1.0, 1.0])
    p, b = np.ones(1), np.zeros(1)
    take(*place(history, 0, 1), hyper(rules.MOMENTUM, options, np.float64), p, (b,))
    np.testing.assert_allclose((p[0], b[0]), (0.9, 0.1))
    p, b = np.ones(1), np.zeros(1)
    take(*place(history, 1, 2), hyper(rules.MOMENTUM, options, np.float64), p, (b,))
    np.testing.assert_allclose((p[0], b[0]), (0.95, 0.05))


@pytest.mark.parametrize(
    ("rule", "decay"),
    [(rules.ADAM, L2), (rules.RADAM, L2), (rules.NADAM, L2),
     (rules.LION, Scaled), (rules.LION, Decoupled), (rules.ADAGRAD, L2),
     (rules.RMSPROP, L2), (rules.CENTERED_RMSPROP_MOMENTUM, L2),
     (rules.ROWWISE_ADAGRAD, L2)],
)  # fmt: skip
def test_other_steps_are_kept_as_they_are(rule, decay):
    options = {**FIXED, "lr_decay": 0.1}
    lrs = np.linspace(0.1, 0.2, 100)
    history = arrived(History(rule, decay, options, 4), lrs)
    assert history.kind is Loop
    for i in (1, 2, 100):
        h = rule.fold(4 + i, {**options, "lr": lrs[i - 1]}, np.float64)
        kept = {Scaled: [], L2: [0.01], Decoupled: [1.0 - lrs[i - 1] * 0.01]}
        assert history.steps[i].tolist() == [*map(float, h), *kept[decay]]


def test_steps_that_do_not_settle_keep_their_weight_decay():
    options = {**FIXED, "betas": (0.9, 0.5)}
    plain = arrived(History(rules.ADAM, Scaled, options, 0), [0.1])
    assert plain.steps[1].tolist() == list(rules.ADAM.fold(1, {**options, "lr": 0.1}, np.float64))
    decoupled = arrived(History(rules.ADAM, Decoupled, options, 0), [0.1])
    assert decoupled.steps[1].tolist() == [*plain.steps[1], 1 - 0.1 * 0.01]


@pytest.mark.parametrize(
    ("rule", "betas", "kind"),
    [
        (rules.ADAM, (0.9, 0.999), Adaptive),
        (rules.ADAM, (0.9, 0.95), Adaptive),
        (rules.ADAM, (0.9, 0.8), Loop),
        (rules.ADAM, (0.7, 0.5), Loop),
        (rules.ADAM, (0.9, 0.0), Loop),
        (rules.ADAM, (0.0, 0.0), Adaptive),
        (rules.ADAM, (0.9999, 0.99999), Loop),
        (rules.AMSGRAD, (0.9, 0.5), Adaptive),
        (rules.AMSGRAD, (0.9, 0.0), Adaptive),
        (rules.RADAM, (0.9, 0.5), Loop),
    ],
)
def test_a_sum_that_does_not_settle_is_gone_through(rule, betas, kind):
    assert catch_up.missed_kind(rule, Scaled, {**FIXED, "betas": betas}) is kind
    assert catch_up.missed_kind(rule, L2, {**FIXED, "betas": betas}) is Loop


def test_rules_from_elsewhere_are_gone_through():
    class OtherH(SGDH):
        __slots__ = ()

    assert catch_up.missed_kind(Rule(OtherH, sgd), Scaled, FIXED) is Loop


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.999), (0.5, 0.0)])
def test_betas_of_zero_leave_no_nan(betas):
    options = {**FIXED, "betas": betas}
    history = arrived(History(rules.AMSGRAD, Scaled, options, 0), [0.1] * 50)
    for gap in (1, 50):
        start = History(rules.AMSGRAD, Scaled, options, 0) if gap < 50 else history
        p, m, v = np.ones(1), np.ones(1), np.ones(1)
        start = arrived(start, [0.1] * (gap - start.now))
        take(*place(start, 0, gap), hyper(rules.AMSGRAD, options, np.float64), p, (m, v, np.ones(1)))
        assert math.isfinite(p[0]) and (p[0] == 1) == (betas[0] == 0)


@pytest.mark.parametrize(("name", "decay"), [*VARIANTS, ("adam", L2)])
@given(seed=SEEDS, count=st.integers(0, 300))
def test_the_learning_rates_are_enough_to_keep_it_anew(name, decay, seed, count):
    lrs = np.random.default_rng(seed).uniform(0, 0.1, count)
    history = arrived(History(CASES[name][0], decay, FIXED, 3), lrs)
    assert (history.base, history.now) == (3, 3 + count)
    assert history.lrs.tolist() == lrs.tolist()
    again = arrived(History(CASES[name][0], decay, FIXED, 3), history.lrs)
    assert len(history.steps) > count
    assert history.steps.flags.c_contiguous and history.steps.dtype == np.float64
    assert again.steps.tobytes() == history.steps.tobytes()


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_weight_decay_that_takes_all_is_refused(name):
    history = arrived(History(CASES[name][0], Decoupled, {**FIXED, "weight_decay": 2.0}, 0), [0.1] * 5)
    before = history.steps.copy()
    with pytest.raises(ValueError, match=r"lr is 0.5 and weight_decay 2.0: .* lr \* weight_decay below 1"):
        at_once(history.advance(0.5))
    assert history.now == 5 and history.lrs.size == 5
    assert history.steps.tobytes() == before.tobytes()


@pytest.mark.parametrize(
    "kind", [catch_up.StillCoefficients, catch_up.LinearCoefficients, catch_up.AdaptiveCoefficients]
)
def test_coefficients_have_the_type_of_the_parameter(kind):
    name = {
        catch_up.StillCoefficients: "rmsprop",
        catch_up.LinearCoefficients: "momentum",
        catch_up.AdaptiveCoefficients: "adam",
    }[kind]
    history = arrived(History(CASES[name][0], Scaled, FIXED, 0), [0.1] * 5)
    for dtype in (np.float32, np.float64):
        k = catch_up.coefficients(*place(history, 2, 5), dtype(0))
        assert type(k) is kind
        assert {type(number) for number in k} == {dtype}
