"""RMSProp, also centered and with momentum."""

from typing import Any, Unpack

from fastopt._core.options import SharedOptions
from fastopt.kernels import rules
from fastopt.kernels.rule import Rule
from fastopt.optimizer import Optimizer
from fastopt.optimizers.options import LearningRate, Options


class RMSProp(Optimizer):
    """RMSProp (Hinton 2012, lecture 6e), also centered (Graves 2013, equations 38 to 45).

    v = alpha * v + (1 - alpha) * g^2; u = g / (sqrt(v) + eps); p = p - lr * u. If centered, v - m^2 takes the
    place of v under the root, with m = alpha * m + (1 - alpha) * g. With momentum b = momentum * b + u and
    p = p - lr * b. As in torch, eps is outside the root, where Graves has it inside.

    The state is ``square_avg``, which is v; ``grad_avg``, which is m, if centered; and ``momentum_buffer``,
    which is b, if momentum is not 0. All are of the parameter's shape.

    Args:
        params, weight_decay, maximize: as for :class:`fastopt.Optimizer`.
        lr: the learning rate, 1e-2 by default.
        alpha: the share of v that remains after each step, in [0, 1], 0.99 by default.
        eps: keeps the quotient finite where v is 0, 1e-8 by default.
        momentum: the share of b that remains after each step, at least 0; the default 0 means no momentum.
        centered: divide by the gradient's standard deviation, False by default. It needs a ``state_dtype``
            of None or "float32", because the rounding of the others can make the variance negative.
    """

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params, shared, lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum,
            centered=centered, maximize=maximize,
        )  # fmt: skip

    def rule(self, options: Options) -> Rule:
        if options["centered"]:
            if options["state_dtype"] in ("bfloat16", "8bit"):
                raise ValueError(
                    f"centered is True with state_dtype {options['state_dtype']!r}, whose rounding can make "
                    "the variance v - mean^2 negative: expected state_dtype None or 'float32'"
                )
            return rules.CENTERED_RMSPROP_MOMENTUM if options["momentum"] else rules.CENTERED_RMSPROP
        return rules.RMSPROP_MOMENTUM if options["momentum"] else rules.RMSPROP
