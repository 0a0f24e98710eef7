"""RMSProp, plain and centered, with and without momentum."""

import math
from typing import NamedTuple

from fastopt.kernels.linked import register_jitable
from fastopt.kernels.rule import Linear, Rule, Still, register
from fastopt.kernels.rules.lerp import lerp


class RMSPropH(NamedTuple):
    lr: float
    alpha: float
    one_minus_alpha: float
    eps: float
    momentum: float

    @classmethod
    def fold(cls, step, *, lr, alpha, eps, momentum, **_):
        return cls(lr, alpha, 1.0 - alpha, eps, momentum)


class RMSPropMomentumH(RMSPropH):
    __slots__ = ()


class CenteredRMSPropH(RMSPropH):
    __slots__ = ()


class CenteredRMSPropMomentumH(RMSPropH):
    __slots__ = ()


@register_jitable
def rmsprop(h, p, g, square_avg, grad_avg, momentum_buffer):
    """RMSProp, Hinton 2012, "Neural Networks for Machine Learning", lecture 6e, slide 29;
    centered as Graves 2013, "Generating Sequences With Recurrent Neural Networks", eq. 38 to 45,
    with eps outside the root.

    v = alpha * v + (1 - alpha) * g^2
    centered: m = alpha * m + (1 - alpha) * g, u = g / (sqrt(v - m^2) + eps); else u = g / (sqrt(v) + eps)
    momentum: b = momentum * b + u, p = p - lr * b; else p = p - lr * u
    """
    square_avg = h.alpha * square_avg + h.one_minus_alpha * g * g
    spread = square_avg
    if grad_avg is not None:
        grad_avg = lerp(grad_avg, g, h.one_minus_alpha, h.alpha)
        spread = square_avg - grad_avg * grad_avg
        if spread != spread:  # v and m^2 are infinite, but v is the larger while m is a number
            spread = square_avg + (grad_avg - grad_avg)
    direction = g / (math.sqrt(spread) + h.eps)
    if momentum_buffer is not None:
        momentum_buffer = h.momentum * momentum_buffer + direction
        direction = momentum_buffer
    return p - h.lr * direction, square_avg, grad_avg, momentum_buffer


def _variant(hyper: type, grad_avg: str | None, momentum_buffer: str | None) -> Rule:
    slots = "square_avg", grad_avg, momentum_buffer
    missed = Linear if momentum_buffer else Still
    return register(Rule(hyper, rmsprop, slots, not_negative=("square_avg",), missed=missed))


RMSPROP = _variant(RMSPropH, None, None)
RMSPROP_MOMENTUM = _variant(RMSPropMomentumH, None, "momentum_buffer")
CENTERED_RMSPROP = _variant(CenteredRMSPropH, "grad_avg", None)
CENTERED_RMSPROP_MOMENTUM = _variant(CenteredRMSPropMomentumH, "grad_avg", "momentum_buffer")
