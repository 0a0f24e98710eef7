"""Dense updates: launches over arrays, and over a parameter with state of rows and columns."""

import math
from itertools import pairwise

import numpy as np
import pytest
import reference
from backend.launches import (
    ADAM,
    BFLOAT,
    BFLOAT16,
    BFLOAT16_OF,
    DOUBLE,
    PLAIN,
    SINGLE,
    STOCHASTIC,
    Dense,
    adam_numbers,
    adam_spec,
    adam_state,
    assert_close,
    assert_same,
    decay_numbers,
    stepped,
)

from fastopt._core.backend import DenseLaunch
from fastopt.kernels import rules
from fastopt.kernels.rule import L2, Decoupled, Scaled
from fastopt.kernels.work import ArrayWork, Spec

SHAPES = [(5, 7), (2300,), (), (0, 3), (257,)]  # one is longer than what is updated at a time
CLASSES = [0, 1, 0, 1, 1]


def drawn(rng, shapes, dtype=SINGLE, scale=1.0):
    """Parameters, gradients and states of arrays."""
    drawn = [adam_state(rng, shape, dtype) for shape in shapes]
    gradients = [np.asarray(scale * rng.normal(size=shape)).astype(dtype) for shape in shapes]
    return [one[0] for one in drawn], gradients, [one[1:] for one in drawn]


@pytest.mark.covers("ArraysLaunch", "address")
@pytest.mark.parametrize(
    ("decay", "dtype"),
    [(Scaled, SINGLE), (L2, DOUBLE)],  # decoupled decay is tested with 16 bits below
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_arrays_are_updated_by_the_scalar_rule(device, rng, decay, dtype):
    """Arrays of two classes, the first with another step, learning rate, sign and a limit, two runs."""
    parameters, gradients, states = drawn(rng, SHAPES, dtype)
    gradients[1][:3] = np.nan, np.inf, 0
    dense = Dense(device, adam_spec(decay, dtype), parameters, gradients, states, CLASSES)
    expected = [[p, *state] for p, state in zip(parameters, states, strict=True)]
    for run in range(2):
        numbers = [
            (adam_numbers(1 + run, 0.5), decay_numbers(decay, -0.75, 0.5, 0.5)),
            (adam_numbers(40 + run), decay_numbers(decay)),
        ]
        dense.run(numbers)
        expected = [
            stepped(*numbers[row], p, g, *state)
            for row, (p, *state), g in zip(CLASSES, expected, gradients, strict=True)
        ]
        for k, want in enumerate(expected):
            assert_same(dense.got(k), want)
            np.testing.assert_array_equal(device.get(dense.gradients[k]), gradients[k])  # they are kept
    assert np.isnan(expected[1][0][0]) and np.isfinite(expected[1][0][2:]).all()


@pytest.mark.covers("ArraysLaunch")
def test_launch_has_what_the_protocol_says(device, rng):
    dense = Dense(device, adam_spec(Scaled), *drawn(rng, SHAPES), CLASSES)
    names = {*DenseLaunch.__annotations__, *vars(DenseLaunch)}
    assert all(hasattr(dense.launch, name) for name in names if not name.startswith("_"))
    numbers = dense.launch.numbers
    assert numbers.dtype == np.float64 and numbers.shape == (2, len(rules.ADAM.hyper._fields) + 2)


@pytest.mark.covers("ArraysLaunch")
def test_prepare_writes_nothing(device, rng):
    parameters, gradients, states = drawn(rng, SHAPES)
    dense = Dense(device, adam_spec(Scaled), parameters, gradients, states, CLASSES)
    dense.prepare([(adam_numbers(1), decay_numbers(Scaled))] * 2, zero_grads=True)
    for k, p in enumerate(parameters):
        assert_same(dense.got(k), [p, *states[k]])
        np.testing.assert_array_equal(device.get(dense.gradients[k]), gradients[k])


@pytest.mark.covers("ArraysLaunch")
def test_gradients_become_zero_where_wanted(device, rng):
    parameters, gradients, states = drawn(rng, SHAPES)
    dense = Dense(device, adam_spec(Scaled), parameters, gradients, states, CLASSES)
    numbers = [(adam_numbers(3), decay_numbers(Scaled))] * 2
    dense.run(numbers, zero_grads=True)
    for k, p in enumerate(parameters):
        assert_same(dense.got(k), stepped(*numbers[0], p, gradients[k], *states[k]))
        assert not device.get(dense.gradients[k]).any()
    for k, gradient in enumerate(dense.gradients):  # and are kept again
        dense.gradients[k] = device.put(gradients[k])
        assert gradient is not dense.gradients[k]
    dense.run(numbers)
    for k in range(len(parameters)):
        np.testing.assert_array_equal(device.get(dense.gradients[k]), gradients[k])


@pytest.mark.covers("ArraysLaunch")
def test_a_run_uses_the_numbers_written_last(device, rng):
    parameters, gradients, states = drawn(rng, [(40,)])
    dense = Dense(device, adam_spec(Scaled), parameters, gradients, states)
    first, second = [(adam_numbers(t), decay_numbers(Scaled, 1.0 / t)) for t in (1, 2)]
    dense.run([first])
    dense.launch.numbers[0] = *second[0], *second[1]
    device.backend.run(dense.launch.prepare(False))  # nothing else was placed
    after_one = stepped(*first, parameters[0], gradients[0], *states[0])
    assert_same(dense.got(0), stepped(*second, after_one[0], gradients[0], *after_one[1:]))


@pytest.mark.covers("ArraysLaunch")
def test_arrays_are_placed_elsewhere(device, rng):
    parameters, gradients, states = drawn(rng, SHAPES)
    dense = Dense(device, adam_spec(Scaled), parameters, gradients, states, CLASSES)
    numbers = [(adam_numbers(2), decay_numbers(Scaled))] * 2
    dense.run(numbers)
    left = [device.get(array) for array in dense.parameters]
    old = dense.parameters
    others, other_gradients, _ = drawn(rng, SHAPES)
    dense.parameters = [device.put(array) for array in others]
    dense.gradients = [device.put(array) for array in other_gradients]
    state = [dense.got(k)[1:] for k in range(len(SHAPES))]  # which stays where it is
    dense.run(numbers)
    for k, p in enumerate(others):
        assert_same(dense.got(k), stepped(*numbers[0], p, other_gradients[k], *state[k]))
        np.testing.assert_array_equal(device.get(old[k]), left[k])


SIZE = 4000


class Stochastic:
    """Adam of a bfloat16 parameter with a master, and with state in bfloat16 that is rounded stochastically;
    in one array or in parts of it."""

    def __init__(self, device, rng):
        self.device = device
        self.master, m, v = adam_state(rng, (SIZE,))
        self.g = rng.normal(size=SIZE).astype(BFLOAT)
        self.state = [m.astype(BFLOAT), v.astype(BFLOAT)]
        self.g[:20] = self.state[0][:20] = self.state[1][:20] = 0
        self.numbers = adam_numbers(3), decay_numbers(Decoupled, 0.5)
        wide = [array.astype(np.float32) for array in (self.g, *self.state)]
        self.exact = stepped(*self.numbers, self.master, *wide)

    def run(self, key, cuts=(0, SIZE), first=0):
        """The new master, parameter, state, and gradient."""
        parts = [slice(begin, end) for begin, end in pairwise(cuts)]
        dense = Dense(
            self.device,
            adam_spec(Decoupled, formats=(BFLOAT16_OF, BFLOAT16, STOCHASTIC, STOCHASTIC)),
            # what the parameter holds before must not matter: the master is what is updated
            [np.full_like(self.g[part], 7) for part in parts],
            [self.g[part] for part in parts],
            [[slot[part] for slot in self.state] for part in parts],
            positions=[first + begin for begin in cuts[:-1]],
            masters=[self.master[part] for part in parts],
        )
        dense.run([self.numbers], zero_grads=True, keys=[key])
        get = self.device.get
        got = [(get(dense.masters[k]), *dense.got(k), get(dense.gradients[k])) for k in range(len(parts))]
        return [np.concatenate(arrays) for arrays in zip(*got, strict=True)]


def bits(arrays):
    return [array.view(np.uint16) for array in arrays]


@pytest.mark.covers("ArraysLaunch")
def test_a_parameter_of_16_bits_is_its_master_rounded_to_the_nearest(device, rng):
    stochastic = Stochastic(device, rng)
    master, p, _, _, gradient = stochastic.run(key=5, cuts=(0, 2100, SIZE))
    assert_same([master], stochastic.exact[:1])  # computed from the new state before it is rounded
    assert_same([p], [stochastic.exact[0].astype(BFLOAT)])
    assert not gradient.view(np.uint16).any()


@pytest.mark.covers("ArraysLaunch")
def test_stochastic_state_is_one_of_two_neighbours(device, rng):
    stochastic = Stochastic(device, rng)
    state = stochastic.run(key=5)[2:4]
    for got, exact in zip(bits(state), stochastic.exact[1:], strict=True):
        raw = exact.view(np.uint32)
        fraction = (raw & 0xFFFF) / 2**16
        up = got.astype(np.int64) - (raw >> 16)
        assert ((up == 0) | ((up == 1) & (fraction > 0))).all()
        assert not up[:20].any()
        # as often up as the fraction says, within five standard deviations
        assert abs((up - fraction).sum()) < 5 * math.sqrt((fraction * (1 - fraction)).sum())
        assert 0.1 < up.mean() < 0.9


@pytest.mark.covers("ArraysLaunch")
def test_random_bits_depend_on_key_and_position_alone(device, rng):
    stochastic = Stochastic(device, rng)
    key = -12345678901234
    whole = bits(stochastic.run(key)[2:4])
    assert_same(bits(stochastic.run(key)[2:4]), whole)
    assert_same(bits(stochastic.run(key, cuts=(0, 7, 2055, SIZE))[2:4]), whole)
    # keys that differ in one bit of either half, and other positions
    for other, first in ((key + 1, 0), (key ^ 2**40, 0), (key, 1000)):
        for one, two in zip(bits(stochastic.run(other, first=first)[2:4]), whole, strict=True):
            assert (one != two).mean() > 0.1


@pytest.mark.covers("ArraysLaunch")
def test_lamb_takes_each_array_as_a_layer(device, rng):
    shapes = [(20_000,), (5, 7), (3,), (4,), (0,)]  # the first is longer than what is summed up at a time
    parameters, gradients, states = drawn(rng, shapes)
    parameters[2][:] = 0  # without a norm, the trust ratio is 1
    parameters[3][:], gradients[3][:] = 0, 0
    states[3] = [np.zeros_like(slot) for slot in states[3]]
    rule, c = rules.LAMB, decay_numbers(Scaled, 0.5)
    spec = Spec(rule.fold(1, ADAM, np.float32), c, SINGLE, (PLAIN,) * 4)
    dense = Dense(device, spec, parameters, gradients, states, [0, 1, 0, 0, 1])
    steps, options = [4, 9], [ADAM, {**ADAM, "lr": 0.25}]
    dense.run([(rule.fold(step, own, np.float32), c) for step, own in zip(steps, options, strict=True)])
    for k, p in enumerate(parameters):
        own = dict(zip(rule.slots, (slot.astype(np.float64) for slot in states[k]), strict=True))
        row = [0, 1, 0, 0, 1][k]
        new = reference.lamb(p.astype(np.float64), 0.5 * gradients[k], own, steps[row], **options[row])
        got = dense.got(k)
        assert_close(got[0], new, 8, 1 + np.abs(new))
        assert_close(got[1], own["exp_avg"], 8, 1 + np.abs(own["exp_avg"]))
        assert_close(got[2], own["exp_avg_sq"], 8)
        assert np.abs(new - p).max(initial=0) > 1e-2 or k >= 3


ADAFACTOR = {"lr": 0.25, "beta2_decay": -0.8, "eps": (1e-4, 1e-3), "d": 0.5, "weight_decay": 0.125}


@pytest.mark.covers("MatrixLaunch", "address")
@pytest.mark.parametrize("shape", [(37, 600), (2, 5, 7)], ids=str)
def test_matrices_are_updated_by_adafactor(device, rng, shape):
    """Of each stack of matrices, three steps, the last of which sets the gradient to zero."""
    rule, backend = rules.ADAFACTOR, device.backend
    p, _, _ = adam_state(rng, shape)
    c = Decoupled(-0.5, math.inf, 1.0 - ADAFACTOR["lr"] * ADAFACTOR["weight_decay"])
    spec = Spec(rule.fold(1, ADAFACTOR, np.float32), c, SINGLE, (PLAIN, PLAIN))
    of_rows, of_columns = (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])
    state = [device.put(np.zeros(own, np.float32)) for own in (of_rows, of_columns)]
    parameter = device.put(p)
    launch = backend.MatrixLaunch(spec, ArrayWork(0, 0, shape, None, tuple((s, None) for s in state)))
    assert launch.numbers.shape == (1, len(spec.h) + len(c))
    expected, own = p.astype(np.float64), {"row_var": np.zeros(of_rows), "col_var": np.zeros(of_columns)}
    for step in (1, 2, 3):
        g = rng.normal(size=shape).astype(np.float32)
        gradient = device.put(g)
        launch.place(np.array([backend.address(parameter)]), np.array([backend.address(gradient)]))
        launch.numbers[0] = *rule.fold(step, ADAFACTOR, np.float32), *c
        launch.set_keys([step])
        backend.run(launch.prepare(step == 3))
        expected = reference.adafactor(expected, -0.5 * g.astype(np.float64), own, step, **ADAFACTOR)
        assert_close(device.get(parameter), expected, 16, 1 + np.abs(expected))
        assert_close(device.get(state[0]), own["row_var"], 8)
        assert_close(device.get(state[1]), own["col_var"], 8)
        np.testing.assert_array_equal(device.get(gradient), 0 if step == 3 else g)
    assert np.abs(expected - p).max() > 0.05
