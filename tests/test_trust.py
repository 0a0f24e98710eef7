"""Rules with a trust ratio: the length of a step depends on the whole array, or row."""

import ml_dtypes
import numba
import numpy as np
import pytest
import reference

from fastopt.kernels import formats, layout, rules
from fastopt.kernels.cpu import trust
from fastopt.kernels.cpu.backend.addresses import address
from fastopt.kernels.cpu.row_means import NOT_FOUND
from fastopt.kernels.cpu.stored_rows import update_apart
from fastopt.kernels.cpu.threads import run
from fastopt.kernels.rule import Scaled

# around the ends of runs, of what is gathered and of blocks of sums
SIZES = [0, 1, 255, 257, 1_023, 1_025, 0, trust.SUMMED - 1, trust.SUMMED, trust.SUMMED + 1, 20_000, 3]
OPTIONS = {"lr": 0.02, "betas": (0.85, 0.97), "eps": 1e-4, "weight_decay": 0.3}
SCALE, LIMIT = -0.5, 0.9  # of the gradient: maximised, unscaled and clipped
MANY = 2**40  # elements, that a launch is parallel

PLAIN, BFLOAT16, STOCHASTIC = formats.PLAIN, formats.BFLOAT16, formats.STOCHASTIC
KINDS = {
    "float32": (np.float32, (PLAIN, PLAIN, PLAIN, PLAIN)),
    "float64": (np.float64, (PLAIN, PLAIN, PLAIN, PLAIN)),
    "bfloat16": (np.float32, (formats.BFLOAT16_OF, BFLOAT16, STOCHASTIC, STOCHASTIC)),
    "8-bit": (np.float32, (BFLOAT16, PLAIN, formats.SIGNED8, formats.ROOT8)),
}
ERRORS = {BFLOAT16: 2.0**-8, STOCHASTIC: 2.0**-7, formats.SIGNED8: 2.0**-3, formats.ROOT8: 0.13}


class Stored:
    """An array in a format: what is stored, and the master or scales at the second address."""

    def __init__(self, x, kind, dtype):
        self.kind, self.dtype = kind, dtype
        self.second = None
        if kind is PLAIN:
            self.first = np.array(x, dtype)
        elif kind.coded:
            assert not np.any(x)
            self.first = np.zeros(np.size(x), np.uint8)
            self.second = np.zeros(-(-np.size(x) // formats.BLOCK), np.float32)
        else:
            self.first = np.array(x, ml_dtypes.bfloat16).view(np.uint16)
            if kind is formats.BFLOAT16_OF:
                self.second = np.array(x, dtype)

    @property
    def values(self):
        """As computed with."""
        if self.kind is PLAIN:
            return self.first
        if self.kind is formats.BFLOAT16_OF:
            return self.second
        if self.kind.coded:
            return self._decoded()
        return self.first.view(ml_dtypes.bfloat16).astype(self.dtype)

    def _decoded(self):
        signed = self.kind is formats.SIGNED8
        code = self.first.astype(np.uint32)
        shift = formats.SIGNED_SHIFT if signed else formats.ROOT_SHIFT
        bits = ((code & (127 if signed else 255)) << shift) + formats.LOWEST_BITS
        scale = np.repeat(self.second, formats.BLOCK)[: code.size]
        x = bits.astype(np.uint32).view(np.float32) - formats.LOWEST
        if signed:
            return np.where(code & 128, -x, x) * scale / formats.SIGNED_SPAN
        return (x / formats.ROOT_SPAN) ** 2 * scale

    def places(self):
        return address(self.first), 0 if self.second is None else address(self.second)


class Table:
    """Arrays ``ps`` with their state, and what kernels are called with."""

    def __init__(self, rule, ps, dtype, members):
        self.rule, self.dtype, self.members = rule, dtype, members
        self.ps = [Stored(p, members[0], dtype) for p in ps]
        self.states = [[Stored(np.zeros_like(p), kind, dtype) for kind in members[2:]] for p in ps]

    def arguments(self, grads, step, options, zero_grads=False, chunk=512, first=0):
        h, c = self.rule.fold(step, options, self.dtype), Scaled(SCALE, LIMIT)
        numbers = np.array([[*h, *c]])
        table = np.zeros((len(self.ps), layout.ARRAY_PLACES + 2 * len(self.members)), np.int64)
        for row, p, g, state in zip(table, self.ps, grads, self.states, strict=True):
            row[layout.ARRAY_PLACES :] = np.array([array.places() for array in (p, g, *state)]).reshape(-1)
        table[:, layout.ARRAY_KEY] = step
        bases = np.cumsum([0, *(p.first.size for p in self.ps)])
        table[:, layout.ARRAY_POSITION] = bases[:-1] + first
        h, c = (type(t)(*map(float, t)) for t in (h, c))  # as launches have them, which share this kernel
        kinds = formats.formats(*self.members)
        return h, c, self.dtype(0), kinds, table, bases, numbers, zero_grads, chunk

    def step(self, grads, step, options, work=1, **others):
        given = self.arguments(grads, step, options, **others)
        types = type(given[0]), type(given[1]), self.dtype, self.members
        run(trust.update_whole_arrays(work, types, *given))

    def gradients(self, rng):
        return [Stored(rng.standard_normal(p.first.size), self.members[1], self.dtype) for p in self.ps]

    def bits(self):
        stored = [array for p, state in zip(self.ps, self.states, strict=True) for array in (p, *state)]
        return b"".join(s.first.tobytes() + (b"" if s.second is None else s.second.tobytes()) for s in stored)


def parameters(rng, sizes=SIZES):
    return [rng.standard_normal(size) * 10.0 ** rng.integers(-2, 3) for size in sizes]


def scaled(g):
    return np.clip(SCALE * g.astype(np.float64), -LIMIT, LIMIT)


@pytest.mark.parametrize("name", KINDS)
def test_lamb_follows_the_formula(name):
    dtype, members = KINDS[name]
    rng = np.random.default_rng(1)
    table = Table(rules.LAMB, parameters(rng), dtype, members)
    unit = 32 * np.finfo(dtype).eps
    for step in range(1, 4):
        grads = table.gradients(rng)
        before = [p.values.astype(np.float64) for p in table.ps]
        want_states = [
            dict(zip(rules.LAMB.slots, (s.values.astype(np.float64) for s in state), strict=True))
            for state in table.states
        ]
        table.step(grads, step, OPTIONS)
        for p, g, old, want_state, state in zip(
            table.ps, grads, before, want_states, table.states, strict=True
        ):
            want = reference.lamb(old, scaled(g.values), want_state, step, **OPTIONS)
            atol = unit * reference.peak(want) + ERRORS.get(members[0], 0) * np.abs(want)
            assert np.all(np.abs(p.values - want) <= atol)
            if p.kind is formats.BFLOAT16_OF:
                rounded = p.second.astype(ml_dtypes.bfloat16)
                np.testing.assert_array_equal(p.first.view(ml_dtypes.bfloat16), rounded)
            for stored, value in zip(state, want_state.values(), strict=True):
                error = ERRORS.get(stored.kind, 0) * np.abs(value)
                error += 2.0**-18 * reference.peak(value) * (stored.kind.coded)
                assert np.all(np.abs(stored.values - value) <= unit * reference.peak(value) + error)


def test_an_adafactor_of_vectors_follows_the_formula():
    rng = np.random.default_rng(2)
    table = Table(rules.ADAFACTOR, parameters(rng), np.float32, (PLAIN,) * 3)
    options = {"lr": 0.5, "beta2_decay": -0.7, "eps": (1e-3, 0.1), "d": 0.8}
    want = [p.values.astype(np.float64) for p in table.ps]
    state = [{"variance": np.zeros(p.size)} for p in want]
    for step in range(1, 4):
        grads = table.gradients(rng)
        table.step(grads, step, options)
        for k, (p, g) in enumerate(zip(table.ps, grads, strict=True)):
            want[k] = reference.adafactor(want[k], scaled(g.values), state[k], step, **options)
            atol = 1e-5 * reference.peak(want[k])
            np.testing.assert_allclose(p.values, want[k], rtol=0, atol=atol)
            variance = table.states[k][0].values
            np.testing.assert_allclose(variance, state[k]["variance"], rtol=1e-5)


def test_bits_depend_on_neither_threads_nor_chunks_nor_company(restored_threads):
    dtype, members = KINDS["8-bit"]

    def run(work, chunk, alone):
        rng = np.random.default_rng(3)
        table = Table(rules.LAMB, parameters(rng), dtype, members)
        for step in range(1, 3):
            grads = table.gradients(rng)
            if not alone:
                table.step(grads, step, OPTIONS, work, chunk=chunk)
                continue
            first = 0
            for p, state, g in zip(table.ps, table.states, grads, strict=True):
                single = Table(rules.LAMB, [], dtype, members)
                single.ps, single.states = [p], [state]
                single.step([g], step, OPTIONS, work, chunk=chunk, first=first)
                first += p.first.size
        return table.bits()

    want = run(1, 256, alone=False)
    assert run(1, 65_536, alone=False) == want
    assert run(1, 1_024, alone=True) == want
    for threads in (1, numba.config.NUMBA_NUM_THREADS):
        numba.set_num_threads(threads)
        assert run(MANY, 4_096, alone=False) == want


def test_gradients_are_cleared_after_both_passes():
    dtype, members = KINDS["float32"]
    rng = np.random.default_rng(4)
    twins = [Table(rules.LAMB, parameters(np.random.default_rng(5)), dtype, members) for _ in range(2)]
    grads = twins[0].gradients(rng)
    for table, zero_grads in zip(twins, (False, True), strict=True):
        table.step(grads, 1, OPTIONS, zero_grads=zero_grads)
    assert twins[0].bits() == twins[1].bits()
    assert not any(np.any(g.first) for g in grads)


def test_a_layer_without_parameters_or_direction_has_the_ratio_1():
    dtype, members = KINDS["float32"]
    ones = np.ones(300)
    table = Table(rules.LAMB, [0 * ones, ones, ones], dtype, members)
    grads = [Stored(x, PLAIN, dtype) for x in (-2 * ones, 0 * ones, -2 * ones)]
    table.step(grads, 1, {**OPTIONS, "weight_decay": 0.0, "eps": 1e-30})
    # the scaled gradient is 0.9 everywhere, and so the direction 1
    np.testing.assert_allclose(table.ps[0].first, -OPTIONS["lr"], rtol=1e-6)
    np.testing.assert_array_equal(table.ps[1].first, 1)
    np.testing.assert_allclose(table.ps[2].first, 1 - OPTIONS["lr"], rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_norms_neither_vanish_nor_overflow(size):
    dtype, members = KINDS["float32"]
    table = Table(rules.LAMB, [np.full(2_000, size)], dtype, members)
    grads = [Stored(np.full(2_000, -2.0), PLAIN, dtype)]
    table.step(grads, 1, {**OPTIONS, "weight_decay": 0.0, "eps": 0.0})
    np.testing.assert_allclose(table.ps[0].first, size * (1 - OPTIONS["lr"]), rtol=1e-5)


def test_a_nan_stays_in_its_element():
    dtype, members = KINDS["float32"]
    table = Table(rules.LAMB, [np.ones(300)], dtype, members)
    g = np.ones(300)
    g[7] = np.nan
    table.step([Stored(g, PLAIN, dtype)], 1, OPTIONS)
    assert list(np.flatnonzero(np.isnan(table.ps[0].first))) == [7]


@numba.njit(error_model="numpy")
def update_rows(h, c, p, g, state):
    for row in range(p.shape[0]):
        update_apart(h, c, p[row], g[row], (state[0][row], state[1][row]), (), p.dtype.type(NOT_FOUND))


def test_rows_of_sparse_tables_are_layers():
    dtype = np.float32
    for width in (0, 1, 2, 7, 64):
        rng = np.random.default_rng(6)
        p = np.asarray(rng.standard_normal((9, width)) * 10.0 ** rng.integers(-2, 3, (9, 1)), dtype)
        m, v = np.zeros_like(p), np.zeros_like(p)
        tracked = reference.Tracked(reference.lamb, p, OPTIONS)
        for step in range(1, 4):
            g = np.asarray(rng.standard_normal((9, width)), dtype)
            h, c = rules.LAMB.fold(step, OPTIONS, dtype), Scaled(SCALE, LIMIT)
            update_rows(*(type(t)(*map(dtype, t)) for t in (h, c)), p, g, (m, v))
            tracked.step((np.arange(9), scaled(g)))
        np.testing.assert_allclose(p, tracked.p, rtol=0, atol=32 * np.finfo(dtype).eps * tracked.scale)
