"""SGD, and SGD with momentum."""

from typing import NamedTuple

from fastopt.kernels.linked import register_jitable
from fastopt.kernels.rule import Linear, Rule, Still, register
from fastopt.kernels.rules.folding import choose


class SGDH(NamedTuple):
    lr: float


@register_jitable
def sgd(h, p, g):
    """Stochastic gradient descent (Robbins & Monro 1951): p = p - lr * g."""
    return (p - h.lr * g,)


class MomentumH(NamedTuple):
    lr: float
    momentum: float
    undampened: float
    nesterov: bool

    @classmethod
    def fold(cls, step, *, lr, momentum, dampening, nesterov, **_):
        # torch takes the first gradient undampened.
        return cls(lr, momentum, choose(step == 1, 1.0, 1.0 - dampening), nesterov)


@register_jitable
def momentum(h, p, g, momentum_buffer):
    """SGD with momentum, Sutskever et al. 2013, "On the importance of initialization and
    momentum in deep learning", equations 1 to 4, in torch's form: lr outside the buffer.

    b = momentum * b + (1 - dampening) * g
    p = p - lr * b, with Nesterov p = p - lr * (g + momentum * b)
    """
    momentum_buffer = h.momentum * momentum_buffer + h.undampened * g
    if h.nesterov:
        g = g + h.momentum * momentum_buffer
    else:
        g = momentum_buffer
    return p - h.lr * g, momentum_buffer


SGD = register(Rule(SGDH, sgd, missed=Still, missed_l2=Still))
MOMENTUM = register(Rule(MomentumH, momentum, ("momentum_buffer",), missed=Linear, missed_l2=Linear))
