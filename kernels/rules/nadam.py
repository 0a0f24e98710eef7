"""NAdam."""

import math
from typing import Any, NamedTuple

import numpy as np

from fastopt.kernels.linked import register_jitable
from fastopt.kernels.rule import Adaptive, Rule, register
from fastopt.kernels.rules.folding import exponential, power, root
from fastopt.kernels.rules.lerp import lerp


class NAdamH(NamedTuple):
    """gradient_step: the factor of the gradient, lr * (1 - mu_t) / (1 - product of mu_1 .. mu_t).
    momentum_ratio: the factor of the first moment, over that of the gradient."""

    gradient_step: float
    momentum_ratio: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    root_correction: float
    eps: float

    @property
    def step_size(self) -> float:
        """The factor of the first moment, which alone moves p where the gradient is 0."""
        return self.gradient_step * self.momentum_ratio

    @classmethod
    def fold(cls, step, *, lr, betas, momentum_decay, eps, **_):
        product = mu_product(step, betas[0], momentum_decay)
        return cls.with_product(product, step, lr, betas, momentum_decay, eps)

    @classmethod
    def with_product(cls, product, step, lr, betas, momentum_decay, eps):
        """The hyperparameters of a step, given the product of the momenta up to it."""
        beta1, beta2 = betas
        mu, mu_next = (momentum_of(t, beta1, momentum_decay) for t in (step, step + 1))
        gradient_rate, momentum_rate = (1.0 - mu) / (1.0 - product), mu_next / (1.0 - product * mu_next)
        return cls(
            lr * gradient_rate,
            momentum_rate / gradient_rate,
            beta1,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            1.0 / root(1.0 - power(beta2, step)),
            eps,
        )


def momentum_of(step: Any, beta1: float, momentum_decay: float) -> Any:
    """mu_t of NAdam."""
    return beta1 * (1.0 - 0.5 * power(0.96, step * momentum_decay))


_ORDERS = np.arange(1.0, 54.0)  # k; 2^-53 is below rounding

_WEIGHTS = 1.0 / (_ORDERS * 2.0**_ORDERS)

NEGLIGIBLE = 1e-20  # a product beside which 1 is 1


def mu_product(step: Any, beta1: float, momentum_decay: float) -> Any:
    """mu_1 * ... * mu_step of NAdam, for a step or an array of them, in a time that does not depend on it.

    With x_i = 0.96^(i * momentum_decay) / 2, it is beta1^step times the exponential of
    sum_i log(1 - x_i) = -sum_k (sum_i x_i^k) / k, the inner sums being geometric series.
    """
    if isinstance(step, np.ndarray):
        product = power(beta1, step)
        known = product >= NEGLIGIBLE
        product[known] *= _mu_factor(step[known], momentum_decay)
        product[~known] = 0.0
        return product
    product = power(beta1, step)
    return product * _mu_factor(step, momentum_decay) if product >= NEGLIGIBLE else 0.0


def _mu_factor(step: Any, momentum_decay: float) -> Any:
    """The product over that of as many beta1."""
    rate = max(momentum_decay * math.log(0.96), -1e3)  # exp(-1e3) is 0
    if rate == 0.0:
        return power(0.5, step)
    rates = _ORDERS * rate
    powers = np.exp(rates) * np.expm1(np.multiply.outer(step, rates)) / np.expm1(rates)
    total = -(_WEIGHTS * powers).sum(axis=-1)
    return exponential(total)


@register_jitable
def nadam(h, p, g, exp_avg, exp_avg_sq):
    """NAdam, Dozat 2016, "Incorporating Nesterov Momentum into Adam", Algorithm 2; m decays
    by beta1, as in torch (the paper: by mu_t).

    m, v as in Adam; mu_t = beta1 * (1 - 0.96^(t * momentum_decay) / 2); M_t = mu_1 * ... * mu_t
    p = p - lr * ((1 - mu_t) / (1 - M_t) * g + mu_{t+1} / (1 - M_{t+1}) * m)
                / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    """
    exp_avg = lerp(exp_avg, g, h.one_minus_beta1, h.beta1)
    exp_avg_sq = h.beta2 * exp_avg_sq + h.one_minus_beta2 * g * g
    ahead = g + h.momentum_ratio * exp_avg
    if ahead - ahead != ahead - ahead:  # It is not finite, and so v is not: what is finite over that is 0.
        ahead = exp_avg
    p = p - h.gradient_step * ahead / (math.sqrt(exp_avg_sq) * h.root_correction + h.eps)
    return p, exp_avg, exp_avg_sq


NADAM = register(
    Rule(NAdamH, nadam, ("exp_avg", "exp_avg_sq"), not_negative=("exp_avg_sq",), missed=Adaptive)
)
