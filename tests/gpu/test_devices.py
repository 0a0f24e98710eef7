"""One optimizer over parameters of the CPU and of two CUDA devices."""

import numpy as np
import pytest
from devices import InterpretedCuda, bits

import fastopt
from fastopt.kernels.cuda import driver
from gpu.interpreted import Interpreted, Lent

pytestmark = pytest.mark.interpreted

HOST, FIRST, SECOND = -1, 0, 1
PLACES = HOST, FIRST, SECOND, SECOND, HOST, FIRST
SHAPES = (7, 5), (300,), (40,), (12, 20), (9, 3), (11, 8)
ON_HOST = (HOST,) * len(SHAPES)
TABLES = 3, 4, 5  # which get gradients by rows


@pytest.fixture(autouse=True)
def two():
    """A driver of two devices."""
    before = InterpretedCuda().driver
    made = Interpreted(devices=2)
    driver.use(made)
    yield made
    driver.use(before)


def placed(two, array, place):
    return array if place == HOST else Lent(two, array, place)


def made(two, places):
    """An optimizer over parameters that lie there, and what these hold, as arrays of the host."""
    rng = np.random.default_rng(7)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]
    params = [placed(two, array, place) for array, place in zip(arrays, places, strict=True)]
    return fastopt.AdamW(params, lr=0.01, state_dtype="bfloat16", seed=5), arrays


def gradients(two, places, seed):
    """A gradient beside each parameter."""
    found, rng = [], np.random.default_rng(seed)
    for k, (shape, place) in enumerate(zip(SHAPES, places, strict=True)):
        if k in TABLES:
            indices = rng.integers(0, shape[0], 15)
            values = rng.standard_normal((15, shape[1])).astype(np.float32)
            found.append(fastopt.IndexedSlices(*(placed(two, own, place) for own in (indices, values))))
        else:
            found.append(placed(two, rng.standard_normal(shape).astype(np.float32), place))
    return found


def train(two, opt, places, seeds=(1, 2, 3), **step):
    return [opt.step(gradients(two, places, seed), **step) for seed in seeds]


def assert_same(got, want):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(bits(one), bits(other))


def test_each_parameter_is_updated_where_it_lies(two):
    (opt, got), (other, want) = made(two, PLACES), made(two, ON_HOST)
    train(two, opt, PLACES)
    train(two, other, ON_HOST)
    assert_same(got, want)
    assert {two.device_of(address) for address in two.owned} == {FIRST, SECOND}  # where state lies


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_the_norm_is_that_over_all_devices(two, limit):
    (opt, got), (other, want) = made(two, PLACES), made(two, ON_HOST)
    infos, expected = train(two, opt, PLACES, clip_norm=limit), train(two, other, ON_HOST, clip_norm=limit)
    for one, own in zip(infos, expected, strict=True):
        assert one.norm == pytest.approx(own.norm, rel=1e-6)
        assert one.clipped is own.clipped is (limit < 1)
    for array, own in zip(got, want, strict=True):
        np.testing.assert_allclose(array, own, rtol=1e-3, atol=1e-5)


def test_a_step_is_skipped_on_all_devices(two):
    opt, arrays = made(two, PLACES)
    train(two, opt, PLACES)
    before = [array.copy() for array in arrays]
    grads = gradients(two, PLACES, 4)
    grads[2].host[3] = np.nan
    info = opt.step(grads, skip_nonfinite=True)
    assert info.skipped and info.nonfinite == 2 and opt.steps == 3
    assert_same(arrays, before)


@pytest.mark.parametrize("other", [HOST, FIRST])
@pytest.mark.parametrize(("k", "name"), [(2, r"grads\[2\]"), (3, r"grads\[3\]\.(indices|values)")])
def test_a_gradient_lies_where_its_parameter_does(two, k, name, other):
    opt, arrays = made(two, PLACES)
    before = [array.copy() for array in arrays]
    grads = gradients(two, PLACES, 1)
    grads[k] = gradients(two, [other] * len(SHAPES), 1)[k]
    with pytest.raises(ValueError, match=rf"{name} is on .* but params\[{k}\].* on cuda:1"):
        opt.step(grads)
    assert opt.steps == 0
    assert_same(arrays, before)


def test_a_run_goes_on_on_other_devices(two, tmp_path):
    moved = HOST, SECOND, FIRST, HOST, SECOND, SECOND
    (opt, whole), (other, got) = made(two, PLACES), made(two, moved)
    train(two, opt, PLACES)
    opt.save(tmp_path / "run", params=True)
    other.load(tmp_path / "run")
    assert_same(got, whole)
    train(two, opt, PLACES, (4, 5))
    train(two, other, moved, (4, 5))
    assert_same(got, whole)
