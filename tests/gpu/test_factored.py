"""Adafactor of matrices on a CUDA device.

Squares are added in another order than the CPU adds them. A sum of n positive float64 numbers is then off by
less than n * 2**-53 of it. Cast to float32, a mean of them may be rounded the other way, and with it each of
the moments, by one unit in the last place; an update divides by the root of the product of two, and is scaled
by a factor that is cast too: it is off by less than four, and the parameter by one more.
"""

import os

import numpy as np
import pytest
from devices import CUDA

from fastopt.kernels import rules
from fastopt.kernels.cuda import driver
from fastopt.kernels.cuda.backend import matrices
from fastopt.kernels.formats import BFLOAT16, BFLOAT16_OF, HALF, HALF_OF, PLAIN
from fastopt.kernels.rule import Decoupled, Scaled
from gpu.dense_cases import Arrays, Case, OnCpu, OnDevice, assert_same_bits, factor

SIDES = OnCpu, OnDevice
MATRIX = Case(rules.ADAFACTOR, Decoupled, (PLAIN, PLAIN))
MATRIX64 = MATRIX._replace(decay=Scaled, compute=np.float64)
# Of one tile and of several, rows that begin aligned and not, rows and columns of one element
SHAPES = [(37, 600), (2, 5, 7), (3, 1, 130), (1, 1), (1, 2000), (300, 1), (2, 2, 9, 512)]
NARROW = [
    MATRIX._replace(formats=own)
    for own in [(BFLOAT16, BFLOAT16), (BFLOAT16_OF, BFLOAT16), (HALF, HALF), (HALF_OF, HALF)]
]
if os.environ.get("HYPOTHESIS_PROFILE") != "thorough":
    NARROW = [NARROW[1]]


@pytest.fixture(params=CUDA, autouse=True)
def device(request):
    return request.param()


def numbers(case, arrays):
    """The parameter, or its master, as it is computed with, and the moments."""
    if case.formats[0].master:
        return arrays[1], *arrays[-2:]
    if case.formats[0] is HALF:
        return arrays[0].view(np.float16), *arrays[-2:]
    if case.formats[0] is BFLOAT16:
        return (arrays[0].astype(np.uint32) << 16).view(np.float32), *arrays[-2:]
    return arrays[0], *arrays[-2:]


def assert_close(case, got, want, before, steps=1):
    """After so many steps, see above."""
    (one,), (other,), (old,) = got, want, before
    eps = float(np.finfo(case.compute).eps)
    ulps = 5.0 if case.compute == np.float32 else 5.0 + numbers(case, one)[0].size
    for k, (x, y, start) in enumerate(zip(*(numbers(case, own) for own in (one, other, old)), strict=True)):
        x, y, start = (array.astype(np.float64) for array in (x, y, start))
        scale = np.maximum(np.abs(y), np.abs(y - start)) if k == 0 else np.abs(y)
        bound = steps * ulps * eps * scale
        if k == 0 and case.formats[0] in (HALF, BFLOAT16):
            bound = (2.0**-10 if case.formats[0] is HALF else 2.0**-7) * scale
        assert (np.abs(x - y) <= bound).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matrices_are_updated_as_on_the_cpu(shape):
    """Two steps, the last of which sets the gradient to zero."""
    sides = [Arrays(on, MATRIX, [shape]) for on in SIDES]
    before = sides[0].got()
    for side in sides:
        side.run(1)
        side.run(5, zero_grads=True)
    assert_close(MATRIX, sides[1].got(), sides[0].got(), before, steps=2)
    assert not sides[1].gradients()[0].any()
    assert (sides[1].got()[0][0] != before[0][0]).all()


@pytest.mark.parametrize("case", [MATRIX64, *NARROW], ids=str)
@pytest.mark.parametrize("shape", [(9, 520), (2, 3, 7)], ids=str)
def test_formats(case, shape):
    sides = [Arrays(on, case, [shape]) for on in SIDES]
    before = sides[0].got()
    for side in sides:
        side.run(4, zero_grads=True)
    assert_close(case, sides[1].got(), sides[0].got(), before)
    assert not sides[1].gradients()[0].any()


@pytest.mark.parametrize("offsets", [[1], [0, 1]])
def test_arrays_need_not_be_aligned(offsets):
    aligned, other = (Arrays(OnDevice, MATRIX, [(5, 520)], offsets=own) for own in ([], offsets))
    for side in (aligned, other):
        side.run(2, zero_grads=True)
    assert_same_bits(other.got(), aligned.got())


@pytest.mark.parametrize("shape", [(37, 600), (20, 3, 4)], ids=str)
def test_bits_do_not_depend_on_the_grid(shape, monkeypatch):
    usual, few = (Arrays(OnDevice, MATRIX, [shape]) for _ in range(2))
    usual.run(2)
    monkeypatch.setattr(matrices, "MOST_BLOCKS", 1)
    few.run(2)
    assert_same_bits(few.got(), usual.got())


def test_moments_of_many_parts_are_shared_out(monkeypatch):
    """As those of matrices with more stripes or bands than can be tried here."""
    monkeypatch.setattr(matrices, "MANY_PARTS", 1)
    sides = [Arrays(on, MATRIX, [(41, 530)]) for on in SIDES]
    before = sides[0].got()
    for side in sides:
        side.run(2)
    assert_close(MATRIX, sides[1].got(), sides[0].got(), before)


def test_tiles_are_higher_in_larger_arrays(monkeypatch):
    monkeypatch.setattr(matrices, "TILES", 4)
    sides = [Arrays(on, MATRIX, [(41, 530)]) for on in SIDES]
    before = sides[0].got()
    for side in sides:
        side.run(2)
    assert_close(MATRIX, sides[1].got(), sides[0].got(), before)


@pytest.mark.parametrize("power", [-500, 520])
def test_squares_that_float64_cannot_hold_are_taken_in_another_unit(power):
    def adjust(places):
        places[0][0] *= 2.0**power

    sides = [Arrays(on, MATRIX64, [(9, 520)], adjust=adjust) for on in SIDES]
    before = sides[0].got()
    for side in sides:
        side.run(2)
    assert_close(MATRIX64, sides[1].got(), sides[0].got(), before)
    p, start = sides[1].got()[0][0], before[0][0]
    assert np.isfinite(p).all() and (p != start).mean() > 0.9


def test_gradients_are_scaled_by_a_factor_of_the_device():
    sides = [Arrays(on, MATRIX, [(5, 520)]) for on in SIDES]
    before = sides[0].got()
    sides[0].run(2, scale=0.3 * 0.7)
    sides[1].run(2, scale=0.3, factor=factor(0.7))
    assert_close(MATRIX, sides[1].got(), sides[0].got(), before)


def test_a_nan_makes_the_parameter_nan():
    def adjust(places):
        places[1][0][7] = np.nan

    arrays = Arrays(OnDevice, MATRIX, [(5, 20)], adjust=adjust)
    arrays.run(2)
    assert np.isnan(arrays.got()[0][0]).all()


def test_nothing_is_launched_for_nothing():
    assert not Arrays(OnDevice, MATRIX, [(0, 3)]).prepare(1)
    assert not Arrays(OnDevice, MATRIX, [(2, 3, 0)]).prepare(1)


def test_a_captured_step_uses_what_later_steps_refresh(monkeypatch):
    sides = [Arrays(OnDevice, MATRIX, [(5, 520)]) for _ in range(2)]
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
