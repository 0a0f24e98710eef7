"""Lion: steps of the same size in the direction of a momentum's sign."""

from typing import Any, Unpack

from fastopt._core.options import SharedOptions
from fastopt.kernels import rules
from fastopt.kernels.rule import Rule
from fastopt.optimizer import Optimizer
from fastopt.optimizers.options import LearningRate, Options


class Lion(Optimizer):
    """Lion (Chen et al. 2023, Algorithm 2): every element moves by lr, in the direction of a momentum.

    p = p - lr * weight_decay * p - lr * sign(beta1 * m + (1 - beta1) * g); m = beta2 * m + (1 - beta2) * g.

    The state is ``exp_avg``, which is m, of the parameter's shape.

    Args:
        params, maximize: as for :class:`fastopt.Optimizer`.
        lr: the learning rate, 1e-4 by default. The authors advise a third to a tenth of AdamW's.
        betas: the weight of m in the direction, and the share of m that remains after each step, each in
            [0, 1), (0.9, 0.99) by default.
        weight_decay: decoupled weight decay, at least 0, 0 by default. The authors advise three to ten times
            AdamW's.
    """

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> None:
        super().__init__(params, shared, lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize)

    def rule(self, options: Options) -> Rule:
        return rules.LION

    def decoupled(self, options: Options) -> bool:
        return True
