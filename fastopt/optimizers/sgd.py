"""Stochastic gradient descent, with and without momentum."""

from typing import Any, Unpack

from fastopt._core.options import SharedOptions
from fastopt.kernels import rules
from fastopt.kernels.rule import Rule
from fastopt.optimizer import Optimizer
from fastopt.optimizers.options import LearningRate, Options


class SGD(Optimizer):
    """Stochastic gradient descent (Robbins & Monro 1951), also with momentum (Sutskever et al. 2013,
    equations 1 to 4).

    Without momentum p = p - lr * g. With momentum b = momentum * b + (1 - dampening) * g and p = p - lr * b,
    or with Nesterov's momentum p = p - lr * (g + momentum * b). In the parameter's first step b is g itself.
    As in torch, and unlike in the paper, lr is a factor of b and no part of it.

    The state is ``momentum_buffer``, of the parameter's shape. Without momentum there is none.

    Args:
        params, weight_decay, maximize: as for :class:`fastopt.Optimizer`.
        lr: the learning rate, 1e-3 by default.
        momentum: the share of b that remains after each step, at least 0; the default 0 means no momentum.
        dampening: the share of the gradient that does not enter b, 0 by default.
        nesterov: use Nesterov's momentum, which needs momentum above 0 and dampening 0; False by default.
    """

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params, shared, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay,
            nesterov=nesterov, maximize=maximize,
        )  # fmt: skip

    def rule(self, options: Options) -> Rule:
        if options["nesterov"] and (options["momentum"] == 0 or options["dampening"] != 0):
            raise ValueError(
                f"nesterov is True with momentum {options['momentum']!r} and dampening "
                f"{options['dampening']!r}: expected momentum above 0 and dampening 0"
            )
        return rules.MOMENTUM if options["momentum"] else rules.SGD
