"""A rule from outside, for the tests that need one."""

import math
from typing import NamedTuple

import fastopt


class SignumH(NamedTuple):
    lr: float = 1e-4
    beta: float = 0.9


def signum(h, p, g, exp_avg):
    """Signum, Bernstein et al. 2018, Algorithm 2."""
    exp_avg = g + h.beta * (exp_avg - g)
    if exp_avg:
        p = p - math.copysign(h.lr, exp_avg)
    return p, exp_avg


Signum = fastopt.register_rule("Signum", SignumH, signum, ["exp_avg"], decoupled_weight_decay=True)
