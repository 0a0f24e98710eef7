"""LAMB."""

import math
from typing import NamedTuple

from fastopt.kernels.linked import register_jitable
from fastopt.kernels.rule import Rule, register
from fastopt.kernels.rules.folding import power, root
from fastopt.kernels.rules.lerp import lerp


class LAMBH(NamedTuple):
    lr: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    correction: float
    root_correction: float
    eps: float
    weight_decay: float

    @classmethod
    def fold(cls, step, *, lr, betas, eps, weight_decay, **_):
        beta1, beta2 = betas
        correction = 1.0 / (1.0 - power(beta1, step))
        root_correction = 1.0 / root(1.0 - power(beta2, step))
        return cls(lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2, correction, root_correction, eps, weight_decay)


@register_jitable
def lamb(h, p, g, exp_avg, exp_avg_sq):
    """LAMB, You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76
    minutes", Algorithm 2; the direction of a step, whose length :func:`trust_ratio` gives. A layer
    of the paper is an array or, with a sparse gradient, a row.

    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g^2
    u = m / (1 - beta1^t) / (sqrt(v) / sqrt(1 - beta2^t) + eps) + weight_decay * p
    """
    exp_avg = lerp(exp_avg, g, h.one_minus_beta1, h.beta1)
    exp_avg_sq = h.beta2 * exp_avg_sq + h.one_minus_beta2 * g * g
    direction = exp_avg * h.correction / (math.sqrt(exp_avg_sq) * h.root_correction + h.eps)
    return direction + h.weight_decay * p, exp_avg, exp_avg_sq


@register_jitable
def trust_ratio(h, p_sq, u_sq, p_unit, u_unit, size):
    """The ratio |p| / |u| in p = p - lr * |p| / |u| * u, 1 where either norm is 0 (the paper's phi being
    the identity)."""
    if p_sq > 0.0 and u_sq > 0.0:
        return math.sqrt(p_sq) / math.sqrt(u_sq) * (p_unit / u_unit)
    return 1.0


LAMB = register(
    Rule(
        LAMBH,
        lamb,
        ("exp_avg", "exp_avg_sq"),
        not_negative=("exp_avg_sq",),
        trust_ratio=trust_ratio,
        own_decay=True,
    )
)
