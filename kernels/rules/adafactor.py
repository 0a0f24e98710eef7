"""Adafactor; kernels/cpu/factored.py has what is done with matrices."""

import math
from typing import NamedTuple

import numpy as np

from fastopt.kernels.linked import register_jitable
from fastopt.kernels.rule import Rule, register
from fastopt.kernels.rules.lerp import lerp


class AdafactorH(NamedTuple):
    lr: float
    decay: float
    one_minus_decay: float
    smallest_variance: float
    smallest_mean: float
    smallest_rms: float
    d: float

    @classmethod
    def fold(cls, step, *, lr, beta2_decay, eps, d, compute_dtype, **_):
        eps1, eps2 = eps
        eps1 = float(np.finfo(compute_dtype).eps) if eps1 is None else eps1
        one_minus_decay = float(step) ** beta2_decay
        lr = min(lr, 1.0 / math.sqrt(step))
        return cls(lr, 1.0 - one_minus_decay, one_minus_decay, eps1 * eps1, eps1, eps2, d)


@register_jitable
def adafactor_direction(h, g, variance):
    """Adafactor, Shazeer & Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
    Algorithms 4 and 5, as in torch: u = g / max(sqrt(v), eps1), where the paper adds eps1 to g^2.

    The length of the step is :func:`adafactor_factor`'s. The estimate v of a matrix's g^2 is
    R_i * C_j / max(mean(R), eps1), of means over rows and columns that decay as v in :func:`adafactor`.
    """
    # This way round a NaN stays one.
    variance = h.smallest_variance if variance < h.smallest_variance else variance
    return g / math.sqrt(variance)


@register_jitable
def share_of(h, moment, mean):
    """A row's share R_i / max(mean(R), eps1) of its matrix's moments."""
    return moment / (h.smallest_mean if mean < h.smallest_mean else mean)


@register_jitable
def adafactor(h, p, g, variance):
    """Adafactor of a vector: v = beta2_t * v + (1 - beta2_t) * g^2, with beta2_t = 1 - t^beta2_decay."""
    variance = lerp(variance, g * g, h.one_minus_decay, h.decay)
    return adafactor_direction(h, g, variance), variance


@register_jitable
def adafactor_factor(h, p_sq, u_sq, p_unit, u_unit, size):
    """The factor of the length of :func:`adafactor`'s steps, with RMS the root of the mean square over all p:

    p = p - min(lr, 1 / sqrt(t)) * max(eps2, RMS(p)) / max(1, RMS(u) / d) * u
    """
    rms_p, rms_u = math.sqrt(p_sq / size) * p_unit, math.sqrt(u_sq / size) * u_unit
    return max(h.smallest_rms, rms_p) / max(1.0, rms_u / h.d)


ADAFACTOR = register(
    Rule(
        AdafactorH,
        adafactor,
        ("variance",),
        not_negative=("variance",),
        trust_ratio=adafactor_factor,
        matrix_slots=("row_var", "col_var"),
    )
)
