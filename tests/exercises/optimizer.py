"""An optimizer in one file: its rule, and the class that users call."""

from typing import Any, NamedTuple

from numba.extending import register_jitable

import fastopt
from fastopt.kernels.rule import Loop, Rule, Still, register


class LeakyH(NamedTuple):
    lr: float
    leak: float


@register_jitable
def leaky(h, p, g, total):
    """p = p - lr * s, with s = g + leak * s, which is SGD with momentum under another name."""
    total = g + h.leak * total
    return p - h.lr * total, total


LEAKY = register(Rule(LeakyH, leaky, ("total",), missed=Loop, missed_l2=Still))


class Leaky(fastopt.Optimizer):
    """Steps along a leaky sum of gradients. State: ``total``, shaped as the parameter."""

    def __init__(self, params: Any, lr: float = 0.1, leak: float = 0.5, **shared: Any) -> None:
        super().__init__(params, shared, lr=lr, leak=leak, weight_decay=0.0, maximize=False)

    def rule(self, options: Any) -> Rule:
        return LEAKY
