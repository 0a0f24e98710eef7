"""RAdam: Adam with a rectified step."""

from typing import Any, Unpack

from fastopt._core.options import SharedOptions
from fastopt.kernels import rules
from fastopt.kernels.rule import Rule
from fastopt.optimizer import Optimizer
from fastopt.optimizers.options import LearningRate, Options


class RAdam(Optimizer):
    """RAdam (Liu et al. 2020, Algorithm 2): Adam whose step is rectified by the variance of its adaptive
    rate, and is plain momentum in the first steps, where that variance is unbounded.

    m and v are those of :class:`Adam`; rho_inf = 2 / (1 - beta2) - 1;
    rho = rho_inf - 2 * t * beta2^t / (1 - beta2^t). Where rho > 5,
    p = p - lr * r * m / (1 - beta1^t) * sqrt(1 - beta2^t) / (sqrt(v) + eps), with
    r = sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)); elsewhere
    p = p - lr * m / (1 - beta1^t). As in torch, the limit is 5, where the paper has 4, and eps is added to
    sqrt(v) before the bias correction; the paper has no eps.

    The state is ``exp_avg``, which is m, and ``exp_avg_sq``, which is v, both of the parameter's shape.

    Args:
        params, weight_decay, maximize: as for :class:`fastopt.Optimizer`.
        lr: the learning rate, 1e-3 by default.
        betas: the shares of m and of v that remain after each step, each in [0, 1), (0.9, 0.999) by default.
        eps: keeps the quotient finite where v is 0, 1e-8 by default.
        decoupled_weight_decay: decouple weight decay as :class:`AdamW` does, False by default.
    """

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params, shared, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay, maximize=maximize,
        )  # fmt: skip

    def rule(self, options: Options) -> Rule:
        return rules.RADAM
