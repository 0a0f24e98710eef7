"""Lion."""

from typing import NamedTuple

from fastopt.kernels.linked import register_jitable
from fastopt.kernels.rule import Rule, register


class LionH(NamedTuple):
    lr: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float

    @classmethod
    def fold(cls, step, *, lr, betas, **_):
        beta1, beta2 = betas
        return cls(lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2)


@register_jitable
def lion(h, p, g, exp_avg):
    """Lion, Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", Algorithm 2.

    p = p - lr * sign(beta1 * m + (1 - beta1) * g)
    m = beta2 * m + (1 - beta2) * g
    """
    direction = h.beta1 * exp_avg + h.one_minus_beta1 * g
    # x > -x says x > 0 without a literal; 0 and NaN stay what they are.
    move = h.lr if direction > -direction else direction
    move = -h.lr if direction < -direction else move
    return p - move, h.beta2 * exp_avg + h.one_minus_beta2 * g


LION = register(Rule(LionH, lion, ("exp_avg",)))
