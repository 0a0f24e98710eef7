"""Dense updates on a CUDA device have the CPU's bits."""

import itertools
import os

import numpy as np
import pytest
from devices import CUDA
from numba.extending import register_jitable
from signum import SignumH

from fastopt.kernels import rules
from fastopt.kernels.cuda import driver
from fastopt.kernels.cuda.backend import arrays as launches
from fastopt.kernels.formats import (
    BFLOAT16,
    BFLOAT16_OF,
    FORMATS,
    HALF,
    HALF_OF,
    PLAIN,
    ROOT8,
    SIGNED8,
    SINGLE,
    STOCHASTIC,
    Format,
    register_format,
)
from fastopt.kernels.rule import L2, RULES, Decoupled, Scaled
from gpu.dense_cases import Arrays, Case, OnCpu, OnDevice, assert_same_bits, factor

# Parameter, gradient, state that may be negative, and not; what is computed with
PATTERNS = [
    (PLAIN, PLAIN, PLAIN, PLAIN, np.float32),
    (PLAIN, PLAIN, STOCHASTIC, STOCHASTIC, np.float32),
    (BFLOAT16_OF, BFLOAT16, SIGNED8, ROOT8, np.float32),
    (HALF_OF, HALF, STOCHASTIC, STOCHASTIC, np.float32),
    (BFLOAT16, BFLOAT16, PLAIN, PLAIN, np.float32),
    (HALF, HALF, SIGNED8, ROOT8, np.float32),
    (PLAIN, PLAIN, PLAIN, PLAIN, np.float64),
    (PLAIN, PLAIN, SINGLE, SINGLE, np.float64),
    (PLAIN, PLAIN, SIGNED8, ROOT8, np.float64),
    (BFLOAT16, BFLOAT16, STOCHASTIC, STOCHASTIC, np.float32),
]
DECAYS = [Scaled, L2, Decoupled]
ELEMENTWISE = [
    rule
    for hyper, rule in RULES.items()
    if hyper.__module__.startswith("fastopt.kernels.rules.") and not rule.row_slots and not rule.trust_ratio
] + [RULES[SignumH]]
SHAPES = [(2300,), (5, 7), (0, 3), (256,), (), (1023,)]


def case_of(rule, decay, pattern):
    parameter, gradient, signed, not_negative, compute = pattern
    slots = (not_negative if slot in rule.not_negative else signed for slot in rule.state_slots)
    return Case(rule, decay, (parameter, gradient, *slots), compute)


def cases():
    """Every rule, decay and pattern; with HYPOTHESIS_PROFILE=thorough, every combination."""
    if os.environ.get("HYPOTHESIS_PROFILE") == "thorough":
        return [case_of(*own) for own in itertools.product(ELEMENTWISE, DECAYS, PATTERNS)]
    return [case_of(rule, DECAYS[i % 3], PATTERNS[i % len(PATTERNS)]) for i, rule in enumerate(ELEMENTWISE)]


@pytest.fixture(params=CUDA, autouse=True)
def device(request):
    return request.param()


@pytest.mark.parametrize("case", cases(), ids=str)
def test_bits_are_those_of_the_cpu(case):
    """Two steps of arrays of three classes, one of them not aligned, the last setting gradients to zero."""
    sides = [Arrays(on, case, SHAPES, classes=3, offsets=[1, 1]) for on in (OnCpu, OnDevice)]
    for side in sides:
        side.run(1)
        side.run(5, zero_grads=True, scale=-0.75)
    assert_same_bits(sides[1].got(), sides[0].got())
    assert not any(gradient.any() for gradient in sides[1].gradients())


ADAM = case_of(rules.ADAM, L2, PATTERNS[0])
NARROW = case_of(rules.ADAM, L2, PATTERNS[2])  # with masters and codes
SIDES = OnCpu, OnDevice


@pytest.mark.parametrize("array", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 127, 128, 2049])
@pytest.mark.parametrize("case", [ADAM, NARROW], ids=str)
def test_arrays_need_not_be_aligned(case, size, array):
    offsets = [int(k == array) for k in range(4)]
    sides = [Arrays(on, case, [(size,), (size,)], offsets=offsets) for on in SIDES]
    for side in sides:
        side.run(3, zero_grads=True)
    assert_same_bits(sides[1].got(), sides[0].got())


@pytest.mark.parametrize("blocks", [1, 3])
def test_any_grid_updates_every_element_once(blocks, monkeypatch):
    sides = [Arrays(on, NARROW, [(9000,), (0,), (3000,), (1,)]) for on in SIDES]
    monkeypatch.setattr(launches, "MOST_BLOCKS", blocks)
    for side in sides:
        side.run(2)
    assert_same_bits(sides[1].got(), sides[0].got())


@pytest.mark.parametrize("size", [5000, 70_000])
def test_chunks_grow_with_arrays(size, monkeypatch):
    monkeypatch.setattr(launches, "CHUNKS", 1)
    case = Case(rules.SGD, Scaled, (PLAIN, PLAIN))
    sides = [Arrays(on, case, [(size,), (77,), (size,)]) for on in SIDES]
    for side in sides:
        side.run(2)
    assert_same_bits(sides[1].got(), sides[0].got())


def test_random_bits_are_those_of_positions_beyond_32_bits():
    case = case_of(rules.ADAM, L2, PATTERNS[1])
    sides = [Arrays(on, case, [(700,)], position=2**33 - 300) for on in SIDES]
    for side in sides:
        side.run(2)
    assert_same_bits(sides[1].got(), sides[0].got())


def test_nan_and_infinity_stay_in_their_elements():
    def adjust(places):
        places[1][0][[3, 40, 41]] = np.nan, np.inf, -np.inf

    sides = [Arrays(on, ADAM, [(50,)], adjust=adjust) for on in SIDES]
    for side in sides:
        side.run(2)
    ((p, _, m, v),) = sides[1].got()
    assert np.isnan([p[3], m[3], v[3]]).all() and np.isfinite(np.delete(p, 3)).all()
    for one, other in zip(sides[1].got()[0], sides[0].got()[0], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("case", [ADAM, case_of(rules.ADAM, L2, PATTERNS[6])], ids=str)
def test_gradients_are_scaled_by_a_factor_of_the_device(case):
    sides = [Arrays(on, case, SHAPES, classes=2) for on in SIDES]
    sides[0].run(2, scale=0.3 * 0.7)
    sides[1].run(2, scale=0.3, factor=factor(0.7))
    assert_same_bits(sides[1].got(), sides[0].got())
    for side in sides:  # and the next step by none
        side.run(3)
    assert_same_bits(sides[1].got(), sides[0].got())


def test_a_factor_that_is_nan_makes_everything_nan():
    arrays = Arrays(OnDevice, ADAM, [(300,)])
    arrays.run(2, factor=factor(np.nan))
    assert all(np.isnan(array).all() for k, array in enumerate(arrays.got()[0]) if k != 1)


def test_nothing_is_launched_for_nothing():
    assert not Arrays(OnDevice, ADAM, [(0, 3), (0,)]).prepare(1)


def test_prepare_changes_nothing():
    arrays = Arrays(OnDevice, ADAM, SHAPES)
    before = arrays.got()
    arrays.prepare(1, zero_grads=True)
    assert_same_bits(arrays.got(), before)


def test_a_captured_step_uses_what_later_steps_refresh(monkeypatch):
    """What a graph does when it is replayed: the calls that were captured are made again."""
    case, one = case_of(rules.ADAM, L2, PATTERNS[1]), factor(0.25)
    sides = [Arrays(on, case, SHAPES, classes=2) for on in SIDES]
    for side in sides:
        side.run(1)
    monkeypatch.setattr(driver.driver(), "capturing", lambda device: True)
    captured = sides[1].prepare(2, factor=one)
    monkeypatch.setattr(driver.driver(), "capturing", lambda device: False)
    for step in (2, 3):
        sides[0].run(step, scale=0.25 * 0.125)
        sides[1].set_numbers(step, scale=0.125)
        OnDevice.backend.run(sides[1].launch.refresh())
        OnDevice.backend.run(captured)
    assert_same_bits(sides[1].got(), sides[0].got())


def test_a_capture_uploads_nothing_and_needs_arrays_that_were_placed(monkeypatch):
    arrays = Arrays(OnDevice, ADAM, SHAPES)
    monkeypatch.setattr(driver.driver(), "capturing", lambda device: True)
    with pytest.raises(ValueError, match="captured in a CUDA graph has other parameters"):
        arrays.prepare(1)
    monkeypatch.undo()
    arrays.run(1)
    monkeypatch.setattr(driver.driver(), "capturing", lambda device: True)
    for name in ("upload", "allocate", "download"):
        monkeypatch.setattr(driver.driver(), name, None)
    OnDevice.backend.run(arrays.prepare(2))


@register_jitable
def decode(stored):
    return np.float32(stored) / np.float32(64)


@register_jitable
def encode(x, random):
    return np.int16(np.float32(x) * np.float32(64))


def test_formats_may_be_a_users_own(monkeypatch):
    monkeypatch.setattr("fastopt.kernels.formats.FORMATS", {**FORMATS})
    own = register_format(Format("FIXED", np.dtype(np.int16), np.int16, decode, encode))
    case = Case(rules.MOMENTUM, L2, (PLAIN, PLAIN, own))
    sides = [Arrays(on, case, SHAPES) for on in SIDES]
    for side in sides:
        side.run(2)
    assert_same_bits(sides[1].got(), sides[0].got())
