"""What a step leaves behind: nothing of what failed, nothing of its gradients, no circle."""

import gc
import math
import weakref

import numpy as np
import pytest

import fastopt


def test_a_step_that_fails_between_groups_leaves_no_numbers_of_its_own():
    rate = [0.125]
    params = [np.ones(5, np.float32), np.ones(5, np.float32)]
    groups = [{"params": [params[0]], "lr": 0.125}, {"params": [params[1]], "lr": lambda step: rate[0]}]
    opt = fastopt.SGD(groups)
    grads = [[np.ones(5, np.float32)], [np.ones(5, np.float32)]]
    opt.step(grads)
    rate[0] = 1e39
    with pytest.raises(ValueError, match=r"params\[1\] make lr 1e\+39: expected a number that fits float32"):
        opt.step(grads, grad_scale=0.5)
    rate[0] = 0.125
    opt.step(grads)
    for p in params:
        np.testing.assert_array_equal(p, np.float32(0.75))


@pytest.fixture
def no_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def slices(value=1.0):
    return fastopt.IndexedSlices(np.array([1, 1]), np.full((2, 3), value, np.float32))


@pytest.mark.usefixtures("no_collection")
def test_an_optimizer_goes_with_its_last_name():
    p = np.ones((4, 3), np.float32)
    opt = fastopt.Adam([{"params": [p]}])
    opt.step([[np.ones_like(p)]])
    opt.step([[slices()]])
    gone = [weakref.ref(one) for one in (opt, opt.param_groups[0]["params"][0])]
    del opt, p
    assert [one() for one in gone] == [None, None]


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("outcome", ["done", "skipped", "failed"])
def test_gradients_go_with_the_step(outcome):
    opt = fastopt.Adam([np.ones((4, 3), np.float32), np.ones(2, np.float32)])
    grads = [slices(), np.ones(2, np.float32)]
    opt.step(grads)
    grads = [slices(math.nan if outcome == "skipped" else 1.0), np.ones(2, np.float32)]
    if outcome == "failed":
        opt.param_groups[0]["lr"] = 1e39
        with pytest.raises(ValueError, match="expected a number that fits float32"):
            opt.step(grads)
    else:
        assert opt.step(grads, skip_nonfinite=True).skipped is (outcome == "skipped")
    gone = [weakref.ref(one) for one in (grads[0].values, grads[0].indices, grads[1])]
    del grads
    assert [one() for one in gone] == [None, None, None]


def test_a_limit_beyond_float32_is_none_there():
    p = np.zeros(2, np.float32)
    fastopt.SGD(p, lr=1.0).step(np.array([-1e30, 5], np.float32), clip_value=1e39)
    np.testing.assert_array_equal(p, np.array([1e30, -5], np.float32))


def test_learning_rates_assigned_before_each_step_are_followed():
    p, twin = np.ones(3, np.float32), np.ones(3, np.float32)
    opt, scheduled = fastopt.AdamW(p), fastopt.AdamW(twin, lr=lambda step: 0.5**step)
    for step in range(4):
        opt.param_groups[0]["lr"] = 0.5**step
        g = np.full(3, step - 1.5, np.float32)
        opt.step(g)
        scheduled.step(g)
    assert p.tobytes() == twin.tobytes()
