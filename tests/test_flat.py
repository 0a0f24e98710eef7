"""Many arrays in one launch: each gets the bits that it would get alone, whatever comes and goes between
steps."""

import copy
import pickle
from contextlib import contextmanager

import cases
import ml_dtypes
import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastopt
from fastopt.kernels.cpu import threads as kernel_threads

SEEDS = st.integers(0, 2**32 - 1)
SIZES = [0, 1, 2, 7, 255, 256, 257, 511, 2047, 2048, 2049, 5000]
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
ADAM, MOMENTUM = cases.BY_NAME["adam"], cases.BY_NAME["momentum"]
UNIT = 16 * np.finfo(np.float32).eps  # as in test_rules.py: 16 ulp of the peak of |p| and all updates


def array(rng, shape, dtype=np.float32):
    return cases.parameter(rng, shape, dtype)


def gradients(rng, params):
    return [cases.gradient(rng, p.shape, p.dtype) for p in params]


def state_of(opt, slot=None):
    """The states of all parameters, each as step and bytes, or one slot of them."""
    states = opt.state_dict()["state"].values()
    if slot is not None:
        return [state[slot] for state in states if slot in state]
    return [{k: v if k == "step" else v.tobytes() for k, v in state.items()} for state in states]


def bits(opt, params):
    return [np.asarray(p).tobytes() for p in params], state_of(opt)


@contextmanager
def all_parallel():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_threads, "PARALLEL_FROM", 0)
        yield


@contextmanager
def all_serial():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_threads, "PARALLEL_FROM", 2**62)
        yield


@contextmanager
def threads(count):
    before = numba.get_num_threads()
    numba.set_num_threads(count)
    try:
        yield
    finally:
        numba.set_num_threads(before)


@contextmanager
def way(name):
    """In which variant, and with how many threads, kernels run."""
    if name == "serial":
        with all_serial():
            yield
    else:
        with all_parallel(), threads(int(name)):
            yield


WAYS = ["serial", "1"] + ["2"] * (numba.config.NUMBA_NUM_THREADS > 1)


# Against one optimizer for each array


def check_as_alone(data, rng, sizes, dtypes, name):
    """Groups with options of their own, gradients that are sometimes None; each array against one alone."""
    count = data.draw(st.integers(1, 4), "groups")
    options = [
        {
            "lr": float(rng.uniform(1e-3, 0.1)),
            "weight_decay": 0.0 if g == 0 or rng.random() < 0.3 else float(rng.uniform(0.01, 0.1)),
            "maximize": bool(rng.integers(2)),
            "betas": (float(rng.uniform(0, 0.99)), 0.99),
        }
        for g in range(count)
    ]
    # those of the first group, without weight decay, are of the first dtype: fewer kernels to compile
    owner = [int(rng.integers(count)) for _ in sizes]
    params = [array(rng, n, dtypes[rng.integers(len(dtypes)) if g and options[g]["weight_decay"] else 0])
              for n, g in zip(sizes, owner, strict=True)]  # fmt: skip
    members = [[i for i, g in enumerate(owner) if g == group] for group in range(count)]
    alone = [p.copy() for p in params]
    opts = [fastopt.Adam(p, **options[g]) for p, g in zip(alone, owner, strict=True)]
    groups = [{"params": [params[i] for i in own], **options[g]} for g, own in enumerate(members)]
    opt = fastopt.Adam(groups)
    for _ in range(4):
        grads = [g if rng.random() < 0.8 else None for g in gradients(rng, params)]
        with way(name):
            opt.step([[grads[i] for i in own] for own in members])
        with all_serial():
            for one, g in zip(opts, grads, strict=True):
                if g is not None:
                    one.step(g)
    order = [i for own in members for i in own]
    states = state_of(opt)
    for state, i in zip(states, order, strict=True):
        assert params[i].tobytes() == alone[i].tobytes()
        assert [state] == state_of(opts[i])


@given(data=st.data(), seed=SEEDS, sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=12))
def test_arrays_of_any_dtypes_and_options_get_the_bits_they_get_alone(data, seed, sizes):
    check_as_alone(data, np.random.default_rng(seed), sizes, DTYPES, "serial")


@pytest.mark.parametrize("name", WAYS[1:])
@given(
    data=st.data(),
    seed=SEEDS,
    sizes=st.lists(st.sampled_from([*SIZES, 70_000]), min_size=1, max_size=12),
)
def test_parallel_launches_divide_arrays_anywhere_without_a_trace(name, data, seed, sizes):
    check_as_alone(data, np.random.default_rng(seed), sizes, [np.float32], name)


def test_a_thousand_small_arrays_get_the_bits_of_one_flat_array():
    rng = np.random.default_rng(1)
    check_pieces(rng, rng.integers(0, 40, 1_000).tolist(), None, "serial")


# Against one flat array


def check_pieces(rng, sizes, state_dtype, name):
    options = {"lr": 0.01, "state_dtype": state_dtype, "seed": int(rng.integers(2**62))}
    flat = array(rng, sum(sizes))
    ends = np.cumsum(sizes)[:-1]
    pieces = np.split(flat.copy(), ends)
    opt, opt_flat = fastopt.Adam(pieces, **options), fastopt.Adam(flat, **options)
    for _ in range(3):
        g = cases.gradient(rng, flat.shape, np.float32)
        with way(name):
            opt.step(np.split(g, ends))
        with all_serial():
            opt_flat.step(g)
    assert np.concatenate(pieces).tobytes() == flat.tobytes()
    for slot in opt_flat.state_dict()["state"][0]:
        if slot != "step":
            pieces_of_slot = np.concatenate(state_of(opt, slot))
            assert pieces_of_slot.tobytes() == state_of(opt_flat, slot)[0].tobytes(), slot


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "8bit"])
@given(seed=SEEDS, data=st.data())
def test_pieces_get_the_bits_of_one_flat_array(state_dtype, name, seed, data):
    sizes = data.draw(st.lists(st.sampled_from([*SIZES, 30_000]), min_size=1, max_size=8))
    if state_dtype == "8bit":  # blocks begin with the pieces
        sizes = [-(-n // 256) * 256 for n in sizes[:-1]] + sizes[-1:]
    check_pieces(np.random.default_rng(seed), sizes, state_dtype, name)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
def test_many_arrays_have_the_same_bits_for_any_number_of_threads_variant_and_run(state_dtype):
    found = set()
    for name in [*WAYS, "serial"]:
        rng = np.random.default_rng(3)
        params = [array(rng, n) for n in (70_000, 3, 0, 257, 5_000, 100_001, 256)]
        opt = fastopt.Adam(params, lr=0.01, state_dtype=state_dtype, seed=4)
        for _ in range(3):
            with way(name):
                opt.step(gradients(rng, params))
        found.add(pickle.dumps(bits(opt, params)))
    assert len(found) == 1


# None


@given(seed=SEEDS, count=st.integers(1, 7))
def test_gradients_that_come_and_go_leave_each_parameter_its_own_steps(seed, count):
    rng = np.random.default_rng(seed)
    options = ADAM.options(rng, weight_decay=False)
    params = [array(rng, int(rng.choice(SIZES))) for _ in range(count)]
    opt, want = ADAM.make(params, options), [ADAM.reference(p, options) for p in params]
    present = np.full(count, True)
    for step in range(12):
        if step % 3 == 0:  # stays for some steps, so that what is kept from step to step is used
            present = rng.random(count) < 0.6
        grads = [g if on else None for g, on in zip(gradients(rng, params), present, strict=True)]
        before = [p.tobytes() for p in params]
        opt.step(grads)
        for one, p, g, old in zip(want, params, grads, before, strict=True):
            one.step(g)
            assert g is not None or p.tobytes() == old
    for one, p, state in zip(want, params, opt.state_dict()["state"].values(), strict=True):
        assert state["step"] == one.steps
        np.testing.assert_allclose(p, one.p, rtol=0, atol=UNIT * one.scale)
        assert set(state) == ({"step", *one.state} if one.steps else {"step"})
    assert opt.steps == 12


def test_no_gradients_at_all_are_a_step_without_effect():
    params = [np.ones(3, np.float32), np.ones(2, np.float32)]
    opt = fastopt.Adam(params)
    opt.step([None, None])
    assert (opt.steps, state_of(opt)) == (1, [{"step": 0}, {"step": 0}])
    opt.step([None, np.ones(2, np.float32)])
    assert [state["step"] for state in state_of(opt)] == [0, 1]


# Arrays that are others, or elsewhere, at each step


def twins(rng, sizes=(5, 300, 2049), **options):
    """Two optimizers with equal parameters."""
    params = [array(rng, n) for n in sizes]
    copies = [p.copy() for p in params]
    return params, fastopt.Adam(params, lr=0.01, **options), copies, fastopt.Adam(copies, lr=0.01, **options)


def steady(opt, params, grads):
    """Step with gradients that always lie in the same place, as a trainer that reuses its buffers."""
    buffers = opt.__dict__.setdefault("buffers_of_test", [np.zeros_like(p) for p in params])
    for buffer, g in zip(buffers, grads, strict=True):
        buffer[...] = g
    opt.step(buffers)


def in_new_list(rng, grads):
    return [g.copy() for g in grads]


def in_tuple(rng, grads):
    return tuple(grads)


def shifted(rng, grads):
    """At any offset of memory of their own."""
    offsets = rng.integers(0, 20, len(grads))
    return [np.concatenate([np.zeros(o, g.dtype), g])[o:] for o, g in zip(offsets, grads, strict=True)]


def read_only(rng, grads):
    for g in grads:
        g.flags.writeable = False
    return grads


def subclass(rng, grads):
    return [g.view(type("Own", (np.ndarray,), {})) for g in grads]


def as_tensors(rng, grads):
    torch = pytest.importorskip("torch")
    return [torch.from_numpy(g) for g in grads]


def mixed(rng, grads):
    return [[in_tuple, shifted, subclass, as_tensors][rng.integers(4)](rng, [g])[0] for g in grads]


@pytest.mark.parametrize("change", [in_new_list, in_tuple, shifted, read_only, subclass, as_tensors, mixed])
def test_gradients_may_be_other_arrays_at_each_step(change):
    rng = np.random.default_rng(5)
    params, opt, copies, other = twins(rng)
    for _ in range(6):
        grads = gradients(rng, params)
        opt.step(change(rng, [g.copy() for g in grads]))
        steady(other, copies, grads)
    assert bits(opt, params) == bits(other, copies)


def test_gradients_may_be_swapped_within_their_list():
    rng = np.random.default_rng(6)
    params, opt, copies, other = twins(rng, (64, 64, 64))
    grads = gradients(rng, params)
    for step in range(6):
        grads[step % 3], grads[0] = grads[0], grads[step % 3]
        opt.step(grads)
        steady(other, copies, grads)
    assert bits(opt, params) == bits(other, copies)


def test_gradients_replaced_in_their_list_are_used_also_where_memory_is_used_again():
    rng = np.random.default_rng(7)
    params, opt, copies, other = twins(rng)
    grads = gradients(rng, params)
    for _ in range(20):
        for i in range(3):
            grads[i] = None  # its memory is free for the next
            grads[i] = cases.gradient(rng, params[i].shape, np.float32)
        opt.step(grads)
        steady(other, copies, grads)
    assert bits(opt, params) == bits(other, copies)


def test_torch_parameters_may_move():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(8)
    arrays, _, copies, other = twins(rng)
    params = [torch.nn.Parameter(torch.from_numpy(p.copy())) for p in arrays]
    opt = fastopt.Adam(params, lr=0.01)
    for step in range(6):
        grads = gradients(rng, copies)
        if step % 2:
            params[step % 3].data = params[step % 3].data.clone()
        opt.step([torch.from_numpy(g) for g in grads] if step % 3 else grads)
        steady(other, copies, grads)
    assert bits(opt, [p.detach().numpy() for p in params]) == bits(other, copies)


def test_a_numpy_parameter_may_move_when_it_is_resized_back():
    rng = np.random.default_rng(9)
    params, opt, copies, other = twins(rng, (1000, 20))
    kept = []
    for step in range(6):
        grads = gradients(rng, copies)
        before = params[0].copy()
        params[0].resize(100_000 + step, refcheck=False)
        with pytest.raises(ValueError, match=r"now has shape \(10000\d,\)"):
            opt.step(grads)
        kept.append(np.zeros(1000, np.float32))  # which may take its place
        params[0].resize(1000, refcheck=False)
        assert params[0].tobytes() == before.tobytes()
        opt.step(grads)
        steady(other, copies, grads)
    assert bits(opt, params) == bits(other, copies)


# What is refused


def overlapping(params, grads):
    grads[0] = params[1][: params[0].size]


def with_another_shape(params, grads):
    grads[1] = grads[1][:-1].copy()


def of_another_dtype(params, grads):
    grads[1] = grads[1].astype(np.float64)


def strided(params, grads):
    grads[1] = np.repeat(grads[1], 2)[::2]


def too_few(params, grads):
    del grads[1]


def not_an_array(params, grads):
    grads[1] = [1.0]


BAD = {
    overlapping: (
        ValueError,
        r"grads\[0\] shares memory with params\[1\]|params\[1\] shares memory with grads",
    ),
    with_another_shape: (ValueError, "must be the same"),
    of_another_dtype: (TypeError, "has dtype float64"),
    strided: (ValueError, "expected a C-contiguous"),
    too_few: (ValueError, "expected a list of 3"),
    not_an_array: (TypeError, "is a list"),
}


@pytest.mark.parametrize("again", [False, True], ids=["other gradients", "the same gradients"])
@pytest.mark.parametrize("first_good", [0, 3])
@pytest.mark.parametrize("bad", BAD)
def test_a_refused_step_changes_nothing_and_the_next_is_right(bad, first_good, again):
    rng = np.random.default_rng(10)
    params, opt, copies, other = twins(rng)
    for _ in range(first_good):
        grads = gradients(rng, params)
        opt.step(grads)
        steady(other, copies, grads)
    error, message = BAD[bad]
    for _ in range(3):
        grads = gradients(rng, params)
        given_grads = list(grads)
        bad(params, given_grads)
        before = bits(opt, params)
        with pytest.raises(error, match=message):
            opt.step(given_grads)
        assert bits(opt, params) == before
        if again:
            given_grads[:] = grads
        else:
            given_grads = gradients(rng, params)
        opt.step(given_grads)
        steady(other, copies, given_grads)
        assert bits(opt, params) == bits(other, copies)
    assert opt.steps == other.steps


def test_a_step_refused_for_a_parameter_leaves_nothing_of_its_gradients_behind():
    rng = np.random.default_rng(11)
    params, opt, copies, other = twins(rng, (6, 20))
    first = gradients(rng, params)
    opt.step(first)
    steady(other, copies, first)
    grads = gradients(rng, params)
    opt._parameters.all[0].value.shape = (2, 3)
    with pytest.raises(ValueError, match="now has shape"):
        opt.step(grads)
    opt._parameters.all[0].value.shape = (6,)
    opt.step(grads)  # those that the refused step has seen
    steady(other, copies, grads)
    assert bits(opt, params) == bits(other, copies)


def refused_arguments(opt):
    yield {"clip_norm": -1.0}, ValueError
    yield {"clip_value": "a"}, TypeError
    yield {"grad_scale": 0.0}, ValueError
    yield {"skip_nonfinite": 1}, TypeError
    yield {"zero_grads": None}, TypeError


def test_refused_arguments_and_options_change_nothing():
    rng = np.random.default_rng(12)
    params, opt, copies, other = twins(rng)
    for arguments, error in refused_arguments(opt):
        grads = gradients(rng, params)
        before = bits(opt, params)
        with pytest.raises(error):
            opt.step(grads, **arguments)
        for name, bad in (("lr", -1.0), ("betas", (2, 3)), ("lr", 1e300), ("weight_decay", np.nan)):
            kept = opt.param_groups[0][name]
            opt.param_groups[0][name] = bad
            with pytest.raises(ValueError):
                opt.step(grads)
            opt.param_groups[0][name] = kept
        assert bits(opt, params) == before
        opt.step(grads)
        steady(other, copies, grads)
        assert bits(opt, params) == bits(other, copies)


def test_a_schedule_that_fails_changes_nothing_and_the_next_step_is_right():
    rng = np.random.default_rng(13)
    rates = {}
    params, _, copies, other = twins(rng)
    opt = fastopt.Adam(params, lr=lambda step: rates.get(step, 0.01))
    for step in range(6):
        grads = gradients(rng, params)
        for bad in (-1.0, np.nan, 1e300):
            rates[step] = bad
            before = bits(opt, params)
            with pytest.raises(ValueError):
                opt.step(grads)
            assert bits(opt, params) == before
        del rates[step]
        opt.step(grads)
        steady(other, copies, grads)
    assert bits(opt, params) == bits(other, copies)


def test_skipped_steps_leave_all_as_it_was_and_the_next_is_right():
    rng = np.random.default_rng(14)
    params, opt, copies, other = twins(rng)
    for step in range(6):
        grads = gradients(rng, params)
        value = float(grads[step % 3][1])
        grads[step % 3][1] = [np.nan, np.inf][step % 2]
        before = bits(opt, params)
        info = opt.step(grads, skip_nonfinite=True)
        assert (info.skipped, info.nonfinite) == (True, step % 3)
        assert bits(opt, params) == before
        grads[step % 3][1] = value
        assert not opt.step(grads, skip_nonfinite=True).skipped
        steady(other, copies, grads)
    assert bits(opt, params) == bits(other, copies)


# Copies, and states from elsewhere


def copied(opt, params):
    return copy.deepcopy((opt, params))


def pickled(opt, params):
    return pickle.loads(pickle.dumps((opt, params)))


def loaded(opt, params):
    new_params = [p.copy() for p in params]
    new = fastopt.Adam(new_params, lr=0.5, state_dtype=opt.param_groups[0]["state_dtype"])
    new.load_state_dict(opt.state_dict())
    return new, new_params


def loaded_later(opt, params):
    """Into one that has made steps of its own, with other gradients and for other parameters."""
    new_params = [p.copy() for p in params]
    new = fastopt.Adam(new_params, lr=0.5, state_dtype=opt.param_groups[0]["state_dtype"])
    own = [np.ones_like(p) for p in params]
    for grads in (own, [own[0], None, own[2]]):
        new.step(grads)
    for p, q in zip(new_params, params, strict=True):
        p[...] = q
    new.load_state_dict(opt.state_dict())
    return new, new_params


@pytest.mark.parametrize("state_dtype", [None, "8bit"])
@pytest.mark.parametrize("resume", [copied, pickled, loaded, loaded_later])
def test_training_goes_on_with_the_same_bits(resume, state_dtype):
    rng = np.random.default_rng(15)
    params, opt, copies, other = twins(rng, state_dtype=state_dtype, seed=3)
    for step in range(9):
        if step % 3 == 2:
            former = opt, params, bits(opt, params)
            opt, params = resume(opt, params)
            assert bits(opt, params) == former[2]
        grads = gradients(rng, copies)
        if step in (1, 4):
            grads[1] = None
        opt.step(grads)
        other.step([None if g is None else g.copy() for g in grads])
        assert bits(opt, params) == bits(other, copies)
        if step % 3 == 2:  # and the former one is apart
            assert bits(*former[:2]) == former[2]


# Options


@pytest.mark.parametrize("case", [ADAM, MOMENTUM], ids=str)
def test_options_may_change_between_steps(case):
    rng = np.random.default_rng(16)
    options = [case.options(rng, weight_decay=False) for _ in range(2)]
    params = [array(rng, n) for n in (7, 300, 5, 2049)]
    members = [[0, 1], [2, 3]]
    groups = [{"params": [params[i] for i in own], **options[g]} for g, own in enumerate(members)]
    opt = case.make(groups, {})
    alone = [p.copy() for p in params]
    opts = [case.make([p], options[i // 2]) for i, p in enumerate(alone)]
    want = [case.reference(p, options[i // 2]) for i, p in enumerate(params)]
    changes = {1: (0, "lr", 0.3), 2: (1, "weight_decay", 0.1), 3: (0, "maximize", True), 4: (0, "lr", 0.0),
               5: (1, "weight_decay", 0.0), 6: (0, "weight_decay", 0.05), 7: (1, "maximize", False),
               8: (0, "lr", 0.01), 9: (0, "weight_decay", 0.0), 10: (0, "maximize", False)}  # fmt: skip
    for step in range(12):
        if step in changes:
            group, name, value = changes[step]
            opt.param_groups[group][name] = value
            for i in members[group]:
                opts[i].param_groups[0][name] = value
                want[i].options[name] = value
        grads = gradients(rng, params)
        opt.step([[grads[i] for i in own] for own in members])
        for one, reference, g in zip(opts, want, grads, strict=True):
            one.step([g])
            reference.step(g)
        for p, q in zip(params, alone, strict=True):
            assert p.tobytes() == q.tobytes()
    for p, one, reference, own in zip(params, state_of(opt), want, opts, strict=True):
        np.testing.assert_allclose(p, reference.p, rtol=0, atol=UNIT * reference.scale)
        assert [one] == state_of(own)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["deepcopy", "pickle"]
)
def test_a_copy_adopts_options_that_were_changed_before_it_was_made(duplicate):
    p, g = np.zeros(3, np.float32), np.ones(3, np.float32)
    opt = fastopt.SGD(p, lr=1.0)
    opt.step(g)
    opt.step(g)
    opt.param_groups[0]["lr"] = 0.25
    twin = duplicate(opt)
    for one in (opt, twin):
        one.step(g)
        one.step(g)
        np.testing.assert_array_equal(one.param_groups[0]["params"], -2.5)


@pytest.mark.parametrize(
    "change", [{"weight_decay": 0.5}, {"clip_row_norm": 0.1}, {"maximize": True}], ids=str
)
def test_looking_at_the_state_does_not_hide_a_change_from_dense_parameters(change):
    found = []
    for look in (False, True):
        table, p = np.ones((5, 4), np.float32), np.full((2, 4), 10, np.float32)
        opt = fastopt.SGD([table, p], lr=0.1, momentum=0.9, rows="dense")
        for step in range(3):
            if step == 2:
                opt.param_groups[0].update(change)
                if look:
                    opt.state_dict()
            values = np.ones((1, 4), np.float32)
            opt.step([fastopt.IndexedSlices(np.array([1]), values), np.full((2, 4), 3, np.float32)])
        found.append(p)
    np.testing.assert_array_equal(*found)


def _array_as_learning_rate(opt):
    opt.param_groups[0]["lr"] = np.array([0.1, 0.2])


def _other_params(opt):
    opt.param_groups[0]["params"] = [p.copy() for p in opt.param_groups[0]["params"]]


def _other_groups(opt):
    opt.param_groups = [dict(opt.param_groups[0])]


def _other_group(opt):
    opt.param_groups[0] = dict(opt.param_groups[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_array_as_learning_rate, TypeError, "lr of params is"),
        (_other_params, ValueError, "params of params were changed"),
        (_other_groups, ValueError, "param_groups holds other dicts"),
        (_other_group, ValueError, "param_groups holds other dicts"),
    ],
)
def test_bad_options_are_refused_after_steps_that_were_alike(change, error, message):
    p, g = np.ones(3, np.float32), np.ones(3, np.float32)
    opt = fastopt.Adam([p])
    for _ in range(3):
        opt.step([g])
    before = p.copy()
    change(opt)
    with pytest.raises(error, match=message):
        opt.step([g])
    np.testing.assert_array_equal(p, before)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))],
    ids=["deepcopy", "pickle"],
)
def test_the_views_of_a_copied_buffer_are_its_own(duplicate):
    for shapes in ({"a": (2, 3), "b": 4}, [(2, 3), 4]):
        buffer = fastopt.FlatBuffer(shapes)
        buffer.flat[:] = np.arange(10)
        twin = duplicate(buffer)
        np.testing.assert_array_equal(twin.flat, buffer.flat)
        twin.flat[:] = 1
        first = next(iter(twin.views.values())) if isinstance(shapes, dict) else twin.views[0]
        np.testing.assert_array_equal(first, np.ones((2, 3)))
        np.testing.assert_array_equal(buffer.flat, np.arange(10))


@pytest.mark.parametrize(
    ("shapes", "dtype", "error", "message"),
    [
        (3, np.float32, TypeError, "shapes is 3"),
        ("ab", np.float32, TypeError, "shapes is 'ab'"),
        ([(2, -1)], np.float32, ValueError, "shapes.0. is"),
        ([(2, 0.5)], np.float32, TypeError, "shapes.0. is"),
        ([2], np.int64, TypeError, "dtype is"),
    ],
)
def test_shapes_and_dtypes_of_buffers_that_do_not_fit_are_refused(shapes, dtype, error, message):
    with pytest.raises(error, match=message):
        fastopt.FlatBuffer(shapes, dtype)
