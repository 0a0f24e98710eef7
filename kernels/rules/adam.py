"""Adam, AMSGrad, torch's SparseAdam, and Adam with one second moment a row."""

import math
from typing import NamedTuple

from fastopt.kernels.linked import register_jitable
from fastopt.kernels.rule import Adaptive, Rule, register
from fastopt.kernels.rules.folding import power, root
from fastopt.kernels.rules.lerp import lerp


class AdamH(NamedTuple):
    step_size: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    root_correction: float
    eps: float

    @classmethod
    def fold(cls, step, *, lr, betas, eps, **_):
        beta1, beta2 = betas
        correction1, correction2 = 1.0 - power(beta1, step), 1.0 - power(beta2, step)
        return cls(lr / correction1, beta1, 1.0 - beta1, beta2, 1.0 - beta2, 1.0 / root(correction2), eps)


class AMSGradH(AdamH):
    __slots__ = ()


@register_jitable
def adam(h, p, g, exp_avg, exp_avg_sq, max_exp_avg_sq):
    """Adam, Kingma & Ba 2015, "Adam: A Method for Stochastic Optimization", Algorithm 1; with
    decoupled decay AdamW, Loshchilov & Hutter 2019, Algorithm 2; with the maximum AMSGrad,
    Reddi, Kale & Kumar 2018, "On the Convergence of Adam and Beyond", Algorithm 2.

    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g^2
    AMSGrad: w = max(w, v), which takes the place of v below
    p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    The AMSGrad paper has no bias corrections and no eps; torch has both, the maximum being
    taken of the uncorrected v.
    """
    exp_avg = lerp(exp_avg, g, h.one_minus_beta1, h.beta1)
    exp_avg_sq = h.beta2 * exp_avg_sq + h.one_minus_beta2 * g * g
    second = exp_avg_sq
    if max_exp_avg_sq is not None:
        # This way round a NaN in exp_avg_sq is taken over.
        max_exp_avg_sq = max_exp_avg_sq if max_exp_avg_sq > exp_avg_sq else exp_avg_sq
        second = max_exp_avg_sq
    p = p - h.step_size * exp_avg / (math.sqrt(second) * h.root_correction + h.eps)
    return p, exp_avg, exp_avg_sq, max_exp_avg_sq


class SparseAdamH(NamedTuple):
    step_size: float
    one_minus_beta1: float
    one_minus_beta2: float
    eps: float

    @classmethod
    def fold(cls, step, *, lr, betas, eps, **_):
        beta1, beta2 = betas
        correction1, correction2 = 1.0 - power(beta1, step), 1.0 - power(beta2, step)
        return cls(lr * root(correction2) / correction1, 1.0 - beta1, 1.0 - beta2, eps)


@register_jitable
def sparse_adam(h, p, g, exp_avg, exp_avg_sq):
    """Adam as torch.optim.SparseAdam has it: eps is added to the root before its bias correction.

    m = m + (1 - beta1) * (g - m)
    v = v + (1 - beta2) * (g^2 - v)
    p = p - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * (m / (sqrt(v) + eps))
    """
    exp_avg = exp_avg + (g - exp_avg) * h.one_minus_beta1
    exp_avg_sq = exp_avg_sq + (g * g - exp_avg_sq) * h.one_minus_beta2
    return p - h.step_size * (exp_avg / (math.sqrt(exp_avg_sq) + h.eps)), exp_avg, exp_avg_sq


class RowwiseAdamH(AdamH):
    __slots__ = ()


@register_jitable
def rowwise_adam(h, p, g, exp_avg, row_exp_avg_sq):
    """Adam with one second moment a row, v = beta2 * v + (1 - beta2) * mean(g^2 over the row);
    FBGEMM's PARTIAL_ROWWISE_ADAM."""
    exp_avg = lerp(exp_avg, g, h.one_minus_beta1, h.beta1)
    return p - h.step_size / (math.sqrt(row_exp_avg_sq) * h.root_correction + h.eps) * exp_avg, exp_avg


@register_jitable
def average_mean_square(h, mean_sq, row_exp_avg_sq):
    """What :func:`rowwise_adam` does once a row."""
    return (h.beta2 * row_exp_avg_sq + h.one_minus_beta2 * mean_sq,)


ADAM = register(
    Rule(AdamH, adam, ("exp_avg", "exp_avg_sq", None), not_negative=("exp_avg_sq",), missed=Adaptive)
)
AMSGRAD = register(
    Rule(
        AMSGradH,
        adam,
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        not_negative=("exp_avg_sq", "max_exp_avg_sq"),
        missed=Adaptive,
    )
)
SPARSE_ADAM = register(
    Rule(SparseAdamH, sparse_adam, ("exp_avg", "exp_avg_sq"), not_negative=("exp_avg_sq",))
)
ROWWISE_ADAM = register(
    Rule(
        RowwiseAdamH,
        rowwise_adam,
        ("exp_avg",),
        average_mean_square,
        ("exp_avg_sq",),
        missed=Adaptive,
    )
)
