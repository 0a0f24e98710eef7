"""Tables: counts and clipping by row, many in one call, and the same bits for every kind of gradient."""

import copy
import pickle
from typing import NamedTuple

import cases
import numba
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

import fastopt
from fastopt import BagGradient, IndexedSlices, schedules
from fastopt.kernels.cpu import threads
from fastopt.kernels.cpu.backend import rows as row_launches
from fastopt.kernels.cpu.rows import update_tables

F32, F64 = np.float32, np.float64
SEEDS = st.integers(0, 2**32 - 1)


def assert_states(opt, twin, keys=None):
    """The same state, bit for bit; ``keys`` pairs parameters of the two."""
    own, other = opt.state_dict()["state"], twin.state_dict()["state"]
    for a, b in keys or [(key, key) for key in own]:
        assert own[a].keys() == other[b].keys()
        for slot in own[a]:
            np.testing.assert_array_equal(own[a][slot], other[b][slot], strict=True, err_msg=slot)


def sparse(rng, rows, dim, dtype, size):
    return IndexedSlices(rng.integers(0, rows, size), cases.gradient(rng, (size, dim), dtype))


# Steps counted by row


class PerRow:
    """Each row under its own copy of the rule, with its own number of steps."""

    def __init__(self, case, p, options):
        self.rows = [case.reference(row[None], options) for row in p]

    def step(self, g, **changed):
        if g is None:
            return
        if isinstance(g, IndexedSlices):
            rows, sums = reference.coalesce(g.indices, g.values)
        else:
            rows, sums = range(len(self.rows)), np.asarray(g, F64)
        for row, total in zip(rows, sums, strict=True):
            self.rows[row].step(total[None], **changed)

    def assert_follows(self, p, state, ulps=32):
        unit = ulps * np.finfo(p.dtype).eps
        assert state["row_steps"].dtype == np.int64
        assert state["row_steps"].tolist() == [row.steps for row in self.rows]
        for k, row in enumerate(self.rows):
            np.testing.assert_allclose(p[k], row.p[0], rtol=0, atol=unit * row.scale)
            for name, array in row.state.items():
                np.testing.assert_allclose(
                    state[name][k], array[0], rtol=0, atol=unit * row.state_scale[name], err_msg=name
                )


PER_ROW = [("adam", F32, {}), ("adamw", F64, {"weight_decay": 0.1}), ("radam", F64, {"betas": (0.9, 0.9)}),
           ("adagrad_decay", F32, {}), ("dampening", F64, {"weight_decay": 0.1}),
           ("rowwise_adam", F64, {}), ("rowwise_adagrad", F32, {}),
           ("nadam", F32, {}), ("lion", F64, {})]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "more"), PER_ROW)
@given(seed=SEEDS, schedule=st.booleans())
def test_each_row_counts_its_own_steps(name, dtype, more, seed, schedule):
    rng = np.random.default_rng(seed)
    case = cases.BY_NAME[name]
    options = {**case.options(rng, weight_decay=False), **more}
    p = cases.parameter(rng, (8, 3), dtype)
    want = PerRow(case, p, options)
    times = schedules.warmup_cosine(warmup=4, total=20) if schedule else schedules.constant()
    lr = options["lr"]
    opt = case.make([p], {**options, "lr": lr * times, "step_per_row": True})
    for at in range(15):
        kind = rng.integers(6)
        if kind == 0:
            g = None
        elif kind == 1:
            g = cases.gradient(rng, (8, 3), dtype)
        else:
            g = sparse(rng, 8, 3, dtype, rng.integers(0, 5))
        opt.step([g])
        want.step(g, lr=lr * times(at))
    state = opt.state_dict()["state"][0]
    assert "row_steps" in state or not state["step"]
    if state["step"]:
        want.assert_follows(p, state)


def test_rows_wait_for_their_first_step():
    p = np.zeros((3, 2))
    opt = fastopt.Adam(p, lr=0.1, eps=0.0, step_per_row=True)
    lazy = np.zeros((3, 2))
    opt_lazy = fastopt.Adam(lazy, lr=0.1, eps=0.0)
    for _ in range(50):
        for one in (opt, opt_lazy):
            one.step(IndexedSlices(np.array([0]), np.ones((1, 2))))
    for one in (opt, opt_lazy):
        one.step(IndexedSlices(np.array([2]), np.ones((1, 2))))
    np.testing.assert_allclose(p[2], -0.1, rtol=1e-12)  # as in a first step
    assert abs(lazy[2, 0] + 0.1) > 0.02
    assert opt.state_dict()["state"][0]["row_steps"].tolist() == [50, 0, 1]


@pytest.mark.parametrize("way", ["state_dict", "save", "deepcopy", "pickle"])
@pytest.mark.parametrize("first_dense", [False, True])
def test_counts_are_saved_and_resumed_bit_for_bit(way, first_dense, tmp_path):
    rng = np.random.default_rng(1)
    p = cases.parameter(rng, (8, 3), F32)
    opt = fastopt.Adam([p], lr=0.05 * schedules.cosine(30), step_per_row=True)
    for at in range(8):
        dense = first_dense and at < 2
        opt.step([cases.gradient(rng, (8, 3), F32) if dense else sparse(rng, 8, 3, F32, 3)])
    if way in ("deepcopy", "pickle"):
        twin, q = copy.deepcopy((opt, p)) if way == "deepcopy" else pickle.loads(pickle.dumps((opt, p)))
    else:
        q = p.copy()
        twin = fastopt.Adam([q], lr=0.05 * schedules.cosine(30), step_per_row=True)
        if way == "save":
            opt.save(tmp_path / "saved")
            twin.load(tmp_path / "saved")
        else:
            twin.load_state_dict(opt.state_dict())
    assert_states(opt, twin)
    for at in range(12):
        g = cases.gradient(rng, (8, 3), F32) if at == 5 else sparse(rng, 8, 3, F32, 4)
        opt.step([g])
        twin.step([g])
    assert p.tobytes() == q.tobytes()
    assert_states(opt, twin)


@pytest.mark.parametrize("count", [-1, 9, 2**40])
def test_counts_that_a_row_can_not_have_are_refused(count):
    p = np.zeros((3, 2))
    opt = fastopt.Adam(p, step_per_row=True)
    opt.step(IndexedSlices(np.array([1]), np.ones((1, 2))))
    state = opt.state_dict()
    state["state"][0]["row_steps"][1] = count
    before = pickle.dumps(opt.state_dict())
    with pytest.raises(ValueError, match="row_steps"):
        opt.load_state_dict(state)
    assert pickle.dumps(opt.state_dict()) == before


def test_a_registered_rule_whose_first_number_is_not_lr_has_no_counts_by_row():
    class LastH(NamedTuple):
        momentum: float = 0.5
        lr: float = 0.1

    def heavy_ball(h, p, g, buffer):
        buffer = h.momentum * buffer + g
        return p - h.lr * buffer, buffer

    make = fastopt.register_rule("Last", LastH, heavy_ball, ["buffer"])
    with pytest.raises(
        ValueError, match=r"step_per_row=True: expected False, as Last .* first number is not lr"
    ):
        make(np.zeros((3, 2)), step_per_row=True)


def test_one_dimension_is_counted_as_a_whole():
    p, q = np.zeros(4), np.zeros(4)
    opt, twin = fastopt.Adam(p, step_per_row=True), fastopt.Adam(q)
    for one in (opt, twin):
        for _ in range(3):
            one.step(np.ones(4))
    assert p.tobytes() == q.tobytes()
    assert "row_steps" not in opt.state_dict()["state"][0]


def test_options_changed_between_steps_count_for_every_row():
    rng = np.random.default_rng(2)
    case = cases.BY_NAME["adam"]
    options = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    p = cases.parameter(rng, (6, 3), F64)
    want = PerRow(case, p, options)
    opt = fastopt.Adam([p], step_per_row=True, **options)
    changed = {}
    for change in ({}, {"betas": (0.5, 0.9)}, {"lr": 0.01}, {"eps": 1e-2}, {"betas": (0.9, 0.999)}):
        changed |= change
        opt.param_groups[0].update(change)
        for _ in range(3):
            g = sparse(rng, 6, 3, F64, 3)
            opt.step([g])
            want.step(g, **changed)
    want.assert_follows(p, opt.state_dict()["state"][0])


# Clipping by row


def clipped(rows, limit):
    norms = np.sqrt((rows.astype(F64) ** 2).sum(axis=1, keepdims=True))
    return rows * np.minimum(1, limit / (norms + 1e-6))


@pytest.mark.parametrize("kind", ["slices", "bags", "dense"])
@pytest.mark.parametrize("dtype", [F32, F64])
@given(seed=SEEDS, limit=st.sampled_from([0.0, 0.3, 2.0, 1e6]), scale=st.sampled_from([1.0, 0.125]),
       clip=st.sampled_from([None, 0.5, 100.0]), maximize=st.booleans())  # fmt: skip
def test_row_norms_are_clipped_after_scaling(kind, dtype, seed, limit, scale, clip, maximize):
    rng = np.random.default_rng(seed)
    p = cases.parameter(rng, (7, 5), dtype)
    before = p.astype(F64)
    dense = np.zeros((7, 5), dtype)
    if kind == "slices":
        g = sparse(rng, 7, 5, dtype, 9)
        np.add.at(dense, g.indices, g.values)
    elif kind == "bags":
        indices, g_bags = rng.integers(0, 7, (3, 2)), cases.gradient(rng, (3, 5), dtype)
        np.add.at(dense, indices, g_bags[:, None] / 2)
        g = BagGradient(indices, None, g_bags, "mean")
    else:
        g = dense = cases.gradient(rng, (7, 5), dtype)
    opt = fastopt.SGD([p], lr=0.5, maximize=maximize, clip_row_norm=limit)
    info = opt.step([g], grad_scale=scale, clip_norm=clip)
    want = dense.astype(F64) * scale
    if clip is not None:
        norm = np.sqrt((want**2).sum())
        np.testing.assert_allclose(info.norm, norm, rtol=1e-6)
        want = want * min(1, clip / (norm + 1e-6))
    step = clipped(want, limit) * (-0.5 if maximize else 0.5)
    np.testing.assert_allclose(p, before - step, rtol=0, atol=16 * np.finfo(dtype).eps * 8)


@pytest.mark.parametrize("options", [{"step_per_row": True}, {"rows": "dense"}, {}])
def test_clipping_goes_with_the_other_options(options):
    rng = np.random.default_rng(3)
    p = cases.parameter(rng, (7, 5), F32)
    q = p.copy()
    opt = fastopt.Adam([p], lr=0.1, clip_row_norm=0.5, **options)
    twin = fastopt.Adam([q], lr=0.1, **options)
    for _ in range(6):
        indices, values = rng.permutation(7)[:4], 4 * cases.gradient(rng, (4, 5), F32)
        opt.step([IndexedSlices(indices, values)])
        twin.step([IndexedSlices(indices, clipped(values, 0.5).astype(F32))])
    opt.flush()
    twin.flush()
    np.testing.assert_allclose(p, q, rtol=0, atol=2e-5)


def test_a_row_that_is_not_finite_leaves_others():
    p = np.zeros((3, 2))
    opt = fastopt.SGD(p, lr=1.0, clip_row_norm=1.0)
    opt.step(np.array([[np.nan, 1.0], [3.0, 4.0], [np.inf, 1.0]]))
    np.testing.assert_allclose(p[1], [-0.6, -0.8], rtol=1e-6)
    assert np.isnan(p[0]).all()
    assert np.isnan(p[2, 0])


@pytest.mark.parametrize("shape", [(4,), (), (2, 3, 4)])
def test_only_tables_are_clipped_by_row(shape):
    p, table = np.zeros(shape), np.zeros((4, 2))
    opt = fastopt.SGD([table, p], lr=1.0, clip_row_norm=1.0)
    with pytest.raises(ValueError, match=r"grads\[1\] has shape.*clip_row_norm is 1.0: expected a 2-D"):
        opt.step([np.ones((4, 2)), np.ones(shape)])
    assert not table.any() and opt.steps == 0
    opt.step([np.ones((4, 2)), None])
    assert table.any()


@pytest.mark.parametrize("limit", [-1.0, float("nan"), float("inf"), "1", True])
def test_limits_of_rows_out_of_range_are_refused(limit):
    with pytest.raises((ValueError, TypeError), match="clip_row_norm of params is"):
        fastopt.SGD(np.zeros((2, 2)), clip_row_norm=limit)


def test_the_limit_of_rows_can_be_changed():
    p = np.zeros((2, 2))
    opt = fastopt.SGD(p, lr=1.0)
    for limit, moved in ((None, 4.0), (1.0, 0.8), (0.5, 0.4), (None, 4.0)):
        p[:] = 0
        opt.param_groups[0]["clip_row_norm"] = limit
        opt.step(IndexedSlices(np.array([1]), np.array([[3.0, 4.0]])))
        np.testing.assert_allclose(p, [[0, 0], [-0.75 * moved, -moved]], rtol=1e-6)


# Many tables at once

SHAPES = [(1, 1), (3, 64), (2000, 4), (17, 7), (1, 128), (500, 16), (4, 3), (0, 5), (5, 0), (90, 33),
          (12, 8), (12, 8), (7, 100)] * 2  # fmt: skip


def of_table(rng, shape, dtype):
    """None, a gradient of slices or of bags."""
    rows, dim = shape
    kind = rng.integers(4)
    if kind == 0:
        return None
    if not rows:
        return IndexedSlices(np.zeros(0, np.int64), np.zeros((0, dim), dtype))
    if kind == 1:
        size = int(rng.integers(1, 40))
        offsets = np.sort(rng.integers(0, size, 4))
        offsets[0] = 0
        g = cases.parameter(rng, (4, dim), dtype)
        mode = ["sum", "mean", "max"][rng.integers(3)]
        return BagGradient(rng.integers(0, rows, size).astype(np.int32), offsets, g, mode)
    size = int(rng.integers(0, 300))
    return IndexedSlices(np.minimum(rng.zipf(1.3, size), rows) - 1, cases.parameter(rng, (size, dim), dtype))


MANY = [
    ("adam", {}), ("adam", {"step_per_row": True}), ("adam", {"rows": "dense"}), ("rowwise_adagrad", {}),
    ("momentum", {"clip_row_norm": 0.5}), ("momentum", {"rows": "dense"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "more"), MANY)
def test_many_tables_have_the_bits_of_one_by_one(name, more):
    rng = np.random.default_rng(4)
    case = cases.BY_NAME[name]
    options = {**case.options(rng, weight_decay=False), **more}
    together = [cases.parameter(rng, shape, F32) for shape in SHAPES]
    apart = [p.copy() for p in together]
    opt = case.make(together, options)
    opts = [case.make([p], options) for p in apart]
    for _ in range(5):
        grads = [of_table(rng, shape, F32) for shape in SHAPES]
        opt.step(grads)
        for one, g in zip(opts, grads, strict=True):
            one.step([g])
    assert len({entry["step"] for entry in opt.state_dict()["state"].values()}) > 2
    for one in (opt, *opts):
        one.flush()
    for key, (p, q) in enumerate(zip(together, apart, strict=True)):
        assert p.tobytes() == q.tobytes()
        assert_states(opt, opts[key], [(key, 0)])


def mixed(rng):
    """Groups that differ in lr, weight decay and dtype, with their parameters."""
    params = [cases.parameter(rng, (30, 6), dtype) for dtype in (F32, F64, F32, F32, F32)]
    params += [cases.parameter(rng, 11, F32)]
    options = [{"lr": 0.1}, {"lr": 0.02, "weight_decay": 0.1}, {"lr": 0.3, "maximize": True},
               {"rows": "dense"}]  # fmt: skip
    return params, [[0, 1], [2], [3, 5], [4]], options


def test_mixed_groups_have_the_bits_of_one_by_one():
    rng = np.random.default_rng(5)
    together, members, options = mixed(rng)
    apart = [p.copy() for p in together]
    opt = fastopt.Adam(
        [{"params": [together[k] for k in own], **o} for own, o in zip(members, options, strict=True)]
    )
    of = {k: o for own, o in zip(members, options, strict=True) for k in own}
    opts = [fastopt.Adam([p], **of[k]) for k, p in enumerate(apart)]
    order = [k for own in members for k in own]
    for _ in range(6):
        grads = [of_table(rng, p.shape, p.dtype.type) if p.ndim == 2 else cases.gradient(rng, 11, F32)
                 for p in together]  # fmt: skip
        opt.step([[grads[k] for k in own] for own in members])
        for one, g in zip(opts, grads, strict=True):
            one.step([g])
    for one in (opt, *opts):
        one.flush()
    for key, k in enumerate(order):
        assert together[k].tobytes() == apart[k].tobytes()
        assert_states(opt, opts[k], [(key, 0)])


@given(seed=SEEDS, clip=st.sampled_from([0.5, 1e6]))
def test_the_norm_is_that_of_all_tables(seed, clip):
    rng = np.random.default_rng(seed)
    params, members, _ = mixed(rng)
    order = [k for own in members for k in own]
    opt = fastopt.SGD([{"params": [params[k] for k in own]} for own in members], lr=1.0)
    before = [p.astype(F64) for p in params]
    grads, dense = {}, {}
    for k, p in enumerate(params):
        if p.ndim == 2:
            grads[k] = sparse(rng, *p.shape, p.dtype.type, 20)
            dense[k] = np.zeros(p.shape)
            np.add.at(dense[k], grads[k].indices, grads[k].values)
        else:
            grads[k] = dense[k] = cases.gradient(rng, p.shape, F32)
    info = opt.step([[grads[k] for k in own] for own in members], clip_norm=clip, grad_scale=0.5)
    norm = 0.5 * np.sqrt(sum((g.astype(F64) ** 2).sum() for g in dense.values()))
    np.testing.assert_allclose(info.norm, norm, rtol=1e-6)
    assert info.clipped == (clip < norm)
    for k in order:
        want = before[k] - dense[k] * 0.5 * min(1, clip / (norm + 1e-6))
        np.testing.assert_allclose(params[k], want, rtol=0, atol=1e-5)


class Counted:
    def __init__(self):
        self.calls = []

    def ready(self, work, arguments, types):
        self.calls.append(len(arguments[6]))
        return update_tables.ready(work, arguments, types)


def test_tables_of_a_kind_are_updated_in_one_launch(monkeypatch):
    rng = np.random.default_rng(6)
    counted = Counted()
    monkeypatch.setattr(row_launches, "update_tables", counted)
    params = [cases.parameter(rng, (9, dim), F32) for dim in (1, 3, 8, 64)]
    opt = fastopt.Adam([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}])
    grads = [sparse(rng, *p.shape, F32, 5) for p in params]
    opt.step([grads[:2], grads[2:]])
    assert counted.calls == [4]
    opt.step([[grads[0], None], [None, np.ones((9, 64), F32)]])
    opt.step([grads[:2], grads[2:]])
    assert counted.calls == [4, 1, 4]
    counted.calls.clear()
    params, members, options = mixed(rng)
    opt = fastopt.Adam(
        [{"params": [params[k] for k in own], **o} for own, o in zip(members, options, strict=True)]
    )
    grads = [sparse(rng, *p.shape, p.dtype.type, 5) if p.ndim == 2 else None for p in params]
    opt.step([[grads[k] for k in own] for own in members])
    assert sorted(counted.calls) == [1, 1, 1, 2]  # float64, weight decay and dense rows apart


# The same bits for every kind of gradient


@pytest.mark.parametrize(
    ("case", "decay"),
    [*((case, False) for case in cases.RULES), *((case, True) for case in cases.DECAYED)],
    ids=str,
)
def test_every_kind_of_gradient_gives_the_same_bits(case, decay):
    dtype = F64 if decay else F32  # as in test_rules.py, whose kernels these are
    for maximize in (False, True):
        rng = np.random.default_rng(7)
        options = {**case.options(rng, weight_decay=decay), "maximize": maximize}
        start = cases.parameter(rng, (9, 13), dtype)
        tables = [start.copy() for _ in range(5)]
        opts = [case.make([p], options) for p in tables]
        for _ in range(3):
            g = cases.parameter(rng, (9, 13), dtype)
            order = rng.permutation(9)
            kinds = [
                g,
                IndexedSlices(order, g[order]),
                BagGradient(order[:, None], None, g[order], mode="sum"),
                BagGradient(order, np.arange(9), g[order], "mean"),
                BagGradient(order[:, None], None, g[order], "max"),
            ]
            for opt, one in zip(opts, kinds, strict=True):
                opt.step([one], grad_scale=0.3)
        assert not np.array_equal(tables[0], start)
        for opt, p in zip(opts[1:], tables[1:], strict=True):
            assert p.tobytes() == tables[0].tobytes()
            assert_states(opt, opts[0])


# State that lies together


@pytest.mark.parametrize("name", ["momentum", "adam", "amsgrad", "rowwise_adam", "rmsprop_centered_momentum"])
@pytest.mark.parametrize("shape", [(6, 5), (1, 4), (7, 1)])
def test_dense_and_sparse_steps_alternate_as_if_of_one_kind(name, shape):
    rng = np.random.default_rng(8)
    case = cases.BY_NAME[name]
    options = case.options(rng, weight_decay=False)
    start = cases.parameter(rng, shape, F32)
    patterns = ["dddd" * 2, "ssss" * 2, "sdsd" * 2, "dsds" * 2, "ssdd" * 2, "sddds" + "dsd"]
    tables = [start.copy() for _ in patterns]
    opts = [case.make([p], options) for p in tables]
    for at in range(8):
        g = cases.parameter(rng, shape, F32)
        for opt, pattern in zip(opts, patterns, strict=True):
            opt.step([IndexedSlices(np.arange(shape[0]), g) if pattern[at] == "s" else g])
            if at == 4:
                opt.load_state_dict(opt.state_dict())
    for opt, p in zip(opts, tables, strict=True):
        assert p.tobytes() == tables[0].tobytes()
        assert_states(opt, opts[0])


def test_state_is_given_out_as_contiguous_copies(tmp_path):
    rng = np.random.default_rng(9)
    p = cases.parameter(rng, (6, 5), F32)
    opt = fastopt.AMSGrad([p])
    opt.step([sparse(rng, 6, 5, F32, 4)])
    inner = opt._parameters.all[0].state
    assert not inner["exp_avg"].flags.c_contiguous  # or this tests nothing
    state = opt.state_dict()["state"][0]
    for slot in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert state[slot].flags.c_contiguous and state[slot].flags.owndata
        kept = inner[slot].copy()
        state[slot][:] = 7
        np.testing.assert_array_equal(inner[slot], kept)
    opt.save(tmp_path / "saved", params=True)
    twin = fastopt.AMSGrad([np.zeros((6, 5), F32)])
    twin.load(tmp_path / "saved", params=True)
    assert_states(opt, twin)
    opt_2, p_2 = copy.deepcopy((opt, p))
    g = sparse(rng, 6, 5, F32, 4)
    for one in (opt, opt_2, twin):
        one.step([g])
    assert_states(opt, twin)
    assert_states(opt, opt_2)
    assert p.tobytes() == p_2.tobytes()


# Any number of threads, both variants


def run(options, rows=9_001, width=33, small=3):
    rng = np.random.default_rng(10)
    tables = [cases.parameter(rng, (rows, width), F32)]
    tables += [cases.parameter(rng, (k + 1, 7), F32) for k in range(small)]
    opt = fastopt.Adam(tables, lr=0.01, **options)
    for _ in range(3):
        grads = []
        for p in tables:
            size = p.shape[0]
            indices = np.minimum(rng.zipf(1.3, size), size) - 1
            grads.append(IndexedSlices(indices, cases.parameter(rng, (size, p.shape[1]), F32)))
        opt.step(grads, clip_norm=5.0)
        fastopt.embedding(tables[0], rng.integers(0, rows, rows), optimizer=opt)
    opt.flush()
    arrays = [*tables]
    for state in opt.state_dict()["state"].values():
        arrays += [array for slot, array in state.items() if slot != "step"]
    return b"".join(array.tobytes() for array in arrays)


@pytest.mark.parametrize(
    "options", [{"rows": "dense"}, {"step_per_row": True}, {"clip_row_norm": 1.0}], ids=str
)
@cases.needs_two_threads
def test_the_same_bits_for_any_number_of_threads_and_variant(options, restored_threads, monkeypatch):
    assert threads.PARALLEL_FROM < 9_001 * 33
    first = run(options)
    numba.set_num_threads(1)
    assert run(options) == first
    monkeypatch.setattr(threads, "PARALLEL_FROM", 2**62)
    assert run(options) == first


def test_small_tables_have_the_same_bits_in_both_variants(monkeypatch):
    for options in ({"rows": "dense"}, {"step_per_row": True}):
        serial = run(options, 40, 5, 9)
        with monkeypatch.context() as patch:
            patch.setattr(threads, "PARALLEL_FROM", 0)
            assert run(options, 40, 5, 9) == serial
