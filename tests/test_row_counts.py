"""Rows that count their own steps, however many these are: neither time nor memory goes by the counts."""

import numpy as np
import pytest

import fastopt
from fastopt._core.backend import host
from fastopt._core.missed import fold_of
from fastopt.kernels.rule import RULES

OPTIONS = {
    "lr": 1.0, "lr_decay": 0.01, "eps": 1e-8, "betas": (0.9, 0.999), "momentum_decay": 4e-3, "alpha": 0.99,
    "momentum": 0.9, "dampening": 0.3, "nesterov": True, "weight_decay": 0.01,
}  # fmt: skip
BY_STEP = [hyper for hyper, rule in RULES.items() if hyper.__module__.startswith("fastopt.kernels.rules.")
           and not rule.matrix_slots and hasattr(hyper, "fold")]  # fmt: skip
CHANGES = [
    {},
    {"betas": (0.99, 0.9), "momentum_decay": 0.0},
    {"betas": (0.0, 0.6), "momentum_decay": 2.0, "dampening": 0.0},
    {"betas": (0.999999, 0.8), "momentum_decay": 1e306, "lr_decay": 0.0},
]


@pytest.mark.parametrize("changed", CHANGES, ids=str)
@pytest.mark.parametrize("hyper", BY_STEP, ids=lambda hyper: hyper.__name__)
def test_many_steps_are_folded_at_once_to_the_same_bits(hyper, changed):
    rng = np.random.default_rng(0)
    steps = np.unique([*range(1, 900), *(10 ** rng.uniform(3, 12, 300)).astype(np.int64), 2**53])
    rule, options = RULES[hyper], {**OPTIONS, **changed}
    with np.errstate(all="ignore"):
        found = rule.fold(steps.astype(np.float64), options, np.float64)
    want = np.array([rule.fold(step, options, np.float64) for step in steps.tolist()], np.float64)
    for k, numbers in enumerate(found):
        got = np.broadcast_to(np.asarray(numbers, np.float64), steps.shape)
        assert got.tobytes() == np.ascontiguousarray(want[:, k]).tobytes(), hyper._fields[k]


MAKERS = {
    "adam": lambda p, **o: fastopt.Adam(p, lr=0.1, **o),
    "amsgrad": lambda p, **o: fastopt.AMSGrad(p, lr=0.1, **o),
    "nadam": lambda p, **o: fastopt.NAdam(p, lr=0.1, **o),
    "radam": lambda p, **o: fastopt.RAdam(p, lr=0.1, betas=(0.8, 0.9), **o),
    "adagrad": lambda p, **o: fastopt.AdaGrad(p, lr=0.1, lr_decay=1e-3, **o),
    "sparse_adam": lambda p, **o: fastopt.SparseAdam(p, lr=0.1, **o),
    "rowwise_adam": lambda p, **o: fastopt.RowwiseAdam(p, lr=0.1, **o),
    "lamb": lambda p, **o: fastopt.LAMB(p, lr=0.1, **o),
    "dampening": lambda p, **o: fastopt.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, **o),
    "lion": lambda p, **o: fastopt.Lion(p, lr=0.1, **o),
}
COUNTS = [0, 1, 2, 50, 1_000, 10**6, 10**6 + 1, 10**9, 10**12]


def loaded(make, p, counts):
    """An optimizer of the table ``p`` whose rows were updated so often, all in one step."""
    opt = make(p, step_per_row=True)
    rows = np.arange(len(p))
    opt.step(fastopt.IndexedSlices(rows, np.ones_like(p)))
    state = opt.state_dict()
    state["state"][0]["row_steps"] = np.array(counts)
    state["state"][0]["step"] = state["steps"] = max(counts)
    opt.load_state_dict(state)
    return opt


@pytest.mark.parametrize("name", MAKERS)
def test_rows_go_on_from_any_count(name):
    """As optimizers of their own do, whatever the counts of other rows, and after each change of options."""
    make = MAKERS[name]
    p = np.ones((len(COUNTS), 3))
    opt = loaded(make, p, COUNTS)
    alone = [np.ones((1, 3)) for _ in COUNTS]
    twins = [make(q) for q in alone]
    for q, twin, count in zip(alone, twins, COUNTS, strict=True):
        twin.step(fastopt.IndexedSlices(np.array([0]), np.ones_like(q)))
        state = twin.state_dict()
        state["state"][0]["step"] = state["steps"] = count
        twin.load_state_dict(state)
    rng = np.random.default_rng(1)
    options = [key for key in ("eps", "betas", "lr") if key in opt.param_groups[0]]
    for step in range(6):
        change = {}
        if options[step % len(options)] != "betas":
            change = {options[step % len(options)]: 0.01 / (1 + step)}
        elif name != "lion":
            change = {"betas": (0.5, 0.9 + step / 100)}
        for one in (opt, *twins):
            one.param_groups[0].update(change)
        rows = np.flatnonzero(rng.random(len(COUNTS)) < 0.7)
        values = rng.standard_normal((rows.size, 3))
        opt.step(fastopt.IndexedSlices(rows, values))
        for row, value in zip(rows, values, strict=True):
            twins[row].step(fastopt.IndexedSlices(np.array([0]), value[None]))
    np.testing.assert_allclose(p, np.concatenate(alone), rtol=1e-12)


@pytest.mark.parametrize("most", [1, 10**3, 10**9, 2**53])
def test_only_the_counts_of_the_rows_named_are_folded(most):
    rng = np.random.default_rng(2)
    counts = rng.integers(0, most, 5_000)
    rows = np.unique(rng.integers(0, 5_000, 3_000))
    fold = fold_of(RULES[BY_STEP[0]], OPTIONS)
    for own in (rows, rows[:0]):
        [segments] = host().segments_of([(own, 5_000)])
        found = host().counted_steps(counts, segments, fold, most)
        np.testing.assert_array_equal(found.history[:, 0], np.unique(counts[own]) + 1)


@pytest.mark.parametrize("name", ["adam", "nadam", "adagrad"])
def test_a_hundred_thousand_different_counts(name):
    rng = np.random.default_rng(3)
    counts = np.unique(rng.integers(0, 10**9, 101_000))[:100_000]
    p = np.ones((100_000, 1), np.float32)
    opt = loaded(MAKERS[name], p, rng.permutation(counts).tolist())
    before = p.copy()
    opt.step(np.ones_like(p))
    assert (p < before).all()
    np.testing.assert_array_equal(np.sort(opt.state_dict()["state"][0]["row_steps"]), counts + 1)


def test_a_dense_gradient_counts_all_rows():
    p = np.ones((4, 2))
    opt = loaded(MAKERS["adagrad"], p, [0, 3, 10**12, 3])
    for _ in range(3):
        opt.step(np.ones_like(p))
    assert opt.state_dict()["state"][0]["row_steps"].tolist() == [3, 6, 10**12 + 3, 6]
    np.testing.assert_array_equal(p[1], p[3])
    assert (p[0] < p[1]).all() and (p[1] < p[2]).all()
