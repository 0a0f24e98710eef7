"""Adafactor: second moments of the rows and the columns of a matrix."""

from typing import Any, Unpack

from fastopt._core.options import SharedOptions
from fastopt.kernels import rules
from fastopt.kernels.rule import Rule
from fastopt.optimizer import Optimizer
from fastopt.optimizers.options import LearningRate, Options


class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern 2018, Algorithms 4 and 5): for a matrix, second moments of its rows and of
    its columns in place of those of its elements.

    With w = t^beta2_decay, and RMS the root of the mean square over the array, p being that before the step:

    matrices (the last two axes): R = R + w * (mean(g^2 over a row) - R), C the same over a column,
        v = R * C / max(mean(R), eps1); other arrays: v = v + w * (g^2 - v)
    u = g / max(sqrt(v), eps1)
    p = p - lr * weight_decay * p - min(lr, 1 / sqrt(t)) * max(eps2, RMS(p)) / max(1, RMS(u) / d) * u

    This is torch's Adafactor: the paper adds eps1 to g^2 and has no weight decay. Sparse gradients are
    refused, as by torch.

    The state is ``row_var``, which is R, of shape (..., rows, 1), and ``col_var``, which is C, of shape
    (..., 1, columns), both never in fewer bits than float32; of an array of fewer than two dimensions it is
    ``variance``, which is v, of the array's shape.

    Args:
        params, maximize: as for :class:`fastopt.Optimizer`.
        lr: the largest step, relative to the parameters, 1e-2 by default.
        beta2_decay: the exponent of w, at most 0, -0.8 by default.
        eps: eps1 and eps2, (None, 1e-3) by default. None stands for the epsilon of the dtype that the step
            is computed with, float32 or float64.
        d: the largest root mean square of u, beyond which u is scaled down, above 0, 1.0 by default.
        weight_decay: decoupled weight decay, at least 0, 0 by default.
    """

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params, shared, lr=lr, beta2_decay=beta2_decay, eps=eps, d=d, weight_decay=weight_decay,
            maximize=maximize,
        )  # fmt: skip

    def rule(self, options: Options) -> Rule:
        return rules.ADAFACTOR

    def decoupled(self, options: Options) -> bool:
        return True
