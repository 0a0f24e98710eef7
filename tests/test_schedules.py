"""Learning-rate schedules and the examples in the documentation."""

import doctest
import math
import pickle

import numpy as np
import pytest

import fastopt
import fastopt.custom
from fastopt import schedules as s


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (s.constant(), [1, 1, 1, 1]),
        (s.step(2), [1, 1, 0.1, 0.1]),
        (s.step(2, gamma=0.5), [1, 1, 0.5, 0.5, 0.25]),
        (s.multistep([3, 1], 0.5), [1, 0.5, 0.5, 0.25]),
        (s.multistep([2, 2], 0.5), [1, 1, 0.25]),
        (s.multistep([]), [1, 1]),
        (s.exponential(0.5), [1, 0.5, 0.25]),
        (s.exponential(0.0), [1, 0, 0]),
        (s.cosine(2), [1, 0.5, 0, 0, 0]),
        (s.cosine(2, final=0.5), [1, 0.75, 0.5, 0.5]),
        (s.linear_warmup(4), [0.25, 0.5, 0.75, 1, 1, 1]),
        (s.linear_warmup(0), [1, 1]),
        (s.warmup_cosine(2, 4), [0.5, 1, 1, 0.5, 0, 0]),
        (s.warmup_cosine(0, 2, final=0.2), [1, 0.6, 0.2, 0.2]),
        (s.inverse_sqrt(1), [1, 0.5**0.5, 3**-0.5, 0.5]),
        (s.inverse_sqrt(4), [0.25, 0.5, 0.75, 1, 0.8**0.5, (2 / 3) ** 0.5]),
        (s.polynomial(4), [1, 0.75, 0.5, 0.25, 0, 0]),
        (s.polynomial(2, 2.0, 0.2), [1, 0.4, 0.2, 0.2]),
        (s.one_cycle(5, 0.6, 4.0, 10.0), [0.25, 0.625, 1, 0.5125, 0.025, 0.025]),
        (s.one_cycle(2, 0.5, 4.0, 10.0), [1, 0.025, 0.025]),
        (s.one_cycle(3, 1.0, 4.0, 10.0), [0.25, 0.625, 1, 0.025]),
        (s.linear_warmup(4) * s.exponential(0.5), [0.25, 0.25, 0.1875, 0.125, 0.0625]),
        (s.product([s.exponential(0.5), float]), [0, 0.5, 0.5, 0.375]),
        (s.product([]), [1, 1]),
    ],
    ids=repr,
)
def test_factors_are_those_of_the_formula(schedule, values):
    assert [schedule(step) for step in range(len(values))] == pytest.approx(values, abs=1e-15)
    assert [(3 * schedule)(step) for step in range(len(values))] == pytest.approx(np.multiply(values, 3))


def test_a_schedule_times_numbers_is_a_schedule():
    scaled = 2 * s.cosine(10) * 0.5 * 3
    assert scaled == 3.0 * s.cosine(10)
    assert scaled(0) == 3
    assert repr(scaled) == "3.0 * cosine(total=10, final=0.0)"
    assert repr(s.step(3)) == "step(every=3, gamma=0.1)"
    assert pickle.loads(pickle.dumps(scaled)) == scaled


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: s.step(0), "every is 0: expected at least 1 step"),
        (lambda: s.step(1, -1.0), "gamma is -1.0: expected at least 0"),
        (lambda: s.step(1, math.nan), "gamma is nan"),
        (lambda: s.multistep([1], -0.5), "gamma is -0.5"),
        (lambda: s.exponential(-1), "gamma is -1"),
        (lambda: s.cosine(0), "total is 0: expected at least 1 step"),
        (lambda: s.cosine(1, -1), "final is -1: expected at least 0"),
        (lambda: s.linear_warmup(-1), "warmup is -1: expected at least 0 steps"),
        (lambda: s.warmup_cosine(-1, 4), "warmup is -1"),
        (lambda: s.warmup_cosine(4, 4), "total is 4: expected more than warmup, 4"),
        (lambda: s.warmup_cosine(1, 4, -1), "final is -1"),
        (lambda: s.inverse_sqrt(0), "warmup is 0: expected at least 1 step"),
        (lambda: s.polynomial(0), "total is 0: expected at least 1 step"),
        (lambda: s.polynomial(1, 0), "power is 0: expected more than 0"),
        (lambda: s.polynomial(1, 1, -1), "final is -1"),
        (lambda: s.one_cycle(1), "total is 1: expected at least 2 steps"),
        (lambda: s.one_cycle(2, 1.5), "pct_start is 1.5: expected a share, from 0 to 1"),
        (lambda: s.one_cycle(2, div_factor=0), "div_factor is 0: expected more than 0"),
        (lambda: s.one_cycle(2, final_div_factor=0), "final_div_factor is 0: expected more than 0"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_product_is_of_functions():
    with pytest.raises(TypeError, match=r"schedules\[1\] is 0.5: expected a schedule or a function"):
        s.product([s.constant(), 0.5])
    twice = 2 * (s.cosine(4) * s.linear_warmup(2)) * 3
    assert twice == s.product([s.cosine(4), s.linear_warmup(2)]) * 6
    assert pickle.loads(pickle.dumps(twice)) == twice
    product = "product(schedules=(cosine(total=4, final=0.0), linear_warmup(warmup=2)))"
    assert repr(twice) == f"6.0 * {product}"


@pytest.mark.parametrize("total", [3, 10, 37])
def test_factors_are_those_of_torch(total):
    torch = pytest.importorskip("torch")
    lr_scheduler = torch.optim.lr_scheduler

    def rates(make):
        opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.5)
        scheduler, found = make(opt), []
        for _ in range(total):
            found.append(opt.param_groups[0]["lr"])
            opt.step()
            scheduler.step() if len(found) < total else None
        return found

    def factors(schedule):
        return [schedule(step) for step in range(total)]

    for power in (1.0, 2.5):
        want = rates(lambda opt, power=power: lr_scheduler.PolynomialLR(opt, total - 1, power))
        assert factors(s.polynomial(total - 1, power)) == pytest.approx(want, abs=1e-12)
    for given in ({}, {"pct_start": 0.5, "div_factor": 10.0, "final_div_factor": 100.0}):
        want = rates(lambda opt, given=given: lr_scheduler.OneCycleLR(opt, 1.0, total_steps=total, **given))
        assert factors(s.one_cycle(total, **given)) == pytest.approx(want, abs=1e-12)


def test_an_optimizer_asks_its_schedule_for_the_number_of_finished_steps():
    asked = []
    p = np.zeros(1)
    opt = fastopt.SGD(p, lr=lambda step: asked.append(step) or step)
    for _ in range(4):
        opt.step(np.ones(1))
    assert asked == [0, 1, 2, 3]
    assert p[0] == -6


def test_a_schedule_counts_steps_of_the_optimizer_and_not_of_the_parameter():
    p, q = np.zeros(1), np.zeros(1)
    opt = fastopt.SGD([p, q], lr=1.0 * s.exponential(0.5))
    opt.step([np.ones(1), None])
    opt.step([None, np.ones(1)])
    assert (p[0], q[0]) == (-1, -0.5)


@pytest.mark.parametrize("module", [s, fastopt.custom], ids=lambda module: module.__name__)
def test_examples_in_the_documentation_hold(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
