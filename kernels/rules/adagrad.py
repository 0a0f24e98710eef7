"""AdaGrad, with a sum for each element or for each row."""

import math
from typing import NamedTuple

from fastopt.kernels.linked import register_jitable
from fastopt.kernels.rule import Rule, Still, register


class AdaGradH(NamedTuple):
    lr: float
    eps: float

    @classmethod
    def fold(cls, step, *, lr, lr_decay, eps, **_):
        return cls(lr / (1.0 + (step - 1) * lr_decay), eps)


@register_jitable
def adagrad(h, p, g, sum_sq):
    """AdaGrad, Duchi, Hazan & Singer 2011, "Adaptive Subgradient Methods", Figure 1, diagonal.

    s = s + g^2
    p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)
    """
    sum_sq = sum_sq + g * g
    return p - h.lr * g / (math.sqrt(sum_sq) + h.eps), sum_sq


class RowwiseAdaGradH(AdaGradH):
    __slots__ = ()


@register_jitable
def rowwise_adagrad(h, p, g, row_sum_sq):
    """AdaGrad with one accumulator a row: s = s + mean(g^2 over the row); FBGEMM's
    EXACT_ROWWISE_ADAGRAD (Khudia et al. 2021).

    The quotient is the row's, and one division does for all its elements.
    """
    return (p - h.lr / (math.sqrt(row_sum_sq) + h.eps) * g,)


@register_jitable
def add_mean_square(h, mean_sq, row_sum_sq):
    """What :func:`rowwise_adagrad` does once a row."""
    return (row_sum_sq + mean_sq,)


ADAGRAD = register(Rule(AdaGradH, adagrad, ("sum",), not_negative=("sum",), missed=Still))
ROWWISE_ADAGRAD = register(
    Rule(
        RowwiseAdaGradH,
        rowwise_adagrad,
        update_row=add_mean_square,
        row_slots=("sum",),
        missed=Still,
    )
)
