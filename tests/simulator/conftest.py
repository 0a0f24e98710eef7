"""Every rule, with every kind of weight decay, as launches of a kernel take it."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

import fastopt
from fastopt.kernels.rule import L2, RULES, Decoupled, Rule, Scaled


class SignumH(NamedTuple):
    lr: float
    beta: float


def signum(h, p, g, exp_avg):
    exp_avg = g + h.beta * (exp_avg - g)
    if exp_avg:
        p = p - math.copysign(h.lr, exp_avg)
    return p, exp_avg


# but for those with a trust ratio: norms of whole arrays are the CPU's alone
PACKAGE = [
    hyper
    for hyper, rule in RULES.items()
    if hyper.__module__.startswith("fastopt.kernels.rules.") and rule.trust_ratio is None
]


@pytest.fixture(params=[*PACKAGE, SignumH], ids=lambda hyper: hyper.__name__)
def rule(request: pytest.FixtureRequest) -> Iterator[Rule]:
    """Every rule of the package, and one that a user registered."""
    if request.param is SignumH:
        fastopt.register_rule("Signum", SignumH, signum, ["exp_avg"])
    yield RULES[request.param]
    if request.param is SignumH:
        del RULES[SignumH]


@pytest.fixture(params=[Scaled, L2, Decoupled])
def decay(request: pytest.FixtureRequest) -> type:
    return request.param


@pytest.fixture
def hyperparameters(rule: Rule, decay: type) -> Callable[..., tuple]:
    """``hyperparameters(dtype, step, scale, limit, weight_decay, options)``: h and c of a launch."""

    def hyperparameters(dtype, step, scale, limit, weight_decay, options):
        h = rule.fold(step, options, dtype)
        if decay is Scaled:
            c = Scaled(scale, limit)
        elif decay is L2:
            c = L2(scale, limit, weight_decay)
        else:
            c = Decoupled(scale, limit, 1.0 - options["lr"] * weight_decay)
        return tuple(type(t)(*[x if isinstance(x, bool) else dtype(x) for x in t]) for t in (h, c))

    return hyperparameters


@pytest.fixture
def arrays(rule: Rule) -> Callable[..., list[Any]]:
    """``arrays(dtype, rows, dim)``: the other arguments, p and g random and the state 0.

    Each array is the middle of one with an element, or a row, more at either end.
    """

    def arrays(dtype, rows, dim):
        rng = np.random.default_rng(rows)
        shape = (rows + 2, dim) if rule.row_slots else (rows * dim + 2,)
        p, g = (rng.standard_normal(shape).astype(dtype)[1:-1] for _ in range(2))
        found = [p, g, tuple(np.zeros(shape, dtype)[1:-1] for _ in rule.state_slots)]
        if rule.row_slots:
            found.append(tuple(np.zeros(rows + 2, dtype)[1:-1] for _ in rule.row_slots))
        return found

    return arrays
