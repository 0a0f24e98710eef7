"""Rules with a trust ratio on a CUDA device: LAMB, and Adafactor of vectors.

Squares are added in another order than the CPU adds them. A sum of n positive float64 numbers is then off by
less than n * 2**-53 of it, the ratio of roots of two by as much; cast to float32, it may be rounded the other
way: one unit in the last place of the step, and one of the parameter.
"""

import os

import numpy as np
import pytest
from devices import CUDA

from fastopt.kernels import rules
from fastopt.kernels.cuda import driver
from fastopt.kernels.cuda.backend import trust as launches
from fastopt.kernels.formats import BFLOAT16, BFLOAT16_OF, PLAIN, ROOT8, SIGNED8, SINGLE, STOCHASTIC
from fastopt.kernels.rule import Decoupled, Scaled
from gpu.dense_cases import Arrays, Case, OnCpu, OnDevice, assert_same_bits, factor

SHAPES = [(20_001,), (5, 7), (0,), (), (8192,), (300,)]
SIDES = OnCpu, OnDevice
LAMB = Case(rules.LAMB, Scaled, (PLAIN,) * 4)
LAMB64 = LAMB._replace(compute=np.float64)
ADAFACTOR = Case(rules.ADAFACTOR, Decoupled, (PLAIN,) * 3)
CASES = [
    LAMB,
    LAMB64,
    LAMB._replace(formats=(BFLOAT16_OF, BFLOAT16, SIGNED8, ROOT8)),
    ADAFACTOR._replace(formats=(BFLOAT16, BFLOAT16, STOCHASTIC)),
    ADAFACTOR._replace(formats=(PLAIN, PLAIN, SINGLE), compute=np.float64),
]
if os.environ.get("HYPOTHESIS_PROFILE") == "thorough":
    CASES += [
        ADAFACTOR,
        ADAFACTOR._replace(decay=Scaled, formats=(BFLOAT16_OF, BFLOAT16, ROOT8)),
        ADAFACTOR._replace(compute=np.float64),
        LAMB._replace(formats=(BFLOAT16, BFLOAT16, STOCHASTIC, STOCHASTIC)),
        LAMB64._replace(formats=(PLAIN, PLAIN, SIGNED8, ROOT8)),
        LAMB64._replace(formats=(PLAIN, PLAIN, SINGLE, SINGLE)),
    ]


@pytest.fixture(params=CUDA, autouse=True)
def device(request):
    return request.param()


def numbers(case, arrays):
    """The parameter, or its master, as it is computed with."""
    if case.formats[0] is BFLOAT16:
        return (arrays[0].astype(np.uint32) << 16).view(np.float32)
    return arrays[1] if case.formats[0].master else arrays[0]


def assert_close(case, got, want, before):
    """See above; what does not depend on the ratio has the CPU's bits."""
    for one, other, old in zip(got, want, before, strict=True):
        p, expected, start = (numbers(case, own).astype(np.float64) for own in (one, other, old))
        scale = np.maximum(np.abs(expected), np.abs(expected - start))
        if case.formats[0] is BFLOAT16:
            bound = 2.0**-7 * scale
        elif case.compute == np.float64:
            bound = (4 + p.size) * 2.0**-52 * scale
        else:
            bound = 2 * 2.0**-23 * scale
        assert (np.abs(p - expected) <= bound).all()
    skipped = 2 if case.formats[0].master else 1
    assert_same_bits([one[skipped:] for one in got], [other[skipped:] for other in want])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_arrays_are_updated_as_on_the_cpu(case):
    sides = [Arrays(on, case, SHAPES, classes=2, offsets=[1]) for on in SIDES]
    before = sides[0].got()
    for side in sides:
        side.run(4, zero_grads=True)
    assert_close(case, sides[1].got(), sides[0].got(), before)
    assert np.abs(numbers(case, before[0]).astype(float) - numbers(case, sides[1].got()[0])).max() > 1e-3


def test_gradients_are_scaled_by_a_factor_of_the_device():
    sides = [Arrays(on, LAMB, SHAPES, classes=2) for on in SIDES]
    before = sides[0].got()
    sides[0].run(2, scale=0.3 * 0.7)
    sides[1].run(2, scale=0.3, factor=factor(0.7))
    assert_close(LAMB, sides[1].got(), sides[0].got(), before)


@pytest.mark.parametrize("case", [LAMB, LAMB64], ids=str)
def test_bits_depend_on_neither_the_grid_nor_the_other_arrays(case, monkeypatch):
    usual = Arrays(OnDevice, case, SHAPES)
    usual.run(2)
    monkeypatch.setattr(launches, "MOST_BLOCKS", 2)
    few = Arrays(OnDevice, case, SHAPES)
    few.run(2)
    assert_same_bits(few.got(), usual.got())
    for t, shape in enumerate(SHAPES):
        alone = Arrays(OnDevice, case, [shape])
        alone.run(2)
        assert_same_bits(alone.got(), usual.got()[t : t + 1])


@pytest.mark.parametrize("power", [-500, 520])
def test_squares_that_float64_cannot_hold_are_taken_in_another_unit(power):
    def adjust(places):
        places[0][0] *= 2.0**power

    sides = [Arrays(on, LAMB64, SHAPES, adjust=adjust) for on in SIDES]
    before = sides[0].got()
    for side in sides:
        side.run(2)
    assert_close(LAMB64, sides[1].got(), sides[0].got(), before)
    p, start = sides[1].got()[0][0], before[0][0]
    assert np.isfinite(p).all() and (p != start).all()


def test_units_are_those_of_each_array():
    """An array of ordinary numbers beside one of huge ones keeps its bits."""

    def adjust(places):
        if places[0][0].size == 300:
            places[0][0] *= 2.0**520

    together = Arrays(OnDevice, LAMB64, [(300,), (5, 7)], adjust=adjust)
    together.run(2)
    alone = Arrays(OnDevice, LAMB64, [(5, 7)])
    alone.run(2)
    assert_same_bits(together.got()[1:], alone.got())


def test_without_a_norm_the_ratio_is_one():
    def adjust(places):
        places[0][0][:] = 0

    sides = [Arrays(on, LAMB, [(300,)], adjust=adjust) for on in SIDES]
    for side in sides:
        side.run(2)
    assert_same_bits(sides[1].got(), sides[0].got())
    assert sides[1].got()[0][0].any()


@pytest.mark.parametrize("case", [LAMB, CASES[3]], ids=str)
def test_nan_stays_in_its_element(case):
    """As on the CPU: what is compared with a norm that is NaN is not smaller."""

    def adjust(places):
        gradient = places[1][0]
        gradient[7] = np.nan if gradient.dtype.kind == "f" else 0x7FC0

    sides = [Arrays(on, case, [(300,)], adjust=adjust) for on in SIDES]
    for side in sides:
        side.run(2)
        found = np.isnan(numbers(case, side.got()[0]))
        assert found[7] and found.sum() == 1


def test_a_captured_step_finds_its_ratios_anew(monkeypatch):
    sides = [Arrays(on, LAMB, SHAPES) for on in (OnDevice, OnDevice)]
    for side in sides:
        side.run(1)
    monkeypatch.setattr(driver.driver(), "capturing", lambda device: True)
    captured = sides[1].prepare(2)
    monkeypatch.undo()
    for step in (2, 3):
        sides[0].run(step)
        sides[1].set_numbers(step)
        OnDevice.backend.run([*sides[1].launch.refresh(), *captured])
    assert_same_bits(sides[1].got(), sides[0].got())
