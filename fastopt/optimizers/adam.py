"""Adam, and the optimizers that differ from it in weight decay or in the second moment."""

from typing import Any, Unpack

from fastopt._core.options import SharedOptions
from fastopt.kernels import rules
from fastopt.kernels.rule import Rule
from fastopt.optimizer import Optimizer
from fastopt.optimizers.options import LearningRate, Options


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015, Algorithm 1).

    m = beta1 * m + (1 - beta1) * g; v = beta2 * v + (1 - beta2) * g^2;
    p = p - lr * m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps).

    The state is ``exp_avg``, which is m, and ``exp_avg_sq``, which is v; with ``amsgrad`` also
    ``max_exp_avg_sq``. All are of the parameter's shape.

    Args:
        params, weight_decay, maximize: as for :class:`fastopt.Optimizer`.
        lr: the learning rate, 1e-3 by default.
        betas: the shares of m and of v that remain after each step, each in [0, 1), (0.9, 0.999) by default.
        eps: keeps the quotient finite where v is 0, 1e-8 by default.
        amsgrad: divide by the root of the largest v so far, as :class:`AMSGrad` does; False by default.
    """

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params, shared, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad,
            maximize=maximize,
        )  # fmt: skip

    def rule(self, options: Options) -> Rule:
        return rules.AMSGRAD if options["amsgrad"] else rules.ADAM


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, Algorithm 2).

    First p = p - lr * weight_decay * p, then the update of :class:`Adam`, whose state is the same. As in
    torch, lr is a factor of the decay, where the paper has its schedule's multiplier alone.

    Args:
        params, maximize: as for :class:`fastopt.Optimizer`.
        lr, betas, eps, amsgrad: as for :class:`Adam`, with the same defaults.
        weight_decay: how much of itself p loses in each step, relative to lr, 1e-2 by default.
    """

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, **shared)

    def decoupled(self, options: Options) -> bool:
        return True


class AMSGrad(Optimizer):
    """Adam with the largest second moment so far (Reddi, Kale & Kumar 2018, Algorithm 2).

    m and v are those of :class:`Adam`; w = max(w, v);
    p = p - lr * m / (1 - beta1^t) / (sqrt(w / (1 - beta2^t)) + eps). It is torch's ``Adam(amsgrad=True)``:
    the bias corrections and eps are not in the paper, and the maximum is that of the uncorrected moment.

    The state is ``exp_avg``, which is m, ``exp_avg_sq``, which is v, and ``max_exp_avg_sq``, which is w. All
    are of the parameter's shape.

    Args:
        params, weight_decay, maximize: as for :class:`fastopt.Optimizer`.
        lr, betas, eps: as for :class:`Adam`, with the same defaults.
    """

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params, shared, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize
        )

    def rule(self, options: Options) -> Rule:
        return rules.AMSGRAD


class SparseAdam(Optimizer):
    """Adam as ``torch.optim.SparseAdam`` has it, operation by operation.

    m = m + (1 - beta1) * (g - m); v = v + (1 - beta2) * (g^2 - v);
    p = p - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps).
    Where :class:`Adam` adds eps to the root after its bias correction this adds it before: in the first steps
    eps weighs up to 1 / sqrt(1 - beta2) times as much, which shows where gradients are as small as that.
    Rows without a gradient stay as they are, in both.

    The state is ``exp_avg``, which is m, and ``exp_avg_sq``, which is v, both of the parameter's shape.

    Args:
        params, weight_decay, maximize: as for :class:`fastopt.Optimizer`.
        lr, betas, eps: as for :class:`Adam`, with the same defaults.
    """

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params, shared, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize
        )

    def rule(self, options: Options) -> Rule:
        return rules.SPARSE_ADAM


class RowwiseAdam(Optimizer):
    """Adam with one second moment for each row (FBGEMM's PARTIAL_ROWWISE_ADAM).

    The update is that of :class:`Adam` with v = beta2 * v + (1 - beta2) * mean(g^2 over the row). A row is an
    index of the parameter's first axis.

    The state is ``exp_avg``, which is m, of the parameter's shape, and ``exp_avg_sq``, which is v, of shape
    (rows,).

    Args:
        params, weight_decay, maximize: as for :class:`fastopt.Optimizer`.
        lr, betas, eps: as for :class:`Adam`, with the same defaults.
        decoupled_weight_decay: decouple weight decay as :class:`AdamW` and FBGEMM do, False by default.
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
        return rules.ROWWISE_ADAM
