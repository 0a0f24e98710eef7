"""The Rosenbrock function from (-1, 1) to its minimum at (1, 1)."""

import cases
import numpy as np
import pytest

import fastopt

STEPS = 5_000
LR = 1e-3


def gradient(p):
    x, y = p
    return np.array([-2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)])


def descend(opt, p):
    for _ in range(STEPS):
        opt.step(gradient(p))
    return p


def test_adam_ends_nearer_the_minimum_than_sgd():
    ends = {}
    for optimizer in (fastopt.Adam, fastopt.SGD):
        p = np.array([-1.0, 1.0])
        ends[optimizer] = np.linalg.norm(descend(optimizer(p, lr=LR), p) - 1)
    assert ends[fastopt.Adam] < ends[fastopt.SGD]


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_path_is_the_references(name):
    case, options = cases.BY_NAME[name], {"lr": LR}
    p = np.array([-1.0, 1.0])
    opt, want = case.make(p, options), case.reference(p, options)
    for _ in range(STEPS):
        opt.step(gradient(p))
        want.step(gradient(want.p))
        # every step feeds its rounding into the next gradient, and the valley damps it
        np.testing.assert_allclose(p, want.p, rtol=1e-10, atol=1e-12)
