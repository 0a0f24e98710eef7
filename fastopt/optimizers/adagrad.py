"""AdaGrad, with an accumulator for each element or for each row."""

from typing import Any, Unpack

from fastopt._core.options import SharedOptions
from fastopt.kernels import rules
from fastopt.kernels.rule import Rule
from fastopt.optimizer import Optimizer
from fastopt.optimizers.options import LearningRate, Options


class AdaGrad(Optimizer):
    """AdaGrad (Duchi, Hazan & Singer 2011, Figure 1, the diagonal case).

    s = s + g^2; p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps). The paper has no
    ``lr_decay``; torch has.

    The state is ``sum``, which is s, of the parameter's shape.

    Args:
        params, weight_decay, maximize: as for :class:`fastopt.Optimizer`.
        lr: the learning rate, 1e-2 by default.
        lr_decay: how fast the learning rate falls with the parameter's steps, at least 0, 0 by default.
        initial_accumulator_value: the first value of ``sum``, at least 0, 0 by default.
        eps: keeps the quotient finite where s is 0, 1e-10 by default.
    """

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params, shared, lr=lr, lr_decay=lr_decay, weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value, eps=eps, maximize=maximize,
        )  # fmt: skip

    def rule(self, options: Options) -> Rule:
        return rules.ADAGRAD

    def initial_state(self, options: Options) -> dict[str, float]:
        return {"sum": options["initial_accumulator_value"]}


class RowwiseAdaGrad(Optimizer):
    """AdaGrad with one accumulator for each row (FBGEMM's EXACT_ROWWISE_ADAGRAD).

    s = s + mean(g^2 over the row); p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps). A row is an
    index of the parameter's first axis.

    The state is ``sum``, which is s, of shape (rows,).

    Args:
        params, weight_decay, maximize: as for :class:`fastopt.Optimizer`.
        lr, lr_decay, initial_accumulator_value, eps: as for :class:`AdaGrad`, with the same defaults.
        decoupled_weight_decay: decouple weight decay as :class:`AdamW` does, which is
            FBGEMM's WeightDecayMode.DECOUPLE; the default False means FBGEMM's L2.
    """

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params, shared, lr=lr, lr_decay=lr_decay, weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value, eps=eps,
            decoupled_weight_decay=decoupled_weight_decay, maximize=maximize,
        )  # fmt: skip

    def rule(self, options: Options) -> Rule:
        return rules.ROWWISE_ADAGRAD

    def initial_state(self, options: Options) -> dict[str, float]:
        return {"sum": options["initial_accumulator_value"]}
