"""``rows="dense"``: rows that were behind, brought up to date, against dense gradients."""

import copy
import pickle
from functools import partial
from typing import NamedTuple

import cases
import numpy as np
import pytest
import reference
from hypothesis import example, given, settings
from hypothesis import strategies as st
from signum import Signum

import fastopt
from fastopt import BagGradient, IndexedSlices, schedules
from fastopt.kernels.cpu import threads
from fastopt.kernels.cpu.backend.history import History

ROWS, DIM = 12, 5
F32, F64 = np.float32, np.float64
SEEDS = st.integers(0, 2**32 - 1)

# of the movement, with Adam and its kin: somewhat above what kernels/catch_up.py says
ERRORS = {
    (0.9, 0.999): 5e-6,
    (0.9, 0.99): 1.5e-5,
    (0.95, 0.999): 1.5e-5,
    (0.5, 0.9): 1e-6,
    (0.9, 0.95): 5e-3,
    (0.0, 0.9): 0.0,
}
ULPS = 32
CENTERED_ULPS = 320  # v - mean^2 loses digits, see test_rules.py

# Each rule with each kind of closed form, with few kernels: a dtype and whether there is weight decay
COMBINATIONS = [
    ("sgd", F32, True), ("momentum", F32, False), ("dampening", F32, True), ("nesterov", F32, True),
    ("adagrad", F32, False), ("adagrad_decay", F32, True), ("rowwise_adagrad", F32, True),
    ("rowwise_adagrad_decoupled", F64, True), ("rmsprop", F32, False), ("rmsprop_momentum", F32, False),
    ("rmsprop_centered", F64, True), ("rmsprop_centered_momentum", F32, False), ("adam", F32, False),
    ("adam", F64, True), ("adam_amsgrad", F32, False), ("amsgrad", F32, False), ("adamw", F32, True),
    ("adamw_amsgrad", F64, True), ("rowwise_adam", F32, False), ("radam", F32, False),
    ("nadam", F32, False), ("lion", F64, True),
]  # fmt: skip


class DriftH(NamedTuple):
    """Its number of steps, a flag, and a field called as one of RMSProp's."""

    rate: float
    ascend: bool
    alpha: float

    @classmethod
    def fold(cls, step, *, lr, ascend=False, alpha=0.5, **_):
        return cls(lr / step, ascend, alpha)


def drift(h, p, g, total):
    total = h.alpha * total + g
    if h.ascend:
        return p + h.rate * total, total
    return p - h.rate * total, total


Drift = fastopt.register_rule("Drift", DriftH, drift, ["total"])


def slices(rng, dtype, rows=ROWS, dim=DIM, size=None):
    """A sparse gradient and the dense one it stands for."""
    indices = rng.integers(0, rows, rng.integers(0, 6) if size is None else size)
    values = cases.gradient(rng, (indices.size, dim), dtype)
    dense = np.zeros((rows, dim), dtype)
    np.add.at(dense, indices, values)
    return IndexedSlices(indices, values), dense


def bags(rng, dtype, rows=ROWS, dim=DIM):
    """The same of bags, whose weights and sizes are such that nothing is rounded."""
    indices = rng.integers(0, rows, 8)
    offsets = np.array([0, 2, 4, 4])
    sizes = np.array([2, 2, 0, 4])
    g = cases.gradient(rng, (4, dim), dtype)
    mode = rng.choice(["sum", "mean"])
    weights = rng.choice([0.5, 1.0, -2.0], 8).astype(dtype) if rng.integers(2) else None
    padding = int(rng.integers(rows)) if mode == "sum" and rng.integers(2) else None
    dense = np.zeros((rows, dim), dtype)
    scale = np.repeat(1 / np.maximum(sizes, 1), sizes) if mode == "mean" else np.ones(8)
    scale = scale if weights is None else scale * weights
    scale = np.where(indices == padding, 0, scale)
    np.add.at(dense, indices, (np.repeat(g, sizes, axis=0) * scale[:, None]).astype(dtype))
    return BagGradient(indices, offsets, g, str(mode), weights, padding), dense


def drawn_gradient(rng, dtype, kinds=("slices", "slices", "bags", "none", "dense")):
    kind = rng.choice(list(kinds))
    if kind == "none":
        return None, None
    if kind == "dense":
        g = cases.gradient(rng, (ROWS, DIM), dtype)
        return g, g
    return (slices if kind == "slices" else bags)(rng, dtype)


def drawn_options(case, rng, decay, betas=None):
    options = case.options(rng, weight_decay=decay)
    if "betas" in options and "betas" not in case.fixed:  # fixed ones have a reason, see cases.py
        options["betas"] = betas or list(ERRORS)[rng.integers(len(ERRORS))]
    return options


class Times:
    """A schedule that a learning rate can be multiplied with."""

    def __init__(self, factor):
        self.factor = factor

    def __rmul__(self, lr):
        return lambda step: lr * self.factor(step)

    def __call__(self, step):
        return self.factor(step)


SCHEDULES = {
    "constant": schedules.constant(),
    "warmup": schedules.warmup_cosine(warmup=5, total=30),
    "zeros": Times(lambda step: 0.0 if step % 3 == 1 or 8 < step < 14 else 1.0),
}


class Twin:
    """A table with ``rows="dense"``, and the float64 reference under the dense gradients."""

    def __init__(self, case, options, dtype, rng, schedule=None, shape=(ROWS, DIM)):
        self.case, self.schedule, self.lr = case, schedule, options["lr"]
        self.p = cases.parameter(rng, shape, dtype)
        self.want = case.reference(self.p, options)
        lr = self.lr if schedule is None else self.lr * schedule
        self.opt = case.make([self.p], {**options, "lr": lr, "rows": "dense"})
        self.way = np.zeros(shape)
        self.error = ERRORS.get(options.get("betas"), 0.0)

    def step(self, g, dense, **changed):
        at = self.opt.steps
        before = self.want.p
        if "lr" not in changed and self.schedule is not None:
            changed["lr"] = self.lr * self.schedule(at)
        self.opt.step([g])
        self.want.step(dense, **changed)
        self.way += np.abs(self.want.p - before)

    @property
    def allowed(self):
        ulps = CENTERED_ULPS if "centered" in self.case.name else ULPS
        return ulps * np.finfo(self.p.dtype).eps * self.want.scale + self.error * self.way

    def assert_rows(self, got, rows):
        worst = np.abs(got - self.want.p[rows]) / self.allowed[rows]
        assert np.all(worst <= 1), worst.max()

    def assert_flushed(self):
        self.opt.flush()
        self.assert_rows(self.p, slice(None))
        state = self.opt.state_dict()["state"][0]
        assert state.pop("step") == self.want.steps
        assert not self.want.steps or set(state) == set(self.want.state)
        ulps = CENTERED_ULPS if "centered" in self.case.name else ULPS
        for name, array in state.items():
            atol = ulps * np.finfo(self.p.dtype).eps * self.want.state_scale[name]
            if name == "momentum_buffer":
                atol *= 10  # which p feeds
            np.testing.assert_allclose(array, self.want.state[name], rtol=0, atol=atol, err_msg=name)


# Against the reference


@pytest.mark.parametrize(("name", "dtype", "decay"), COMBINATIONS)
@settings(max_examples=settings().max_examples // 2)
@given(seed=SEEDS, steps=st.integers(1, 40), schedule=st.sampled_from(list(SCHEDULES)))
@example(seed=853, steps=5, schedule="constant")
def test_sparse_steps_and_a_flush_equal_dense_steps(name, dtype, decay, seed, steps, schedule):
    rng = np.random.default_rng(seed)
    case = cases.BY_NAME[name]
    twin = Twin(case, drawn_options(case, rng, decay), dtype, rng, SCHEDULES[schedule])
    for _ in range(steps):
        twin.step(*drawn_gradient(rng, dtype))
        if rng.integers(4) == 0:
            assert_reads_up_to_date(twin, rng)
        if rng.integers(20) == 0:
            twin.assert_flushed()
    twin.assert_flushed()


def assert_reads_up_to_date(twin, rng):
    """Through a lookup, and a pooled one; rows that are not read stay as they are."""
    for indices in (rng.integers(0, ROWS, 3), rng.integers(0, ROWS, (2, 2))):
        before = twin.p.copy()
        others = np.setdiff1d(np.arange(ROWS), indices)
        if indices.ndim == 1:
            got = fastopt.embedding(twin.p, indices, optimizer=twin.opt)
            twin.assert_rows(got, indices)
        else:
            got = fastopt.embedding_bag(twin.p, indices, mode="sum", optimizer=twin.opt)
            np.testing.assert_array_equal(got, twin.p[indices].sum(axis=1))
            twin.assert_rows(twin.p[indices], indices)
        assert twin.p[others].tobytes() == before[others].tobytes()


LONG = [("momentum", F32, False), ("rmsprop_momentum", F32, False), ("adam", F32, False), ("adam", F64, True),
        ("amsgrad", F32, False), ("adamw", F32, True), ("adamw_amsgrad", F64, True),
        ("rowwise_adam", F32, False), ("radam", F32, False), ("nadam", F32, False)]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "decay"), LONG)
def test_a_long_run_with_few_visits(name, dtype, decay):
    rng = np.random.default_rng(1)
    case = cases.BY_NAME[name]
    options = {**drawn_options(case, rng, decay, (0.9, 0.999)), "lr": 1e-2}
    if "momentum" in options:
        options["momentum"] = 0.9
    twin = Twin(case, options, dtype, rng, schedules.warmup_cosine(warmup=20, total=350))
    for t in range(350):
        rows = [0] if t % 7 else [0, 1 + t // 7 % (ROWS - 2)]
        values = cases.gradient(rng, (len(rows), DIM), dtype)
        dense = np.zeros((ROWS, DIM), dtype)
        dense[rows] = values
        twin.step(IndexedSlices(np.array(rows), values), dense)
    twin.assert_flushed()


# One by one, the same bits


def options_of_loop(name, rng):
    if name in cases.BY_NAME:
        case = cases.BY_NAME[name]
        options = case.options(rng, weight_decay=True)
        if name == "lion":  # betas with which directions are rounded, here by the same operations
            options["betas"] = 0.9, 0.99
        return lambda p, **more: case.make([p], {**options, **more})
    if name == "far":  # betas that catch_up.py does not sum
        return lambda p, **more: fastopt.Adam([p], lr=0.03, betas=(0.9, 0.5), **more)
    if name == "signum":
        return lambda p, **more: Signum([p], lr=0.02, weight_decay=0.1, **more)
    return lambda p, **more: Drift([p], lr=0.3, ascend=True, weight_decay=0.05, **more)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("adam", F64), ("adagrad_decay", F32), ("rowwise_adagrad", F32), ("rmsprop_centered", F64),
     ("far", F32), ("lion", F64), ("nadam", F64), ("signum", F64), ("drift", F64)],
)  # fmt: skip
@given(seed=SEEDS, steps=st.integers(1, 30))
def test_steps_gone_through_one_by_one_have_the_bits_of_dense_steps(name, dtype, seed, steps):
    rng = np.random.default_rng(seed)
    make = options_of_loop(name, rng)
    p = cases.parameter(rng, (ROWS, DIM), dtype)
    q = p.copy()
    opt, twin = make(p, rows="dense"), make(q)
    for _ in range(steps):
        g, dense = drawn_gradient(rng, dtype)
        opt.step([g])
        twin.step([dense])
        rows = rng.integers(0, ROWS, 2)
        np.testing.assert_array_equal(fastopt.embedding(p, rows, optimizer=opt), q[rows])
    opt.flush()
    np.testing.assert_array_equal(p, q)
    own, other = opt.state_dict()["state"][0], twin.state_dict()["state"][0]
    assert own.keys() == other.keys()
    for slot in own:
        np.testing.assert_array_equal(own[slot], other[slot], err_msg=slot)


def test_summed_gradients_outlast_the_steps_that_were_missed():
    p, q = np.ones((3, 2), F32), np.ones((3, 2), F32)
    opt = fastopt.AdaGrad([p], lr=0.1, weight_decay=0.1, rows="dense")
    twin = fastopt.AdaGrad([q], lr=0.1, weight_decay=0.1)
    for indices in ([0], [1, 1]):
        opt.step([IndexedSlices(np.array(indices), np.ones((len(indices), 2), F32))])
        dense = np.zeros((3, 2), F32)
        dense[indices[0]] = len(indices)
        twin.step([dense])
    opt.flush()
    np.testing.assert_array_equal(p, q)


@given(seed=SEEDS)
def test_a_registered_rule_against_its_formula(seed):
    rng = np.random.default_rng(seed)
    p = cases.parameter(rng, (ROWS, DIM), F64)
    # with a beta of few bits the direction is exact, its sign included
    options = {"lr": 0.01, "beta": 0.75, "weight_decay": 0.1}
    want = reference.Tracked(reference.signum, p, {**options, "decoupled": True})
    opt = Signum([p], rows="dense", **options)
    for _ in range(20):
        g, dense = drawn_gradient(rng, F64)
        opt.step([g])
        want.step(dense)
    opt.flush()
    np.testing.assert_allclose(p, want.p, rtol=0, atol=1e-13)


# Maxima


def test_maxima_come_from_rows_up_to_date():
    p = np.array([[1.0], [0.5], [0.0]])
    opt = fastopt.SGD(p, lr=1.0, momentum=0.9, rows="dense")
    opt.step(IndexedSlices(np.array([0]), np.array([[0.3]])))
    opt.step(IndexedSlices(np.array([2]), np.array([[0.0]])))
    assert p[0, 0] == 0.7  # behind: 0.43
    assert fastopt.embedding_bag(p.copy(), np.array([[0, 1]]), mode="max") == 0.7
    opt.step(BagGradient(np.array([[0, 1]]), None, np.ones((1, 1)), "max"))
    np.testing.assert_allclose(p[:2, 0], [0.7 - 0.27 - 0.243, -0.5], rtol=1e-14)
    opt.step(IndexedSlices(np.array([2]), np.array([[0.0]])))
    pooled = fastopt.embedding_bag(p, np.array([[0, 1]]), mode="max", optimizer=opt)
    np.testing.assert_allclose(pooled, 0.7 - 0.27 - 0.243 - 0.2187, rtol=1e-13)


@given(seed=SEEDS)
def test_gradients_of_maxima_equal_dense_ones(seed):
    rng = np.random.default_rng(seed)
    case = cases.BY_NAME["adam"]
    twin = Twin(case, drawn_options(case, rng, False, (0.9, 0.999)), F32, rng)
    for _ in range(15):
        indices = rng.permutation(ROWS)[:6].reshape(2, 3)
        g = cases.gradient(rng, (2, DIM), F32)
        dense = np.zeros((ROWS, DIM), F32)
        for bag, one in zip(indices, g, strict=True):
            dense[bag[twin.want.p[bag].argmax(axis=0)], np.arange(DIM)] += one
        twin.step(BagGradient(indices, None, g, "max"), dense)
        twin.step(*slices(rng, F32))
    twin.assert_flushed()


# Several parameters


@given(seed=SEEDS, scale=st.sampled_from([1.0, 0.25]))
def test_parameters_and_groups_go_their_own_ways(seed, scale):
    rng = np.random.default_rng(seed)
    case = cases.BY_NAME["adam"]
    options = [{"lr": 0.1, "betas": (0.9, 0.99)}, {"lr": 0.02, "weight_decay": 0.1, "maximize": True},
               {"lr": 0.05}]  # fmt: skip
    kinds = [("dense", (F32, F32)), ("dense", (F64,)), ("lazy", (F32,))]
    groups, want = [], []
    for own, (rows, dtypes) in zip(options, kinds, strict=True):
        params = [cases.parameter(rng, (ROWS, DIM), dtype) for dtype in dtypes]
        want.append([case.reference(p, own) for p in params])
        groups.append({"params": params, "rows": rows, **own})
    bias = np.zeros(3, F32)
    groups[0]["params"].append(bias)
    want_bias = case.reference(bias, options[0])
    opt = fastopt.Adam(groups)
    for _ in range(12):
        grads = []
        for group, own in zip(groups, want, strict=True):
            entry = []
            for p, tracked in zip(group["params"], own, strict=False):
                g, dense = drawn_gradient(rng, p.dtype.type)
                entry.append(g)
                if group["rows"] == "lazy" and isinstance(g, IndexedSlices):
                    tracked.step((g.indices, g.values * scale))
                elif group["rows"] == "lazy" and isinstance(g, BagGradient):
                    entry[-1] = None
                else:
                    tracked.step(None if dense is None else dense * scale)
            grads.append(entry)
        g = cases.gradient(rng, 3, F32)
        grads[0].append(g)
        want_bias.step(g * scale)
        opt.step(grads, grad_scale=scale)
    before = groups[2]["params"][0].copy()
    opt.flush()
    assert groups[2]["params"][0].tobytes() == before.tobytes()
    for group, own in zip(groups, want, strict=True):
        for p, tracked in zip(group["params"], own, strict=False):
            atol = (ULPS * np.finfo(p.dtype).eps + 1.5e-5) * tracked.scale
            np.testing.assert_allclose(p, tracked.p, rtol=0, atol=atol)
    np.testing.assert_allclose(bias, want_bias.p, rtol=0, atol=1e-5)


# Options changed between steps

CHANGES = {
    "adam": [{"betas": (0.5, 0.9)}, {"lr": 0.5}, {"eps": 1e-3}, {"lr": 0.0}, {"betas": (0.9, 0.99)}],
    "adamw": [{"weight_decay": 0.3}, {"lr": 0.2}, {"weight_decay": 0.0}, {"betas": (0.5, 0.9)}],
    "momentum": [{"momentum": 0.3}, {"lr": 0.5}, {"weight_decay": 0.2}, {"lr": 0.0}, {"weight_decay": 0.0}],
    "adagrad": [{"weight_decay": 0.2}, {"lr": 0.3}, {"weight_decay": 0.0}],
}


@pytest.mark.parametrize("when", ["step", "flush", "read", "state"])
@pytest.mark.parametrize("name", CHANGES)
def test_options_changed_between_steps_count_from_the_next_on(name, when):
    rng = np.random.default_rng(2)
    case = cases.BY_NAME[name]
    options = drawn_options(case, rng, name == "adamw", (0.9, 0.999)) | {"maximize": False}
    if name == "momentum":
        options["momentum"] = 0.9
    twin = Twin(case, options, F32, rng)
    changed = {}
    for change in [{}, *CHANGES[name]]:
        changed |= change
        if "betas" in change:
            twin.error = max(twin.error, ERRORS[change["betas"]])
        twin.opt.param_groups[0].update(change)
        if when == "flush":
            twin.assert_flushed()
        elif when == "read":
            twin.assert_rows(fastopt.embedding(twin.p, np.arange(4), optimizer=twin.opt), slice(4))
        elif when == "state":
            twin.opt.load_state_dict(twin.opt.state_dict())
        for _ in range(4):
            twin.step(*slices(rng, F32, size=2), **changed)
    twin.assert_flushed()


# State saved while rows are behind


def resumed(way, opt, p, make, path):
    if way == "deepcopy":
        return copy.deepcopy((opt, p))
    if way == "pickle":
        return pickle.loads(pickle.dumps((opt, p)))
    q = p.copy()
    if way == "params":
        q[:] = 0
    twin = make(q)
    if way == "state_dict":
        twin.load_state_dict(opt.state_dict())
    else:
        opt.save(path, params=way == "params")
        twin.load(path, params=way == "params")
    return twin, q


@pytest.mark.parametrize("way", ["state_dict", "save", "params", "deepcopy", "pickle"])
@pytest.mark.parametrize(
    ("name", "dtype", "decay"),
    [("momentum", F32, False), ("adam", F32, False), ("adam", F64, True), ("adamw", F32, True),
     ("rowwise_adam", F32, False), ("adagrad", F32, False)],
)  # fmt: skip
def test_a_resumed_run_has_the_same_bits(name, dtype, decay, way, tmp_path):
    case = cases.BY_NAME[name]
    options = drawn_options(case, np.random.default_rng(3), decay, (0.9, 0.999))
    options["lr"] = options["lr"] * schedules.warmup_cosine(warmup=3, total=40)

    def make(p):
        return case.make([p], {**options, "rows": "dense"})

    rng = np.random.default_rng(4)
    p = cases.parameter(rng, (ROWS, DIM), dtype)
    opt = make(p)
    for at in range(12):
        opt.step([drawn_gradient(rng, dtype, ("slices", "bags", "none", "dense" if at < 3 else "slices"))[0]])
    assert "last_step" in opt.state_dict()["state"][0]
    twin, q = resumed(way, opt, p, make, tmp_path / "saved")
    assert q is not p and q.tobytes() == p.tobytes() and twin.steps == 12
    for _ in range(12):
        g = drawn_gradient(rng, dtype, ("slices", "bags", "none"))[0]
        opt.step([g])
        twin.step([g])
    for one in (opt, twin):
        one.flush()
    assert q.tobytes() == p.tobytes()
    state, other = opt.state_dict()["state"][0], twin.state_dict()["state"][0]
    assert state.keys() == other.keys() and "last_step" not in state
    for slot in state:
        np.testing.assert_array_equal(state[slot], other[slot], strict=True, err_msg=slot)


def test_saving_moves_nothing():
    rng = np.random.default_rng(5)
    p = cases.parameter(rng, (ROWS, DIM), F32)
    opt = fastopt.Adam([p], rows="dense")
    for _ in range(5):
        opt.step([slices(rng, F32)[0]])
    before = p.copy()
    state = opt.state_dict()["state"][0]
    assert p.tobytes() == before.tobytes()
    assert state["lr_history"].tolist() == [1e-3] * 5
    assert (state["last_step"].dtype, state["last_step"].max()) == (np.int64, 5)
    state["last_step"][:] = 0
    state["exp_avg"][:] = 0
    assert opt.state_dict()["state"][0]["last_step"].max() == 5  # it was a copy
    opt.flush()
    assert "last_step" not in opt.state_dict()["state"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"last_step": np.full(ROWS, 9)}, r"last_step.*steps from 9 to 9: expected 0 to 5"),
        ({"last_step": np.full(ROWS, -1)}, r"last_step.*steps from -1"),
        ({"last_step": np.zeros(3, np.int64)}, r"last_step.*shape \(3,\): expected \(12,\)"),
        ({"last_step": None}, "one of last_step and lr_history"),
        ({"lr_history": None}, "one of last_step and lr_history"),
        ({"lr_history": np.zeros(6)}, "lr_history.*expected at most 5"),
        ({"lr_history": np.full(5, np.nan)}, "lr_history.*holds nan"),
        ({"lr_history": np.full(5, -0.1)}, "lr_history.*holds -0.1"),
        ({"lr_history": np.zeros(5, np.float32)}, "lr_history.*float32"),
        ({"lr_history": np.zeros((5, 1))}, "lr_history.*shape"),
    ],
)
def test_histories_that_do_not_fit_are_refused(change, message):
    rng = np.random.default_rng(6)
    p = cases.parameter(rng, (ROWS, DIM), F32)
    opt = fastopt.Adam([p], rows="dense")
    for _ in range(5):
        opt.step([slices(rng, F32)[0]])
    before = pickle.dumps(opt.state_dict())
    state = opt.state_dict()
    state["state"][0].update(change)
    state["state"][0] = {name: value for name, value in state["state"][0].items() if value is not None}
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    assert pickle.dumps(opt.state_dict()) == before


def test_the_state_of_other_rows_is_refused():
    p = np.zeros((ROWS, DIM), F32)
    dense, lazy = fastopt.Adam([p], rows="dense"), fastopt.Adam([p.copy()])
    dense.step([slices(np.random.default_rng(7), F32, size=2)[0]])
    for opt, other, message in (
        (dense, lazy, "'lazy': expected 'dense'"),
        (lazy, dense, "'dense': expected"),
    ):
        with pytest.raises(ValueError, match=f"rows {message}"):
            opt.load_state_dict(other.state_dict())


# Limits


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw"])
def test_a_history_that_is_full_starts_anew(name, monkeypatch):
    monkeypatch.setattr(History, "MOST_STEPS", 7)
    rng = np.random.default_rng(8)
    case = cases.BY_NAME[name]
    options = drawn_options(case, rng, name == "adamw", (0.9, 0.999))
    twin = Twin(case, options, F32, rng, schedules.cosine(40))
    sizes = []
    for _ in range(33):
        twin.step(*slices(rng, F32, size=1))
        sizes.append(twin.opt.state_dict()["state"][0]["lr_history"].size)
        twin.opt.load_state_dict(twin.opt.state_dict())
    assert sizes == ([1, 2, 3, 4, 5, 6, 7] * 5)[:33]
    twin.assert_flushed()


@pytest.mark.parametrize("name", ["momentum", "rmsprop", "adam", "radam"])
@pytest.mark.parametrize("zero_lr", [False, True])
def test_rows_never_touched_stay_as_they_are(name, zero_lr):
    rng = np.random.default_rng(9)
    case = cases.BY_NAME[name]
    options = drawn_options(case, rng, False, (0.9, 0.999)) | ({"lr": 0.0} if zero_lr else {})
    p = cases.parameter(rng, (ROWS, DIM), F32)
    p[7] = [0.0, -0.0, 1e-45, 3e38, -1e-30]
    before = p.copy()
    opt = case.make([p], {**options, "rows": "dense"})
    for t in range(40):
        opt.step([IndexedSlices(np.array([t % 3, 0]), cases.gradient(rng, (2, DIM), F32))])
    opt.flush()
    if zero_lr:  # a sum of zeros may lose the sign of one
        np.testing.assert_array_equal(p[3:], before[3:])
    else:
        assert p[3:].tobytes() == before[3:].tobytes()
    assert (p[:3] != before[:3]).any() != zero_lr
    assert np.isfinite(p).all()


def test_skipped_steps_leave_everything():
    rng = np.random.default_rng(10)
    case = cases.BY_NAME["adam"]
    twin = Twin(case, drawn_options(case, rng, False, (0.9, 0.999)), F32, rng)
    for _ in range(5):
        twin.step(*slices(rng, F32))
    before = twin.p.tobytes(), pickle.dumps(twin.opt.state_dict())
    for bad in (np.nan, np.inf):
        g = IndexedSlices(np.array([1, 2]), np.full((2, DIM), bad, F32))
        assert twin.opt.step([g], skip_nonfinite=True).skipped
        assert (twin.p.tobytes(), pickle.dumps(twin.opt.state_dict())) == before
    for _ in range(5):
        twin.step(*slices(rng, F32))
    twin.assert_flushed()


@pytest.mark.parametrize("how", ["option", "schedule", "numpy"])
@pytest.mark.parametrize("optimizer", [fastopt.SGD, fastopt.AdamW])
def test_a_weight_decay_that_takes_all_is_refused_before_anything_changes(optimizer, how):
    rng = np.random.default_rng(11)
    p = cases.parameter(rng, (ROWS, DIM), F32)
    q = np.zeros(3, F32)
    lr = (lambda step: 0.1 if step < 3 else 2.0) if how == "schedule" else 0.1
    opt = optimizer([p, q], lr=lr, weight_decay=0.5, rows="dense")
    for _ in range(3):
        opt.step([slices(rng, F32)[0], np.ones(3, F32)])
    before = p.tobytes(), q.tobytes(), pickle.dumps(opt.state_dict()["state"])
    if how != "schedule":
        opt.param_groups[0]["lr"] = 2.0 if how == "option" else np.float64(2)
    for grads in ([slices(rng, F32)[0], np.ones(3, F32)], [p.copy(), None], [None, None]):
        with pytest.raises(ValueError, match=r"lr is 2.0 and weight_decay 0.5.*lr \* weight_decay below 1"):
            opt.step(grads)
    assert (p.tobytes(), q.tobytes(), pickle.dumps(opt.state_dict()["state"])) == before
    opt.param_groups[0]["lr"] = 1.99
    opt.step([slices(rng, F32)[0], None])
    opt.flush()
    assert np.isfinite(p).all()


# What is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rows": "dense", "step_per_row": True}, ValueError, "rows='dense' and step_per_row=True"),
        ({"rows": "sparse"}, ValueError, "rows of params is 'sparse': expected 'lazy' or 'dense'"),
        ({"rows": None}, ValueError, "rows of params is None: expected"),
        ({"rows": True}, ValueError, "rows of params is True: expected"),
        ({"row": "dense"}, TypeError, "Adam.*'row'"),
    ],
)
def test_unknown_rows_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        fastopt.Adam(np.zeros((2, 2)), **options)


@pytest.mark.parametrize("registered", [False, True])
def test_combinations_are_refused_in_groups_too(registered):
    group = {"params": np.zeros((2, 2)), "step_per_row": True}
    with pytest.raises(ValueError, match=r"params\[0\] has rows='dense' and step_per_row=True"):
        (Signum if registered else fastopt.SGD)([group], rows="dense")


def test_rows_can_not_be_changed_later():
    p = np.zeros((2, 2))
    opt = fastopt.SGD(p)
    for first, second in (("lazy", "dense"), ("dense", "lazy")):
        opt = fastopt.SGD(p, rows=first)
        opt.param_groups[0]["rows"] = second
        with pytest.raises(ValueError, match=f"rows of params is now '{second}', at first '{first}'"):
            opt.step(np.ones((2, 2)))
    assert not p.any()
    opt = fastopt.SGD(p, rows="dense")
    opt.param_groups[0]["step_per_row"] = True
    with pytest.raises(ValueError, match="step_per_row of params is now True, at first False"):
        opt.step(np.ones((2, 2)))


def test_an_optimizer_that_does_not_have_the_table_is_refused():
    table, other = np.zeros((4, 2)), np.ones((4, 2))
    opt = fastopt.SGD(table, rows="dense")
    for read in (fastopt.embedding, partial(fastopt.embedding_bag, mode="sum")):
        with pytest.raises(ValueError, match="table is not a parameter of optimizer"):
            read(other, np.array([[1]]), optimizer=opt)
    assert fastopt.embedding(table.view(), np.array([1]), optimizer=opt).shape == (1, 2)
    lazy = fastopt.SGD(other)
    assert (fastopt.embedding(other, np.array([1]), optimizer=lazy) == 1).all()


def test_reading_out_of_range_brings_nothing_up_to_date():
    rng = np.random.default_rng(12)
    p = cases.parameter(rng, (ROWS, DIM), F32)
    opt = fastopt.SGD([p], lr=0.1, momentum=0.9, rows="dense")
    for _ in range(5):
        opt.step([slices(rng, F32, size=3)[0]])
    before = p.tobytes()
    with pytest.raises(ValueError, match="indices holds 12"):
        fastopt.embedding(p, np.array([0, 12]), optimizer=opt)
    assert p.tobytes() == before


def test_max_norm_acts_on_rows_up_to_date():
    p = np.array([[3.0, 4.0], [1.0, 0.0]])
    opt = fastopt.SGD(p, lr=1.0, momentum=0.5, rows="dense")
    opt.step(IndexedSlices(np.array([0]), np.array([[-3.0, -4.0]])))
    opt.step(IndexedSlices(np.array([1]), np.zeros((1, 2))))
    got = fastopt.embedding(p, np.array([0]), max_norm=25.0, optimizer=opt)
    np.testing.assert_allclose(got, [[7.5, 10.0]], rtol=1e-14)
    got = fastopt.embedding(p, np.array([0]), max_norm=5.0, optimizer=opt)
    np.testing.assert_allclose(got, [[3.0, 4.0]], rtol=1e-6)
    opt.step(IndexedSlices(np.array([1]), np.zeros((1, 2))))
    opt.flush()
    np.testing.assert_allclose(p[0], [3.75, 5.0], rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (1, 1)])
def test_small_and_empty_tables(shape):
    p = np.ones(shape, F32)
    opt = fastopt.Adam(p, rows="dense")
    indices = np.zeros(min(shape[0], 1), np.int64)
    for _ in range(3):
        opt.step(IndexedSlices(indices, np.ones((indices.size, shape[1]), F32)))
        opt.step(IndexedSlices(indices[:0], np.ones((0, shape[1]), F32)))
    state = opt.state_dict()
    opt.load_state_dict(state)
    opt.flush()
    assert opt.steps == 6 and np.isfinite(p).all()
    assert fastopt.embedding(p, indices, optimizer=opt).shape == (indices.size, shape[1])


# Sizes that run in parallel


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_large_tables_equal_dense_steps(name):
    rows, dim = 9_001, 33
    rng = np.random.default_rng(13)
    case = cases.BY_NAME[name]
    options = drawn_options(case, rng, False, (0.9, 0.999))
    assert rows * dim > threads.PARALLEL_FROM
    twin = Twin(case, options, F32, rng, schedules.cosine(20), (rows, dim))
    for _ in range(4):
        indices = np.minimum(rng.zipf(1.2, rows), rows) - 1
        values = cases.gradient(rng, (rows, dim), F32)
        dense = np.zeros((rows, dim), F32)
        np.add.at(dense, indices, values)
        twin.step(IndexedSlices(indices, values), dense)
        twin.step(*slices(rng, F32, rows, dim))
    for _ in range(2):
        indices = rng.integers(0, rows, rows)
        twin.assert_rows(fastopt.embedding(twin.p, indices, optimizer=twin.opt), indices)
    twin.assert_flushed()


@pytest.mark.parametrize(
    ("optimizer", "options", "size"),
    [
        (fastopt.Adam, {}, 1.0),
        (fastopt.Adam, {}, 1e-4),
        (fastopt.Adam, {}, 1e-7),
        (fastopt.AdamW, {"weight_decay": 0.1}, 1e-7),
        (fastopt.SGD, {"momentum": 0.9}, 1.0),
        (fastopt.RMSProp, {}, 1e-4),
    ],
)
def test_two_thousand_steps_with_warmup_and_cosine(optimizer, options, size):
    """One row of a hundred a step, gradients down to where eps is most of the denominator."""
    rng = np.random.default_rng(20)
    lr = 1e-2 * schedules.warmup_cosine(warmup=200, total=2_000)
    dense = rng.standard_normal((500, 4)).astype(F32)
    rows = dense.copy()
    twin, opt = optimizer(dense, lr=lr, **options), optimizer(rows, lr=lr, rows="dense", **options)
    for _ in range(2_000):
        indices = rng.integers(0, 500, 5)
        values = cases.gradient(rng, (5, 4), F32) * F32(size)
        g = np.zeros_like(dense)
        np.add.at(g, indices, values)
        twin.step(g)
        opt.step(IndexedSlices(indices, values))
    opt.flush()
    assert np.abs(rows - dense).max() < 1e-4 * np.abs(dense).max()
    assert np.linalg.norm(rows - dense) < 1e-5 * np.linalg.norm(dense)


def test_a_part_or_another_shape_of_a_table_is_not_its_parameter():
    table = np.zeros((8, 4), F32)
    opt = fastopt.AdamW(table, rows="dense")
    opt.step(IndexedSlices(np.array([1]), np.ones((1, 4), F32)))
    for view in (table[:4], table.reshape(4, 8), table.reshape(-1, 1), table.view(np.int32).view(F32)[1:]):
        with pytest.raises(ValueError, match="table is not a parameter of optimizer"):
            fastopt.embedding(view, np.array([0]), optimizer=opt)
    fastopt.embedding(table[:], np.array([0]), optimizer=opt)
    with pytest.raises(TypeError, match="optimizer is 'adam'"):
        fastopt.embedding(table, np.array([0]), optimizer="adam")
