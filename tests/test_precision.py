"""Parameters of 16 bits, state of 16 or 8, and master weights: every step follows the formula from what is
stored, up to one rounding of what is stored then."""

import copy
import pickle

import cases
import ml_dtypes
import numba
import numpy as np
import pytest
import reference
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fastopt
from fastopt import BagGradient, IndexedSlices
from fastopt.kernels.cpu import threads

BFLOAT16 = ml_dtypes.bfloat16
SOME = settings(max_examples=settings().max_examples // 2)
SEEDS = st.integers(0, 2**32 - 1)
LOW = np.float16, BFLOAT16
NOT_NEGATIVE = {"sum", "exp_avg_sq", "max_exp_avg_sq", "square_avg"}


class Combination:
    """An optimizer with dtypes; ``state``: the option, ``decay``: whether there is weight decay."""

    def __init__(self, name, dtype, state=None, master=False, decay=False):
        self.case, self.dtype, self.state, self.master = cases.BY_NAME[name], np.dtype(dtype), state, master
        self.decay = decay
        self.name = f"{name}-{self.dtype}-{state}{'-master' * master}{'-decay' * decay}"
        self.double = self.dtype == np.float64
        # a step rounds once in some ten operations of what is computed with, as in test_rules.py, and
        # three times in decoding a root, in float32 always
        wide = self.double and state != "8bit"
        self.unit = 20 * np.finfo(np.float64 if wide else np.float32).eps

    def options(self, rng):
        own = self.case.options(rng, self.decay)
        if "betas" in own:  # so that sums of the state are seen soon
            own["betas"] = float(rng.uniform(0.2, 0.9)), float(rng.uniform(0.5, 0.99))
        return own

    def make(self, p, options, **more):
        own = {"state_dtype": self.state, "master_weights": self.master, **more}
        return self.case.make(p, {**options, **own})


# Each format of parameter and state with some rule; not all rules with all, each is compiled apart
DENSE_AND_SPARSE = [
    Combination("adam", np.float32, "bfloat16"),
    Combination("adam", np.float32, "8bit"),
    Combination("adam", BFLOAT16, "bfloat16", decay=True),
    Combination("adamw_amsgrad", BFLOAT16, "8bit", master=True, decay=True),
    Combination("dampening", np.float16),
    Combination("adagrad", np.float16, "bfloat16", master=True),
    Combination("radam", np.float64, "float32"),
    Combination("rowwise_adagrad", BFLOAT16, master=True),
]
COMBINATIONS = [*DENSE_AND_SPARSE, Combination("momentum", np.float64, "8bit")]
with_each = pytest.mark.parametrize("of", COMBINATIONS, ids=lambda of: of.name)
with_sparse = pytest.mark.parametrize("of", DENSE_AND_SPARSE, ids=lambda of: of.name)


# The stored state as float64


def stored_state(opt, key=0):
    return opt.state_dict()["state"][key]


def as_numbers(state):
    """The slots of the rule in float64."""
    numbers = {}
    for slot, a in state.items():
        if slot in ("step", "master") or slot.endswith("_scale"):
            continue
        if a.dtype == np.uint8:
            numbers[slot] = reference.decoded(a, state[slot + "_scale"], slot not in NOT_NEGATIVE)
        else:
            numbers[slot] = a.astype(np.float64)
    return numbers


def rounding(x, dtype):
    """Half the distance of neighbours of ``dtype`` at ``x``, at most."""
    info = ml_dtypes.finfo(dtype)
    return np.abs(x) * float(info.eps) / 2 + float(info.smallest_subnormal) / 2


class Follower:
    """One parameter and its optimizer, each step of which is compared with the float64 reference that starts
    from what was stored before it."""

    def __init__(self, of, rng, shape, **more):
        self.of, self.rng, self.shape = of, rng, shape
        options = of.options(rng)
        self.p = cases.parameter(rng, shape, of.dtype)
        self.opt = of.make(self.p, options, **more)
        self.want = of.case.reference(self.p, options)
        self.stored_p = self.p.astype(np.float64)

    def gradient(self, shape=None):
        dtype = self.of.dtype if self.rng.integers(2) or self.of.dtype not in LOW else np.float32
        return cases.gradient(self.rng, self.shape if shape is None else shape, dtype)

    def step(self, g, plain):
        """A step with ``g``, for the reference ``plain``: an array or (rows, values)."""
        before = self.stored_p
        state = as_numbers(stored_state(self.opt)) or self.want.state
        own = reference.Tracked(self.want.rule, before, self.want.options)
        own.steps, own.state = self.want.steps, state
        terms = self.terms(before, state, plain)
        self.opt.step(g)
        own.step(plain)
        self.want.steps = own.steps
        self.check_parameter(own, terms)
        self.check_state(own, terms)

    def terms(self, before, state, plain):
        """The same step of magnitudes: rounding errors scale with the terms of a sum, which may cancel."""
        terms = reference.Tracked(self.want.rule, np.abs(before), {**self.want.options, "maximize": False})
        terms.steps, terms.state = self.want.steps, {slot: np.abs(a) for slot, a in state.items()}
        terms.step((plain[0], np.abs(plain[1])) if isinstance(plain, tuple) else np.abs(plain))
        return terms

    def check_parameter(self, own, terms):
        of, state = self.of, stored_state(self.opt)
        slack = of.unit * max(own.scale, terms.scale)
        now = self.p.astype(np.float64)
        if of.master and of.dtype in LOW:
            assert state["master"].dtype == np.float32
            assert self.p.tobytes() == state["master"].astype(of.dtype).tobytes()
            now = state["master"].astype(np.float64)
        elif of.dtype in LOW:
            slack = slack + rounding(np.abs(own.p) + slack, of.dtype)
        assert (np.abs(now - own.p) <= slack).all()
        self.stored_p = now

    def check_state(self, own, terms):
        of, state = self.of, stored_state(self.opt)
        numbers = as_numbers(state)
        assert set(numbers) == set(own.state)
        assert state["step"] == own.steps
        for slot, want in own.state.items():
            got, slack = numbers[slot], of.unit * reference.peak(terms.state[slot])
            if state[slot].dtype == np.uint8:
                self.check_codes(slot, state[slot + "_scale"], got, want, slack)
                continue
            by_row = got.ndim < len(self.shape) or "rowwise" in of.case.name
            dtype = {"bfloat16": BFLOAT16, "float32": np.float32}.get(of.state if not by_row else None)
            dtype = np.dtype(dtype or (np.float64 if of.double else np.float32))
            assert state[slot].dtype == dtype
            if of.state == "bfloat16" and not by_row:  # either neighbour
                slack = slack + 2 * rounding(np.abs(want) + slack, BFLOAT16)
            elif of.double and dtype == np.float32:
                slack = slack + rounding(np.abs(want) + slack, np.float32)
            assert (np.abs(got - want) <= slack).all(), slot

    def check_codes(self, slot, scales, got, want, slack):
        signed = slot not in NOT_NEGATIVE
        scale = reference.spread_scales(scales, self.shape)
        if not want.size:
            return
        # the scale is the largest of the block
        flat = want.reshape(-1, want.shape[-1]) if scales.ndim == 2 else want.reshape(1, -1)
        for row, row_scales in zip(flat, np.atleast_2d(scales), strict=True):
            for k, found in enumerate(row_scales):
                largest = max(reference.peak(row[256 * k : 256 * k + 256]), 2.0**-120)
                # of a table's rows without a gradient yet all is zero
                assert abs(found - largest) <= slack or (found == 0 and largest == 2.0**-120)
        if not signed:
            # of the root, where the slack of the square counts for more the smaller it is
            low, high = np.sqrt(np.maximum(want - slack, 0)), np.sqrt(want + slack)
            error = reference.code_error(high, np.sqrt(scale), False)
            assert (np.sqrt(got) >= low - error).all()
            assert (np.sqrt(got) <= high + error).all()
        else:
            error = reference.code_error(np.abs(want) + slack, scale, True)
            assert (np.abs(got - want) <= slack + error).all()


@with_each
@SOME
@given(seed=SEEDS, shape=st.sampled_from([(), (1,), (0,), (300,), (5, 3), (2, 300), (2, 2, 140), (4, 0)]))
@example(seed=90590, shape=())
def test_each_dense_step_follows_the_formula_from_what_is_stored(of, seed, shape):
    follower = Follower(of, np.random.default_rng(seed), shape)
    for _ in range(5):
        g = follower.gradient()
        follower.step(g, g)


@pytest.mark.parametrize("of", COMBINATIONS[:2], ids=lambda of: of.name)
def test_large_dense_steps_follow_the_formula_from_what_is_stored(of):
    follower = Follower(of, np.random.default_rng(1), (150_001,))
    for _ in range(3):
        g = cases.gradient(follower.rng, follower.shape, of.dtype)
        follower.step(g, g)


def sparse(follower, count):
    """A gradient by rows, and what the reference gets for it."""
    rng, (rows, dim) = follower.rng, follower.shape
    indices = rng.integers(0, rows, count)
    if rng.integers(2):
        values = follower.gradient((count, dim))
        return IndexedSlices(indices, values), (indices, values.astype(np.float64))
    offsets = np.sort(np.concatenate([[0], rng.integers(0, count + 1, 3)]))
    mode = ["sum", "mean"][rng.integers(2)]
    if mode == "mean":  # of powers of two, so that sums have few bits
        offsets = np.arange(0, count + 1, 4)[: max(1, (count + 3) // 4)]
    outputs = follower.gradient((len(offsets), dim))
    sizes = np.diff([*offsets, count])
    values = np.repeat(outputs.astype(np.float64), sizes, axis=0)
    if mode == "mean":
        values /= np.repeat(np.maximum(sizes, 1), sizes)[:, None]
    return BagGradient(indices, offsets, outputs, mode), (indices, values)


@with_sparse
@SOME
@given(
    seed=SEEDS, shape=st.sampled_from([(1, 1), (9, 5), (6, 256), (7, 300), (3, 0)]), count=st.integers(0, 24)
)
def test_each_sparse_step_follows_the_formula_and_leaves_other_rows(of, seed, shape, count):
    follower = Follower(of, np.random.default_rng(seed), shape)
    for _ in range(4):
        gradient, (indices, values) = sparse(follower, count)
        before, state = follower.p.copy(), stored_state(follower.opt)
        follower.step(gradient, (indices, values))
        others = np.setdiff1d(np.arange(shape[0]), indices)
        assert follower.p[others].tobytes() == before[others].tobytes()
        now = stored_state(follower.opt)
        for slot in set(state) - {"step"}:
            assert now[slot][others].tobytes() == state[slot][others].tobytes(), slot


@pytest.mark.parametrize("of", [DENSE_AND_SPARSE[0], *DENSE_AND_SPARSE[2:]], ids=lambda of: of.name)
@SOME
@given(seed=SEEDS)
def test_dense_and_sparse_steps_follow_the_formula_in_any_order(of, seed):
    rng = np.random.default_rng(seed)
    follower = Follower(of, rng, (7, 300))
    if of.state == "8bit":  # its blocks end with rows from the first sparse gradient on
        gradient, plain = sparse(follower, 12)
        follower.step(gradient, plain)
    for _ in range(6):
        if rng.integers(2):
            gradient, plain = sparse(follower, 12)
            follower.step(gradient, plain)
        else:
            g = follower.gradient()
            follower.step(g, g)


# Rounding at random


def bytes_of(opt, *params):
    state = opt.state_dict()["state"].values()
    slots = [(k, np.asarray(a).tobytes()) for s in state for k, a in s.items()]
    return [p.tobytes() for p in params], slots


def trained(of, seed, gradients, shape=(7, 300)):
    rng = np.random.default_rng(2)
    p = cases.parameter(rng, shape, of.dtype)
    opt = of.make(p, of.options(rng), seed=seed)
    for _ in range(3):
        values = cases.gradient(rng, shape, of.dtype)
        indices = np.minimum(rng.zipf(1.3, shape[0]), shape[0]) - 1 if len(shape) == 2 else None
        opt.step(IndexedSlices(indices, values) if gradients == "sparse" else values)
    return bytes_of(opt, p)


RANDOM = [of for of in DENSE_AND_SPARSE if of.state in ("bfloat16", "8bit")]


@pytest.mark.parametrize("gradients", ["dense", "sparse"])
@pytest.mark.parametrize("of", RANDOM, ids=lambda of: of.name)
def test_the_seed_decides_the_bits(of, gradients):
    first = trained(of, 1, gradients)
    assert trained(of, 1, gradients) == first
    assert trained(of, 2, gradients) != first
    assert trained(of, 2**63 - 1, gradients) != first


@pytest.mark.parametrize("of", [DENSE_AND_SPARSE[4], DENSE_AND_SPARSE[6]], ids=lambda of: of.name)
def test_the_seed_is_of_no_consequence_where_nothing_is_rounded_at_random(of):
    assert trained(of, 1, "dense") == trained(of, 2, "dense")


@pytest.mark.parametrize("of", DENSE_AND_SPARSE[1:2], ids=lambda of: of.name)
@cases.needs_two_threads
def test_sparse_steps_have_the_same_bits_for_any_number_of_threads_and_variant(
    of, restored_threads, monkeypatch
):
    first = trained(of, 1, "sparse", (3_001, 67))
    numba.set_num_threads(1)
    assert trained(of, 1, "sparse", (3_001, 67)) == first
    monkeypatch.setattr(threads, "PARALLEL_FROM", 2**62)
    assert trained(of, 1, "sparse", (3_001, 67)) == first


def test_state_of_bfloat16_does_not_stand_still_where_steps_are_below_its_precision():
    # (1 - beta2) * g^2 is 2^-10 of the second moment's limit g^2: rounded to the nearest, it would stop at a
    # quarter of it, where the increment is half a spacing. At random the mean goes on: 3,000 steps on it is
    # g^2 * (1 - exp(-3)). A rounding has a deviation of at most half a spacing, 2^-9 of g^2, and
    # they decay by beta2 a step: 2^-9 / sqrt(2 * 2^-10) = 2^-4.5 an element, over 4,096 of them 7e-4.
    p = np.zeros(4096, np.float32)
    opt = fastopt.Adam(p, lr=0.0, betas=(0.5, 1 - 2.0**-10), state_dtype="bfloat16")
    g = np.ones(4096, np.float32)
    for _ in range(3_000):
        opt.step(g)
    v = stored_state(opt)["exp_avg_sq"].astype(np.float64)
    assert abs(v.mean() - (1 - (1 - 2.0**-10) ** 3_000)) < 6 * 7e-4


def test_small_gradients_beside_large_ones_make_no_large_steps():
    # A first moment below its first code is that or 0, 2^-19 of the block's largest M, and the root of the
    # second at least 2^-20 of the block's largest R. With betas (0.9, 0.999) and corrections M / R is at most
    # (1 - 0.9) / sqrt(1 - 0.999) = 3.2 if the large gradient comes as a surprise, here about 1.
    for small in (1e-4, 1e-6, 1e-8):
        rng = np.random.default_rng(11)
        p = np.zeros(256, np.float32)
        opt = fastopt.Adam(p, lr=1.0, state_dtype="8bit")
        for _ in range(300):
            g = (small * rng.standard_normal(256)).astype(np.float32)
            g[0] = rng.choice([-1, 1])
            before = p.copy()
            opt.step(g)
            assert reference.peak(p - before) < 2 * 3.2


# Saved and resumed


@pytest.mark.parametrize("of", [DENSE_AND_SPARSE[k] for k in (2, 3, 5)], ids=lambda of: of.name)
@pytest.mark.parametrize("way", ["state_dict", "file", "pickle", "deepcopy"])
def test_a_resumed_run_has_the_bits_of_one_without_interruption(of, way, tmp_path):
    rng = np.random.default_rng(3)
    options, shapes = of.options(rng), ((300,), (7, 300), (9, 4))
    params = [cases.parameter(rng, shape, of.dtype) for shape in shapes]
    copies = [p.copy() for p in params]
    opt, whole = of.make(params, options, seed=5), of.make(copies, options, seed=5)
    for step in range(6):
        if step == 3:
            before = bytes_of(opt, *params)
            if way in ("pickle", "deepcopy"):
                pair = opt, params
                opt, params = pickle.loads(pickle.dumps(pair)) if way == "pickle" else copy.deepcopy(pair)
            else:
                new = [p.copy() for p in params] if way == "state_dict" else [np.ones_like(p) for p in params]
                fresh = of.make(new, options, seed=77)
                if way == "state_dict":
                    fresh.load_state_dict(opt.state_dict())
                else:
                    opt.save(tmp_path / "opt.safetensors", params=True)
                    fresh.load(tmp_path / "opt.safetensors", params=True)
                opt, params = fresh, new
            assert bytes_of(opt, *params) == before
            assert [s["step"] for s in opt.state_dict()["state"].values()] == [3, 3, 3]
        indices = rng.integers(0, 7, 5)
        grads = [cases.gradient(rng, shape, of.dtype) for shape in ((300,), (5, 300), (9, 4))]
        grads[1] = IndexedSlices(indices, grads[1])
        opt.step(grads)
        whole.step(grads)
        assert bytes_of(opt, *params) == bytes_of(whole, *copies)


def test_states_of_other_dtypes_are_refused_and_nothing_changes():
    def make(**options):
        p = np.ones(300, BFLOAT16)
        opt = fastopt.Adam(p, weight_decay=0.1, **options)
        opt.step(np.ones(300, BFLOAT16))
        return opt, p

    kinds = [{}, {"state_dtype": "bfloat16"}, {"state_dtype": "8bit", "master_weights": True}]
    for own in kinds:
        for other in kinds:
            opt, p = make(**own)
            saved = make(**other)[0].state_dict()
            before = bytes_of(opt, p)
            if own == other:
                opt.load_state_dict(saved)
            else:
                with pytest.raises((ValueError, TypeError), match=r"state_dtype|master_weights"):
                    opt.load_state_dict(saved)
            assert bytes_of(opt, p) == before
    opt, p = make(state_dtype="8bit", master_weights=True)
    for slot, bad in (
        ("exp_avg", np.zeros(300, np.int8)),
        ("exp_avg_scale", np.zeros(3, np.float32)),
        ("exp_avg_sq", np.zeros(300, np.float32)),
        ("master", np.zeros(300, BFLOAT16)),
    ):
        saved, before = opt.state_dict(), bytes_of(opt, p)
        saved["state"][0][slot] = bad
        with pytest.raises((ValueError, TypeError), match=slot):
            opt.load_state_dict(saved)
        assert bytes_of(opt, p) == before


# Options

SPELLINGS = [
    (None, None),
    *((s, "float32") for s in ("float32", np.float32, np.dtype(np.float32), "f4")),
    *((s, "bfloat16") for s in ("bfloat16", BFLOAT16, np.dtype(BFLOAT16))),
    *((s, "8bit") for s in ("8bit", np.int8, np.uint8, "int8", "uint8", np.dtype(np.uint8))),
]


@pytest.mark.parametrize(("given_dtype", "want"), SPELLINGS, ids=str)
def test_state_dtypes_may_be_names_and_dtypes(given_dtype, want):
    opt = fastopt.Adam(np.ones(3), state_dtype=given_dtype)
    assert opt._parameters.groups[0].checked["state_dtype"] == want


def test_state_dtypes_may_be_those_of_torch():
    torch = pytest.importorskip("torch")
    for dtype, want in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.int8, "8bit"),
                        (torch.uint8, "8bit")):  # fmt: skip
        opt = fastopt.Adam(np.ones(3), state_dtype=dtype)
        assert opt._parameters.groups[0].checked["state_dtype"] == want
    for dtype in (torch.float16, torch.float64, torch.int32):
        with pytest.raises(ValueError, match=r"^state_dtype of params is torch"):
            fastopt.Adam(np.ones(3), state_dtype=dtype)


@pytest.mark.parametrize(
    "bad", ["float16", "fp8", "", np.float16, np.float64, np.int16, bool, 8, 1.5, True, [], {}, np.ones(2)],
    ids=str,
)  # fmt: skip
def test_other_state_dtypes_are_refused(bad):
    with pytest.raises(
        (ValueError, TypeError), match=r"^state_dtype of params is .*: expected None, 'float32'"
    ):
        fastopt.Adam(np.ones(3), state_dtype=bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"master_weights": 1}, "master_weights of params is 1: expected True or False"),
        ({"master_weights": None}, "master_weights of params is None: expected True or False"),
        ({"seed": -1}, "seed of params is -1: expected a whole number"),
        ({"seed": 2**63}, "seed of params is 9223372036854775808: expected a whole number"),
        ({"seed": 1.0}, "seed of params is 1.0: expected a whole number"),
        ({"seed": True}, "seed of params is True: expected a whole number"),
        ({"seed": None}, "seed of params is None: expected a whole number"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        fastopt.Adam(np.ones(3), **options)


def test_formats_can_not_be_changed_later_and_the_seed_can():
    p = np.ones(300, BFLOAT16)
    options = {"weight_decay": 0.1, "state_dtype": "bfloat16"}
    opt = fastopt.Adam(p, **options)
    g = np.ones(300, BFLOAT16)
    opt.step(g)
    for name, value in (("state_dtype", "8bit"), ("state_dtype", None), ("master_weights", True)):
        kept, before = opt.param_groups[0][name], bytes_of(opt, p)
        opt.param_groups[0][name] = value
        with pytest.raises(ValueError, match=f"^{name} of params is now"):
            opt.step(g)
        opt.param_groups[0][name] = kept
        assert bytes_of(opt, p) == before
    other_p = p.copy()
    other = fastopt.Adam(other_p, **options)
    other.load_state_dict(opt.state_dict())
    other.param_groups[0]["seed"] = 9
    rng = np.random.default_rng(4)
    for _ in range(2):
        g = cases.gradient(rng, 300, BFLOAT16)
        opt.step(g)
        other.step(g)
    assert bytes_of(opt, p) != bytes_of(other, other_p)


# Gradients of float32, and models of several dtypes


@pytest.mark.parametrize("dtype", LOW)
def test_gradients_of_float32_count_with_all_their_digits(dtype):
    # 1 + 2^-16 is beyond either type; a master keeps what it does
    p = np.zeros(3, dtype)
    opt = fastopt.SGD(p, lr=1.0, master_weights=True)
    g = np.float32([1 + 2.0**-16, 2.0**-20, -1 - 2.0**-20])
    opt.step(g)
    np.testing.assert_array_equal(stored_state(opt)["master"], -g)
    np.testing.assert_array_equal(p, (-g).astype(dtype))
    opt.step(-2 * g)
    np.testing.assert_array_equal(stored_state(opt)["master"], g)


@pytest.mark.parametrize("dtype", LOW)
def test_gradients_of_other_dtypes_are_refused(dtype):
    other = LOW[1] if dtype is LOW[0] else LOW[0]
    p = np.ones(3, dtype)
    opt = fastopt.SGD(p)
    for bad in (np.float64, other, np.int16, np.uint16):
        with pytest.raises(
            TypeError, match=f"^grads has dtype {np.dtype(bad)} but params has {np.dtype(dtype)}"
        ):
            opt.step(np.ones(3, bad))
    single = fastopt.SGD(np.ones(3, np.float32))
    for bad in (dtype, np.float64):
        with pytest.raises(TypeError, match=r"but params has float32: pass grads.astype\(np.float32\)"):
            single.step(np.ones(3, bad))
    assert (p == 1).all()


def test_master_weights_add_up_what_the_parameter_can_not_show():
    p, plain = np.ones(5, BFLOAT16), np.ones(5, BFLOAT16)
    opt, other = fastopt.SGD(p, lr=2.0**-12, master_weights=True), fastopt.SGD(plain, lr=2.0**-12)
    for _ in range(64):  # of 2^-12 each, where neighbours are 2^-8 apart
        opt.step(np.ones(5, BFLOAT16))
        other.step(np.ones(5, BFLOAT16))
    np.testing.assert_array_equal(p.astype(np.float32), 1 - 2.0**-6)
    np.testing.assert_array_equal(plain.astype(np.float32), 1)


def test_a_model_of_several_dtypes_trains_as_its_parts_alone():
    rng = np.random.default_rng(5)
    dtypes = {"a": np.float32, "b": BFLOAT16, "c": np.float16, "d": np.float32, "e": BFLOAT16}
    params = {name: cases.parameter(rng, (40, 7) if name == "e" else 300, d) for name, d in dtypes.items()}
    copies = {name: p.copy() for name, p in params.items()}
    options = {"lr": 0.01, "weight_decay": 0.1}
    opt = fastopt.Adam(params, **options)
    alone = {name: fastopt.Adam(p, **options) for name, p in copies.items()}
    for step in range(4):
        grads = {name: cases.gradient(rng, p.shape, p.dtype) for name, p in params.items()}
        grads["b"] = grads["b"].astype(np.float32) if step % 2 else grads["b"]
        opt.step(grads)
        for name, one in alone.items():
            one.step(grads[name])
    for name, p in params.items():
        assert p.tobytes() == copies[name].tobytes(), name
        assert bytes_of(alone[name])[1] == [
            (k, np.asarray(a).tobytes()) for k, a in stored_state(opt, name).items()
        ]


# Where gradients are not finite or the parameter's range is left


def test_what_is_beyond_a_parameters_range_becomes_infinite_and_its_master_does_not():
    p = np.full(2, 60_000, np.float16)
    opt = fastopt.SGD(p, lr=1.0, master_weights=True)
    opt.step(np.float32([-10_000, 0]))
    np.testing.assert_array_equal(p, np.float16([np.inf, 60_000]))
    np.testing.assert_array_equal(stored_state(opt)["master"], [70_000, 60_000])
    opt.step(np.float32([10_000, 0]))
    np.testing.assert_array_equal(p, np.float16([60_000, 60_000]))


@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_state(state_dtype, bad):
    p = np.ones(700, np.float32)
    opt = fastopt.Adam(p, lr=0.01, state_dtype=state_dtype)
    g = np.ones(700, np.float32)
    opt.step(g)
    g[300] = bad
    opt.step(g)
    touched = slice(256, 512) if state_dtype == "8bit" else slice(300, 301)
    for numbers in as_numbers(stored_state(opt)).values():
        assert not np.isfinite(numbers[touched]).any()
        numbers[touched] = 0
        assert np.isfinite(numbers).all()
    opt.step(np.ones(700, np.float32))
    assert np.isnan(p[touched]).all()
    p[touched] = 0
    assert np.isfinite(p).all()


# rows="dense"


def test_rows_are_caught_up_in_their_master():
    of = Combination("momentum", BFLOAT16, None, master=True)
    rng = np.random.default_rng(6)
    options = of.options(rng)
    p = cases.parameter(rng, (9, 20), BFLOAT16)
    opt, want = of.make(p, options, rows="dense"), of.case.reference(p, options)
    for step in range(12):
        indices = rng.integers(0, 9, 3) if step % 4 else np.arange(9)
        values = cases.gradient(rng, (len(indices), 20), BFLOAT16)
        opt.step(IndexedSlices(indices, values))
        dense = np.zeros((9, 20))
        np.add.at(dense, indices, values.astype(np.float64))
        want.step(dense)
    opt.flush()
    state = stored_state(opt)
    # a row's missed steps are a few more roundings in one go
    np.testing.assert_allclose(state["master"], want.p, rtol=0, atol=of.unit * want.scale)
    assert p.tobytes() == state["master"].astype(BFLOAT16).tobytes()


def test_rows_are_caught_up_with_rounded_state():
    # The buffer is rounded when it is written, by 2^-7 of it at most, and what has come of that decays by the
    # momentum: an error of peak * 2^-7 / (1 - momentum) at any time, lr times that a step in the parameter.
    rng = np.random.default_rng(7)
    momentum, lr, steps = 0.5, 0.05, 12
    case = cases.BY_NAME["momentum"]
    options = {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "maximize": False}
    p = cases.parameter(rng, (9, 20), np.float32)
    opt = fastopt.SGD(p, lr=lr, momentum=momentum, rows="dense", state_dtype="bfloat16")
    want = case.reference(p, options)
    for step in range(steps):
        indices = rng.integers(0, 9, 2) if step % 4 else np.arange(9)
        values = cases.gradient(rng, (len(indices), 20), np.float32)
        opt.step(IndexedSlices(indices, values))
        dense = np.zeros((9, 20))
        np.add.at(dense, indices, values.astype(np.float64))
        want.step(dense)
    opt.flush()
    error = want.state_scale["momentum_buffer"] * 2.0**-7 / (1 - momentum)
    buffer = stored_state(opt)["momentum_buffer"].astype(np.float64)
    assert (np.abs(buffer - want.state["momentum_buffer"]) <= error).all()
    assert (np.abs(p - want.p) <= lr * steps * error).all()


# 8-bit codes of tables: blocks go on over rows, from the first gradient by rows on they end with rows


@pytest.mark.parametrize("shape", [(7, 300), (9, 5), (3, 256), (1, 700)])
def test_codes_are_rounded_to_the_nearest_when_blocks_come_to_end_with_rows(shape):
    rng = np.random.default_rng(8)
    p = cases.parameter(rng, shape, np.float32)
    opt = fastopt.Adam(p, lr=0.01, state_dtype="8bit")
    for _ in range(2):
        sizes = 10.0 ** rng.integers(-3, 1, (shape[0], 1))
        opt.step((cases.gradient(rng, shape, np.float32) * sizes).astype(np.float32))
    flat, kept = as_numbers(stored_state(opt)), p.copy()
    opt.step(IndexedSlices(np.zeros(0, np.int64), np.zeros((0, shape[1]), np.float32)))
    assert p.tobytes() == kept.tobytes()
    state = stored_state(opt)
    for slot, want in flat.items():
        scales = state[slot + "_scale"]
        assert scales.shape == (shape[0], -(-shape[1] // 256))
        got, scale = as_numbers(state)[slot], reference.spread_scales(scales, shape)
        signed, power = (True, 1) if slot == "exp_avg" else (False, 0.5)
        x, y, largest = np.abs(want) ** power, np.abs(got) ** power, scale**power
        # to the nearest: half the distance of codes, but for roots above 0 that do not become 0
        error = reference.code_error(x, largest, signed) * (1 + 2.0**-18)
        first = reference.code_levels(signed)[1] * largest
        assert (np.abs(x - y) <= np.where((x < first) & (not signed), error, error / 2)).all()
        assert ((got > 0) == (want > 0)).all() or signed
    follower_bits = bytes_of(opt, p)
    fresh_p = p.copy()
    fresh = fastopt.Adam(fresh_p, lr=0.01, state_dtype="8bit")
    fresh.step(np.ones(shape, np.float32))  # which has blocks over rows when it loads
    fresh_p[...] = p
    fresh.load_state_dict(opt.state_dict())
    assert bytes_of(fresh, fresh_p) == follower_bits
    for step in range(3):
        g = cases.gradient(rng, shape, np.float32)
        given_g = IndexedSlices(np.arange(shape[0])[::-1].copy(), g) if step == 1 else g
        opt.step(given_g)
        fresh.step(given_g)
        assert bytes_of(opt, p) == bytes_of(fresh, fresh_p)
        assert stored_state(opt)["exp_avg_scale"].ndim == 2


def test_a_state_with_blocks_over_rows_can_be_gone_back_to():
    rng = np.random.default_rng(9)
    shape = (7, 300)
    p, other_p = (np.ones(shape, np.float32) for _ in range(2))
    opt, other = (fastopt.Adam(x, lr=0.01, state_dtype="8bit") for x in (p, other_p))
    g = [cases.gradient(rng, shape, np.float32) for _ in range(4)]
    for one in (opt, other):
        one.step(g[0])
    saved, kept = opt.state_dict(), p.copy()
    opt.step(IndexedSlices(np.arange(3), g[1][:3].copy()))
    opt.step(g[2])
    opt.load_state_dict(saved)
    p[...] = kept
    for step in (1, 2):
        for one in (opt, other):
            one.step(g[step])
        assert bytes_of(opt, p) == bytes_of(other, other_p)
    assert stored_state(opt)["exp_avg_scale"].ndim == 1


def test_a_refused_sparse_gradient_leaves_codes_as_they_were():
    rng = np.random.default_rng(10)
    p = np.ones((7, 300), np.float32)
    opt = fastopt.Adam(p, lr=0.01, state_dtype="8bit")
    opt.step(cases.gradient(rng, p.shape, np.float32))
    before = bytes_of(opt, p)
    for bad in (
        IndexedSlices(np.array([7]), np.ones((1, 300), np.float32)),
        IndexedSlices(np.array([1]), np.ones((1, 299), np.float32)),
        IndexedSlices(np.array([1]), p[:1]),
    ):
        with pytest.raises((ValueError, IndexError)):
            opt.step(bad)
        assert bytes_of(opt, p) == before
    opt.step(cases.gradient(rng, p.shape, np.float32))
    assert stored_state(opt)["exp_avg_scale"].ndim == 1


@pytest.mark.parametrize("shape", [(), (700,), (3, 300), (5, 2, 150)], ids=str)
@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
def test_rules_with_a_number_a_row_take_fewer_bits_for_arrays_of_any_shape(shape, state_dtype):
    rng = np.random.default_rng(31)
    p = cases.parameter(rng, shape, np.float32)
    exact = p.copy()
    options = {"lr": 0.01, "betas": (0.5, 0.9)}
    opt, other = (
        fastopt.RowwiseAdam(p, state_dtype=state_dtype, **options),
        fastopt.RowwiseAdam(exact, **options),
    )
    for _ in range(4):
        g = cases.gradient(rng, shape, np.float32)
        opt.step(g)
        other.step(g)
    # the root of the second moment is exact; a code of the first is off by at most 1/8 of it in each step
    np.testing.assert_allclose(p, exact, rtol=0, atol=4 * 0.01 * 3 / 8)
    state = opt.state_dict()["state"][0]
    if state_dtype == "8bit":
        rows = shape[0] if shape else 1
        assert state["exp_avg_scale"].shape == (rows, -(-p.size // rows // 256))
        assert state["exp_avg_scale"].any(axis=1).all() or not g.any()
