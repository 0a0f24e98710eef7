"""The optimizers. Arguments, defaults and results are those of torch.optim 2.13 where it has them;
the formulas are in ``fastopt.kernels.rules``. Options that all have, for tables with sparse gradients
too, are those of :class:`fastopt.Optimizer`."""

from collections.abc import Callable, Mapping
from typing import Any, Unpack

from fastopt.hyperparameters import SharedOptions
from fastopt.kernels import rules
from fastopt.kernels.rule import Rule
from fastopt.optimizer import Optimizer

LearningRate = float | Callable[[int], float]
Options = Mapping[str, Any]


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum (Sutskever et al. 2013).

    b = momentum * b + (1 - dampening) * g; p = p - lr * b, or with Nesterov's momentum
    p = p - lr * (g + momentum * b). In the parameter's first step b is g itself.
    State: ``momentum_buffer`` if ``momentum`` is not 0.

    Args:
        params, weight_decay, maximize: as for :class:`fastopt.Optimizer`.
        lr: default 1e-3.
        momentum: at least 0, default 0.
        dampening: default 0.
        nesterov: needs momentum above 0 and dampening 0.
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
            params,
            shared,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
        )

    def rule(self, options: Options) -> Rule:
        if options["nesterov"] and (options["momentum"] == 0 or options["dampening"] != 0):
            raise ValueError(
                f"nesterov is True with momentum {options['momentum']!r} and dampening "
                f"{options['dampening']!r}: expected momentum above 0 and dampening 0"
            )
        return rules.MOMENTUM if options["momentum"] else rules.SGD


class AdaGrad(Optimizer):
    """AdaGrad (Duchi, Hazan & Singer 2011, Figure 1, diagonal case).

    s = s + g^2; p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps). State: ``sum``.

    Args:
        params, weight_decay, maximize: as for :class:`fastopt.Optimizer`.
        lr: default 1e-2.
        lr_decay: at least 0, default 0; t counts the parameter's own steps.
        initial_accumulator_value: first value of ``sum``, at least 0, default 0.
        eps: default 1e-10.
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
            params,
            shared,
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            maximize=maximize,
        )

    def rule(self, options: Options) -> Rule:
        return rules.ADAGRAD

    def initial_state(self, options: Options) -> dict[str, float]:
        return {"sum": options["initial_accumulator_value"]}


class RowwiseAdaGrad(Optimizer):
    """AdaGrad with one accumulator a row, s = s + mean(g^2 over the row): FBGEMM's
    EXACT_ROWWISE_ADAGRAD. A row is an index of the first axis. State: ``sum``, of shape (rows,).

    Args:
        params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize: as for
            :class:`AdaGrad`.
        decoupled_weight_decay: decouple weight decay as :class:`AdamW` does (FBGEMM's
            WeightDecayMode.DECOUPLE; else its L2).
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
            params,
            shared,
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
        )

    def rule(self, options: Options) -> Rule:
        return rules.ROWWISE_ADAGRAD

    def decoupled(self, options: Options) -> bool:
        return options["decoupled_weight_decay"]

    def initial_state(self, options: Options) -> dict[str, float]:
        return {"sum": options["initial_accumulator_value"]}


class RMSProp(Optimizer):
    """RMSProp (Hinton 2012, lecture 6e; centered: Graves 2013, equations 38 to 45).

    v = alpha * v + (1 - alpha) * g^2; p = p - lr * g / (sqrt(v) + eps). State: ``square_avg``;
    ``grad_avg`` if centered; ``momentum_buffer`` if momentum is not 0.

    Args:
        params, weight_decay, maximize: as for :class:`fastopt.Optimizer`.
        lr: default 1e-2.
        alpha: in [0, 1], default 0.99.
        eps: default 1e-8, outside the root.
        momentum: at least 0, default 0; of the quotient: b = momentum * b + g / (sqrt(v) + eps).
        centered: divide by the standard deviation of the gradient, sqrt(v - mean^2).
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
            params,
            shared,
            lr=lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
            maximize=maximize,
        )

    def rule(self, options: Options) -> Rule:
        if options["centered"]:
            if options["state_dtype"] in ("bfloat16", "8bit"):
                raise ValueError(
                    f"centered is True with state_dtype {options['state_dtype']!r}, whose rounding can make "
                    "the variance v - mean^2 negative: expected state_dtype None or 'float32'"
                )
            return rules.CENTERED_RMSPROP_MOMENTUM if options["momentum"] else rules.CENTERED_RMSPROP
        return rules.RMSPROP_MOMENTUM if options["momentum"] else rules.RMSPROP


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015, Algorithm 1).

    m = beta1 * m + (1 - beta1) * g; v = beta2 * v + (1 - beta2) * g^2;
    p = p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps), t being the parameter's own
    step. State: ``exp_avg``, ``exp_avg_sq``; ``max_exp_avg_sq`` with amsgrad.

    Args:
        params, weight_decay, maximize: as for :class:`fastopt.Optimizer`.
        lr: default 1e-3.
        betas: each in [0, 1), default (0.9, 0.999).
        eps: default 1e-8.
        amsgrad: take the largest v so far (see :class:`AMSGrad`).
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
            params,
            shared,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
        )

    def rule(self, options: Options) -> Rule:
        return rules.AMSGRAD if options["amsgrad"] else rules.ADAM


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, Algorithm 2): first
    p = p - lr * weight_decay * p, then Adam's update.

    The arguments are those of :class:`Adam`; weight_decay is decoupled and 1e-2 by default.
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


class AMSGrad(Adam):
    """Adam with the largest second moment so far (Reddi, Kale & Kumar 2018, Algorithm 2).

    As torch's ``Adam(amsgrad=True)``: with bias corrections and eps, which the paper does not
    have, the maximum being taken of the uncorrected moment.

    The arguments are those of :class:`Adam` without ``amsgrad``.
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
        Optimizer.__init__(
            self,
            params,
            shared,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
        )

    def rule(self, options: Options) -> Rule:
        return rules.AMSGRAD


class RowwiseAdam(Optimizer):
    """Adam with one second moment a row, v = beta2 * v + (1 - beta2) * mean(g^2 over the row): FBGEMM's
    PARTIAL_ROWWISE_ADAM. A row is an index of the first axis.

    State: ``exp_avg``, and ``exp_avg_sq``, of shape (rows,).

    Args:
        params, lr, betas, eps, weight_decay, maximize: as for :class:`Adam`.
        decoupled_weight_decay: decouple weight decay as :class:`AdamW` does, and FBGEMM.
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
            params,
            shared,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
        )

    def rule(self, options: Options) -> Rule:
        return rules.ROWWISE_ADAM

    def decoupled(self, options: Options) -> bool:
        return options["decoupled_weight_decay"]


class RAdam(Optimizer):
    """RAdam (Liu et al. 2020, Algorithm 2): Adam whose adaptive rate is rectified by its variance,
    and left out in the first steps.

    State: ``exp_avg``, ``exp_avg_sq``.

    Args:
        params, weight_decay, maximize: as for :class:`fastopt.Optimizer`.
        lr: default 1e-3.
        betas: each in [0, 1), default (0.9, 0.999).
        eps: default 1e-8, added to sqrt(v) before the correction, as in torch.
        decoupled_weight_decay: decouple weight decay as :class:`AdamW` does.
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
            params,
            shared,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
        )

    def rule(self, options: Options) -> Rule:
        return rules.RADAM

    def decoupled(self, options: Options) -> bool:
        return options["decoupled_weight_decay"]


class NAdam(Optimizer):
    """Adam with Nesterov momentum (Dozat 2016, Algorithm 2): the gradient itself, and the first moment
    with the next step's momentum, move p.

    mu_t = beta1 * (1 - 0.96^(t * momentum_decay) / 2); M_t = mu_1 * ... * mu_t; m, v as in :class:`Adam`;
    p = p - lr * ((1 - mu_t) / (1 - M_t) * g + mu_{t+1} / (1 - M_{t+1}) * m)
    / (sqrt(v / (1 - beta2^t)) + eps). State: ``exp_avg``, ``exp_avg_sq``.

    Args:
        params, weight_decay, maximize: as for :class:`fastopt.Optimizer`.
        lr: default 2e-3.
        betas: each in [0, 1), default (0.9, 0.999). M_t is that of these betas from the first step on.
        eps: default 1e-8.
        momentum_decay: how fast mu goes from beta1 / 2 to beta1, at least 0, default 4e-3.
        decoupled_weight_decay: decouple weight decay as :class:`AdamW` does.
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
            params,
            shared,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            momentum_decay=momentum_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
        )

    def rule(self, options: Options) -> Rule:
        return rules.NADAM

    def decoupled(self, options: Options) -> bool:
        return options["decoupled_weight_decay"]


class Lion(Optimizer):
    """Lion (Chen et al. 2023, Algorithm 2): every element moves by lr, in the direction of a momentum;
    its weight decay is decoupled.

    p = p - lr * sign(beta1 * m + (1 - beta1) * g); m = beta2 * m + (1 - beta2) * g. State: ``exp_avg``.

    Args:
        params, weight_decay, maximize: as for :class:`fastopt.Optimizer`.
        lr: default 1e-4; a third to a tenth of AdamW's, with three to ten times its weight decay.
        betas: each in [0, 1), default (0.9, 0.99).
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


class LAMB(Optimizer):
    """LAMB (You et al. 2020, Algorithm 2): Adam's direction, scaled for each layer to the norm of its
    parameters.

    m, v as in :class:`Adam`; u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * p;
    p = p - lr * |p| / |u| * u, with the ratio 1 where |p| or |u| is 0. A layer is an array or, with a sparse
    gradient, a row of it (as in FBGEMM). Defaults are those of NVIDIA's FusedLAMB, which clips the norm of
    all gradients to 1, too: pass ``clip_norm=1.0`` to :meth:`step` for that.

    State: ``exp_avg``, ``exp_avg_sq``.

    Args:
        params, maximize: as for :class:`fastopt.Optimizer`.
        lr: default 1e-3.
        betas: each in [0, 1), default (0.9, 0.999).
        eps: default 1e-6.
        weight_decay: at least 0, default 0.01; a part of the direction u.
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
            params,
            shared,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
        )

    def rule(self, options: Options) -> Rule:
        return rules.LAMB


class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern 2018, Algorithms 4 and 5) as in torch: for a matrix, moments of its rows and
    of its columns in place of those of its elements.

    With w = t^beta2_decay, t being the parameter's own step:

    matrices (the last two axes): R = R + w * (mean(g^2 over a row) - R), C the same over a column,
        v = R * C / max(mean(R), eps1); others: v = v + w * (g^2 - v)
    u = g / max(sqrt(v), eps1)
    p = p - lr * weight_decay * p - min(lr, 1 / sqrt(t)) * max(eps2, RMS(p)) / max(1, RMS(u) / d) * u

    with RMS the root of the mean square over the array, p being that before the step. Sparse gradients are
    refused, as by torch.

    State: ``row_var``, of shape (..., rows, 1), and ``col_var``, (..., 1, columns), never in fewer bits than
    float32; of an array of fewer than two dimensions ``variance``.

    Args:
        params, maximize: as for :class:`fastopt.Optimizer`.
        lr: default 1e-2; the largest step, relative to the parameters.
        beta2_decay: at most 0, default -0.8.
        eps: eps1 and eps2, default (None, 1e-3); None stands for the epsilon of what is
            computed with, float32 or float64.
        d: above 0, default 1.0: largest root mean square of u, beyond which it is scaled down.
        weight_decay: at least 0, default 0; decoupled.
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
            params,
            shared,
            lr=lr,
            beta2_decay=beta2_decay,
            eps=eps,
            d=d,
            weight_decay=weight_decay,
            maximize=maximize,
        )

    def rule(self, options: Options) -> Rule:
        return rules.ADAFACTOR

    def decoupled(self, options: Options) -> bool:
        return True
