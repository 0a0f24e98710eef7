"""RAdam."""

import math
from typing import NamedTuple

from fastopt.kernels.linked import register_jitable
from fastopt.kernels.rule import Adaptive, Rule, register
from fastopt.kernels.rules.folding import choose, power, root
from fastopt.kernels.rules.lerp import lerp


class RAdamH(NamedTuple):
    step_size: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    eps: float
    rectified: bool

    @classmethod
    def fold(cls, step, *, lr, betas, eps, **_):
        beta1, beta2 = betas
        power2 = power(beta2, step)
        correction1, correction2 = 1.0 - power(beta1, step), 1.0 - power2
        step_size = lr / correction1
        rho_inf = 2.0 / (1.0 - beta2) - 1.0
        rho = rho_inf - 2.0 * step * power2 / correction2
        rectified = rho > 5.0
        if rho_inf > 5.0:  # else no rho is
            rho = choose(rectified, rho, 5.0)
            r = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho)
            step_size = choose(rectified, step_size * root(r * correction2), step_size)
        return cls(step_size, beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps, rectified)


@register_jitable
def radam(h, p, g, exp_avg, exp_avg_sq):
    """RAdam, Liu et al. 2020, "On the Variance of the Adaptive Learning Rate and Beyond",
    Algorithm 2; rectified from rho_t > 5 on, as in torch (the paper: 4).

    m, v as in Adam; rho_inf = 2 / (1 - beta2) - 1; rho_t = rho_inf - 2 t beta2^t / (1 - beta2^t)
    rho_t > 5: p = p - lr * r_t * m / (1 - beta1^t) * sqrt(1 - beta2^t) / (sqrt(v) + eps)
    else:      p = p - lr * m / (1 - beta1^t)
    """
    exp_avg = lerp(exp_avg, g, h.one_minus_beta1, h.beta1)
    exp_avg_sq = h.beta2 * exp_avg_sq + h.one_minus_beta2 * g * g
    if h.rectified:
        p = p - h.step_size * exp_avg / (math.sqrt(exp_avg_sq) + h.eps)
    else:
        p = p - h.step_size * exp_avg
    return p, exp_avg, exp_avg_sq


RADAM = register(
    Rule(RAdamH, radam, ("exp_avg", "exp_avg_sq"), not_negative=("exp_avg_sq",), missed=Adaptive)
)
