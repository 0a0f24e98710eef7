"""LAMB: Adam with a trust ratio for each layer."""

from typing import Any, Unpack

from fastopt._core.options import SharedOptions
from fastopt.kernels import rules
from fastopt.kernels.rule import Rule
from fastopt.optimizer import Optimizer
from fastopt.optimizers.options import LearningRate, Options


class LAMB(Optimizer):
    """LAMB (You et al. 2020, Algorithm 2): the direction of Adam, scaled for each layer to the norm of its
    parameters by a trust ratio.

    m and v are those of :class:`Adam`;
    u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * p; p = p - lr * |p| / |u| * u,
    where the trust ratio |p| / |u| is 1 if either norm is 0. A layer is an array or, with a sparse gradient,
    each row of it, as in FBGEMM. The paper's function phi is the identity. The defaults are those of NVIDIA's
    FusedLAMB, which also clips the norm of all gradients to 1: pass ``clip_norm=1.0`` to :meth:`step` for it.

    The state is ``exp_avg``, which is m, and ``exp_avg_sq``, which is v, both of the parameter's shape.

    Args:
        params, maximize: as for :class:`fastopt.Optimizer`.
        lr: the learning rate, 1e-3 by default.
        betas: the shares of m and of v that remain after each step, each in [0, 1), (0.9, 0.999) by default.
        eps: keeps the quotient finite where v is 0, 1e-6 by default.
        weight_decay: how much of p is part of the direction u, at least 0, 0.01 by default.
    """

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params, shared, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize
        )

    def rule(self, options: Options) -> Rule:
        return rules.LAMB
