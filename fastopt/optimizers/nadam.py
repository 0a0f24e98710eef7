"""NAdam: Adam with Nesterov momentum."""

from typing import Any, Unpack

from fastopt._core.options import SharedOptions
from fastopt.kernels import rules
from fastopt.kernels.rule import Rule
from fastopt.optimizer import Optimizer
from fastopt.optimizers.options import LearningRate, Options


class NAdam(Optimizer):
    """NAdam (Dozat 2016, Algorithm 2): Adam with Nesterov momentum. The gradient itself moves p, beside the
    first moment with the momentum of the next step.

    m and v are those of :class:`Adam`; mu_t = beta1 * (1 - 0.96^(t * momentum_decay) / 2);
    M_t = mu_1 * ... * mu_t; p = p - lr * ((1 - mu_t) / (1 - M_t) * g + mu_{t+1} / (1 - M_{t+1}) * m)
    / (sqrt(v / (1 - beta2^t)) + eps). As in torch, m decays by beta1, where the paper has mu_t.

    The state is ``exp_avg``, which is m, and ``exp_avg_sq``, which is v, both of the parameter's shape. M_t
    is computed from the step, as if the betas had been what they are now from the first step on.

    Args:
        params, weight_decay, maximize: as for :class:`fastopt.Optimizer`.
        lr: the learning rate, 2e-3 by default.
        betas: the shares of m and of v that remain after each step, each in [0, 1), (0.9, 0.999) by default.
        eps: keeps the quotient finite where v is 0, 1e-8 by default.
        momentum_decay: how fast mu_t goes from beta1 / 2 to beta1, at least 0, 4e-3 by default.
        decoupled_weight_decay: decouple weight decay as :class:`AdamW` does, False by default.
    """

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params, shared, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            momentum_decay=momentum_decay, decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
        )  # fmt: skip

    def rule(self, options: Options) -> Rule:
        return rules.NADAM
