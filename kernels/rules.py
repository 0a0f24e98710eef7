"""Every update rule, once: a scalar function that reads like the paper's formula.

A rule takes ``(h, p, g, *slots)``: the folded hyperparameters of one launch, one element of the
parameter, of its gradient and of each state slot; it returns the new ``(p, *slots)``. Dense and
sparse kernels on the CPU and the GPU all call it, in float32 or float64.

- What depends on the step alone (bias corrections, products with the learning rate) is folded
  on the host in float64, by the ``fold`` of the rule's NamedTuple, and cast once.
- Rules hold no literals: numbers in the code are 64 bits wide and would promote float32 arithmetic.
  (What is computed once a layer is in float64, and may.)
- A slot that a variant does without is ``None``; its branch is dropped at compile time.

Gradient scale, sign and weight decay are the same for all rules and come before them: one of
:class:`Scaled`, :class:`L2` and :class:`Decoupled`, always named ``c``. They are three types,
and not one with zeros, so that a kernel holds a single loop: a test that does not change in a
loop makes the compiler write it twice, and compile twice as long.

In the formulas, g is the gradient, p the parameter, t the step (1 for the first), and all
operations are element-wise. Where torch.optim 2.13 differs from the paper, torch is followed
and the docstring says so.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numba.extending import register_jitable


class Scaled(NamedTuple):
    """No weight decay. scale: factor on the gradient: loss scale, clipping and, when negative,
    maximisation. limit: what an element of the scaled gradient is clipped to, either way."""

    scale: float
    limit: float


class L2(NamedTuple):
    """Weight decay as an L2 penalty: weight_decay * p is added to the scaled gradient."""

    scale: float
    limit: float
    weight_decay: float


class Decoupled(NamedTuple):
    """Weight decay apart from the gradient: p = keep * p, with keep = 1 - lr * weight_decay
    (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", Algorithm 2)."""

    scale: float
    limit: float
    keep: float


@register_jitable
def lerp(start, end, weight, complement):
    """``start + weight * (end - start)``, exact at both ends; complement is 1 - weight."""
    if weight < complement:
        return start + weight * (end - start)
    return end - complement * (end - start)


class SGDH(NamedTuple):
    lr: float


@register_jitable
def sgd(h, p, g):
    """Stochastic gradient descent (Robbins & Monro 1951): p = p - lr * g."""
    return (p - h.lr * g,)


class MomentumH(NamedTuple):
    lr: float
    momentum: float
    undampened: float
    nesterov: bool

    @classmethod
    def fold(cls, step, *, lr, momentum, dampening, nesterov, **_):
        # torch takes the first gradient undampened.
        return cls(lr, momentum, 1.0 if step == 1 else 1.0 - dampening, nesterov)


@register_jitable
def momentum(h, p, g, momentum_buffer):
    """SGD with momentum, Sutskever et al. 2013, "On the importance of initialization and
    momentum in deep learning", equations 1 to 4, in torch's form: lr outside the buffer.

    b = momentum * b + (1 - dampening) * g
    p = p - lr * b, with Nesterov p = p - lr * (g + momentum * b)
    """
    momentum_buffer = h.momentum * momentum_buffer + h.undampened * g
    if h.nesterov:
        g = g + h.momentum * momentum_buffer
    else:
        g = momentum_buffer
    return p - h.lr * g, momentum_buffer


class AdaGradH(NamedTuple):
    lr: float
    eps: float

    @classmethod
    def fold(cls, step, *, lr, lr_decay, eps, **_):
        return cls(lr / (1.0 + (step - 1) * lr_decay), eps)


@register_jitable
def adagrad(h, p, g, sum_sq):
    """AdaGrad, Duchi, Hazan & Singer 2011, "Adaptive Subgradient Methods", Figure 1, diagonal.

    s = s + g^2
    p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)
    """
    sum_sq = sum_sq + g * g
    return p - h.lr * g / (math.sqrt(sum_sq) + h.eps), sum_sq


class RowwiseAdaGradH(AdaGradH):
    __slots__ = ()


@register_jitable
def rowwise_adagrad(h, p, g, row_sum_sq):
    """AdaGrad with one accumulator a row: s = s + mean(g^2 over the row); FBGEMM's
    EXACT_ROWWISE_ADAGRAD (Khudia et al. 2021)."""
    return (p - h.lr * g / (math.sqrt(row_sum_sq) + h.eps),)


@register_jitable
def add_mean_square(h, mean_sq, row_sum_sq):
    """The row's part of :func:`rowwise_adagrad`."""
    return (row_sum_sq + mean_sq,)


class RMSPropH(NamedTuple):
    lr: float
    alpha: float
    one_minus_alpha: float
    eps: float
    momentum: float

    @classmethod
    def fold(cls, step, *, lr, alpha, eps, momentum, **_):
        return cls(lr, alpha, 1.0 - alpha, eps, momentum)


class RMSPropMomentumH(RMSPropH):
    __slots__ = ()


class CenteredRMSPropH(RMSPropH):
    __slots__ = ()


class CenteredRMSPropMomentumH(RMSPropH):
    __slots__ = ()


@register_jitable
def rmsprop(h, p, g, square_avg, grad_avg, momentum_buffer):
    """RMSProp, Hinton 2012, "Neural Networks for Machine Learning", lecture 6e, slide 29;
    centered as Graves 2013, "Generating Sequences With Recurrent Neural Networks", eq. 38 to 45,
    with eps outside the root.

    v = alpha * v + (1 - alpha) * g^2
    centered: m = alpha * m + (1 - alpha) * g, u = g / (sqrt(v - m^2) + eps); else u = g / (sqrt(v) + eps)
    momentum: b = momentum * b + u, p = p - lr * b; else p = p - lr * u
    """
    square_avg = h.alpha * square_avg + h.one_minus_alpha * g * g
    spread = square_avg
    if grad_avg is not None:
        grad_avg = lerp(grad_avg, g, h.one_minus_alpha, h.alpha)
        spread = square_avg - grad_avg * grad_avg
    direction = g / (math.sqrt(spread) + h.eps)
    if momentum_buffer is not None:
        momentum_buffer = h.momentum * momentum_buffer + direction
        direction = momentum_buffer
    return p - h.lr * direction, square_avg, grad_avg, momentum_buffer


class AdamH(NamedTuple):
    step_size: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    root_correction: float
    eps: float

    @classmethod
    def fold(cls, step, *, lr, betas, eps, **_):
        beta1, beta2 = betas
        correction1, correction2 = 1.0 - beta1**step, 1.0 - beta2**step
        return cls(
            lr / correction1, beta1, 1.0 - beta1, beta2, 1.0 - beta2, 1.0 / math.sqrt(correction2), eps
        )


class AMSGradH(AdamH):
    __slots__ = ()


@register_jitable
def adam(h, p, g, exp_avg, exp_avg_sq, max_exp_avg_sq):
    """Adam, Kingma & Ba 2015, "Adam: A Method for Stochastic Optimization", Algorithm 1; with
    decoupled decay AdamW, Loshchilov & Hutter 2019, Algorithm 2; with the maximum AMSGrad,
    Reddi, Kale & Kumar 2018, "On the Convergence of Adam and Beyond", Algorithm 2.

    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g^2
    AMSGrad: w = max(w, v), which takes the place of v below
    p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    The AMSGrad paper has no bias corrections and no eps; torch has both, the maximum being
    taken of the uncorrected v.
    """
    exp_avg = lerp(exp_avg, g, h.one_minus_beta1, h.beta1)
    exp_avg_sq = h.beta2 * exp_avg_sq + h.one_minus_beta2 * g * g
    second = exp_avg_sq
    if max_exp_avg_sq is not None:
        # this way round a NaN in exp_avg_sq is taken over
        max_exp_avg_sq = max_exp_avg_sq if max_exp_avg_sq > exp_avg_sq else exp_avg_sq
        second = max_exp_avg_sq
    p = p - h.step_size * exp_avg / (math.sqrt(second) * h.root_correction + h.eps)
    return p, exp_avg, exp_avg_sq, max_exp_avg_sq


class RowwiseAdamH(AdamH):
    __slots__ = ()


@register_jitable
def rowwise_adam(h, p, g, exp_avg, row_exp_avg_sq):
    """Adam with one second moment a row, v = beta2 * v + (1 - beta2) * mean(g^2 over the row);
    FBGEMM's PARTIAL_ROWWISE_ADAM."""
    exp_avg = lerp(exp_avg, g, h.one_minus_beta1, h.beta1)
    return p - h.step_size * exp_avg / (math.sqrt(row_exp_avg_sq) * h.root_correction + h.eps), exp_avg


@register_jitable
def average_mean_square(h, mean_sq, row_exp_avg_sq):
    """The row's part of :func:`rowwise_adam`."""
    return (h.beta2 * row_exp_avg_sq + h.one_minus_beta2 * mean_sq,)


class RAdamH(NamedTuple):
    step_size: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    eps: float
    rectified: bool

    @classmethod
    def fold(cls, step, *, lr, betas, eps, **_):
        beta1, beta2 = betas
        correction1, correction2 = 1.0 - beta1**step, 1.0 - beta2**step
        step_size = lr / correction1
        rho_inf = 2.0 / (1.0 - beta2) - 1.0
        rho = rho_inf - 2.0 * step * beta2**step / correction2
        if rho > 5.0:
            r = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho)
            step_size *= math.sqrt(r * correction2)
        return cls(step_size, beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps, rho > 5.0)


@register_jitable
def radam(h, p, g, exp_avg, exp_avg_sq):
    """RAdam, Liu et al. 2020, "On the Variance of the Adaptive Learning Rate and Beyond",
    Algorithm 2; rectified from rho_t > 5 on, as in torch (the paper: 4).

    m, v as in Adam; rho_inf = 2 / (1 - beta2) - 1; rho_t = rho_inf - 2 t beta2^t / (1 - beta2^t)
    rho_t > 5: p = p - lr * r_t * m / (1 - beta1^t) * sqrt(1 - beta2^t) / (sqrt(v) + eps)
    else:      p = p - lr * m / (1 - beta1^t)
    """
    exp_avg = lerp(exp_avg, g, h.one_minus_beta1, h.beta1)
    exp_avg_sq = h.beta2 * exp_avg_sq + h.one_minus_beta2 * g * g
    if h.rectified:
        p = p - h.step_size * exp_avg / (math.sqrt(exp_avg_sq) + h.eps)
    else:
        p = p - h.step_size * exp_avg
    return p, exp_avg, exp_avg_sq


class NAdamH(NamedTuple):
    """gradient_step: of the gradient, lr * (1 - mu_t) / (1 - product of mu_1 .. mu_t). momentum_ratio: of
    the first moment, to that."""

    gradient_step: float
    momentum_ratio: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    root_correction: float
    eps: float

    @property
    def step_size(self) -> float:
        """Of the first moment, which alone moves p where the gradient is 0."""
        return self.gradient_step * self.momentum_ratio

    @classmethod
    def fold(cls, step, *, lr, betas, momentum_decay, eps, **_):
        beta1, beta2 = betas
        mu, mu_next = (beta1 * (1.0 - 0.5 * 0.96 ** (t * momentum_decay)) for t in (step, step + 1))
        product = mu_product(step, beta1, momentum_decay)
        gradient_rate, momentum_rate = (1.0 - mu) / (1.0 - product), mu_next / (1.0 - product * mu_next)
        return cls(
            lr * gradient_rate,
            momentum_rate / gradient_rate,
            beta1,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            1.0 / math.sqrt(1.0 - beta2**step),
            eps,
        )


_ORDERS = np.arange(1.0, 54.0)  # k; 2^-53 is below rounding
_WEIGHTS = 1.0 / (_ORDERS * 2.0**_ORDERS)


def mu_product(step: int, beta1: float, momentum_decay: float) -> float:
    """mu_1 * ... * mu_step of NAdam, in a time that does not depend on the step.

    With x_i = 0.96^(i * momentum_decay) / 2, it is beta1^step times the exponential of
    sum_i log(1 - x_i) = -sum_k (sum_i x_i^k) / k, the inner sums being geometric series.
    """
    power = beta1**step
    if power < 1e-20:  # 1 - product is 1
        return 0.0
    rate = max(momentum_decay * math.log(0.96), -1e3)  # exp(-1e3) is 0
    if rate == 0.0:
        return power * 0.5**step
    rates = _ORDERS * rate
    powers = np.exp(rates) * np.expm1(step * rates) / np.expm1(rates)
    return power * math.exp(-float((_WEIGHTS * powers).sum()))


@register_jitable
def nadam(h, p, g, exp_avg, exp_avg_sq):
    """NAdam, Dozat 2016, "Incorporating Nesterov Momentum into Adam", Algorithm 2; m decays
    by beta1, as in torch (the paper: by mu_t).

    m, v as in Adam; mu_t = beta1 * (1 - 0.96^(t * momentum_decay) / 2); M_t = mu_1 * ... * mu_t
    p = p - lr * ((1 - mu_t) / (1 - M_t) * g + mu_{t+1} / (1 - M_{t+1}) * m)
                / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    """
    exp_avg = lerp(exp_avg, g, h.one_minus_beta1, h.beta1)
    exp_avg_sq = h.beta2 * exp_avg_sq + h.one_minus_beta2 * g * g
    ahead = g + h.momentum_ratio * exp_avg
    p = p - h.gradient_step * ahead / (math.sqrt(exp_avg_sq) * h.root_correction + h.eps)
    return p, exp_avg, exp_avg_sq


class LionH(NamedTuple):
    lr: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float

    @classmethod
    def fold(cls, step, *, lr, betas, **_):
        beta1, beta2 = betas
        return cls(lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2)


@register_jitable
def lion(h, p, g, exp_avg):
    """Lion, Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", Algorithm 2.

    p = p - lr * sign(beta1 * m + (1 - beta1) * g)
    m = beta2 * m + (1 - beta2) * g
    """
    direction = h.beta1 * exp_avg + h.one_minus_beta1 * g
    # x > -x is x > 0 without a literal; 0 and NaN stay what they are
    move = h.lr if direction > -direction else direction
    move = -h.lr if direction < -direction else move
    return p - move, h.beta2 * exp_avg + h.one_minus_beta2 * g


class LAMBH(NamedTuple):
    lr: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    correction: float
    root_correction: float
    eps: float
    weight_decay: float

    @classmethod
    def fold(cls, step, *, lr, betas, eps, weight_decay, **_):
        beta1, beta2 = betas
        correction, root_correction = 1.0 / (1.0 - beta1**step), 1.0 / math.sqrt(1.0 - beta2**step)
        return cls(lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2, correction, root_correction, eps, weight_decay)


@register_jitable
def lamb(h, p, g, exp_avg, exp_avg_sq):
    """LAMB, You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76
    minutes", Algorithm 2; the direction of a layer's step, whose length :func:`trust_ratio` gives.

    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g^2
    u = m / (1 - beta1^t) / (sqrt(v) / sqrt(1 - beta2^t) + eps) + weight_decay * p
    """
    exp_avg = lerp(exp_avg, g, h.one_minus_beta1, h.beta1)
    exp_avg_sq = h.beta2 * exp_avg_sq + h.one_minus_beta2 * g * g
    direction = exp_avg * h.correction / (math.sqrt(exp_avg_sq) * h.root_correction + h.eps)
    return direction + h.weight_decay * p, exp_avg, exp_avg_sq


@register_jitable
def trust_ratio(h, p_sq, u_sq, size):
    """The layer's part of :func:`lamb`: p = p - lr * |p| / |u| * u, with the ratio 1 where either is 0
    (the paper's phi being the identity)."""
    if p_sq > 0.0 and u_sq > 0.0:
        return math.sqrt(p_sq) / math.sqrt(u_sq)
    return 1.0


class AdafactorH(NamedTuple):
    lr: float
    decay: float
    one_minus_decay: float
    smallest_variance: float
    smallest_mean: float
    smallest_rms: float
    d: float

    @classmethod
    def fold(cls, step, *, lr, beta2_decay, eps, d, compute_dtype, **_):
        eps1, eps2 = eps
        eps1 = float(np.finfo(compute_dtype).eps) if eps1 is None else eps1
        one_minus_decay = float(step) ** beta2_decay
        lr = min(lr, 1.0 / math.sqrt(step))
        return cls(lr, 1.0 - one_minus_decay, one_minus_decay, eps1 * eps1, eps1, eps2, d)


@register_jitable
def adafactor_direction(h, g, variance):
    """Adafactor, Shazeer & Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
    Algorithms 4 and 5, as in torch: u = g / max(sqrt(v), eps1), where the paper adds eps1 to g^2.

    The length of the step is :func:`adafactor_factor`'s. The estimate v of a matrix's g^2 is
    R_i * C_j / max(mean(R), eps1), of means over rows and columns that decay as v in :func:`adafactor`.
    """
    # this way round a NaN stays one
    variance = h.smallest_variance if variance < h.smallest_variance else variance
    return g / math.sqrt(variance)


@register_jitable
def adafactor(h, p, g, variance):
    """Adafactor of a vector: v = beta2_t * v + (1 - beta2_t) * g^2, with beta2_t = 1 - t^beta2_decay."""
    variance = lerp(variance, g * g, h.one_minus_decay, h.decay)
    return adafactor_direction(h, g, variance), variance


@register_jitable
def adafactor_factor(h, p_sq, u_sq, size):
    """The layer's part of :func:`adafactor`, with RMS the root of the mean square:

    p = p - min(lr, 1 / sqrt(t)) * max(eps2, RMS(p)) / max(1, RMS(u) / d) * u
    """
    rms_p, rms_u = math.sqrt(p_sq / size), math.sqrt(u_sq / size)
    return max(h.smallest_rms, rms_p) / max(1.0, rms_u / h.d)


@dataclass(frozen=True)
class Rule:
    """A rule as kernels and optimizers see it.

    hyper: NamedTuple class; kernels find the rule by it. Its first field is a multiple of the
        learning rate. Its classmethod
        ``fold(step, *, lr, **options)`` makes the tuple of one step; without one, the options
        are taken by field name.
    update: the scalar function ``(h, p, g, *slots, *row_slots) -> (p, *slots)``.
    slots: names of the state arrays shaped as the parameter, ``None`` for an argument of
        ``update`` that this variant does without.
    update_row, row_slots: a rule with state of one element a row has the function
        ``(h, mean_sq, *row_slots) -> row_slots``, called once a row with the mean square of the
        row's gradient, before ``update`` sees the row's elements.
    layer: where the length of the step depends on the whole layer, which is an array or, with a
        sparse gradient, a row, ``update`` returns in place of p a direction u, and the function
        ``(h, sum of p^2, sum of u^2, size) -> factor``, in float64, makes it p = p - factor * h[0] * u.
    matrix_slots: names of the state, in place of all other, of an array of two or more dimensions, by a rule
        that has means over rows and over columns (see kernels/cpu/factored.py): of the former, of the latter.
    not_negative: those of ``slots`` whose elements never are negative, sums and means of squares: stored in
        8 bits, they need no sign.
    own_decay: whether weight decay is a part of the rule itself, which then gets it among its options.
    """

    hyper: type
    update: Callable[..., tuple]
    slots: tuple[str | None, ...] = ()
    update_row: Callable[..., tuple] | None = None
    row_slots: tuple[str, ...] = ()
    not_negative: tuple[str, ...] = ()
    layer: Callable[..., float] | None = None
    matrix_slots: tuple[str, ...] = ()
    own_decay: bool = False

    @property
    def state_slots(self) -> tuple[str, ...]:
        """The state arrays shaped as the parameter."""
        return tuple(slot for slot in self.slots if slot is not None)

    def fold(self, step: int, options: Mapping[str, Any], compute: Any = np.float64) -> Any:
        """The hyperparameter tuple of the ``step``-th update, in float64; a ``fold`` that names a keyword
        ``compute_dtype`` gets ``compute``, the dtype that updates are computed with."""
        names = self._folded
        if names is None:
            return self.hyper(**{name: options[name] for name in self.hyper._fields})  # type: ignore[attr-defined]
        if "compute_dtype" in names:
            options = {**options, "compute_dtype": compute}
        return self.hyper.fold(step, **{name: options[name] for name in names})  # type: ignore[attr-defined]

    @functools.cached_property
    def _folded(self) -> tuple[str, ...] | None:
        """The options that ``fold`` takes by name, None if there is no ``fold``."""
        if not hasattr(self.hyper, "fold"):
            return None
        parameters = inspect.signature(self.hyper.fold).parameters.values()
        return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


RULES: dict[type, Rule] = {}


def register(rule: Rule) -> Rule:
    """Make kernels find ``rule`` by the class of its hyperparameters."""
    RULES[rule.hyper] = rule
    return rule


SGD = register(Rule(SGDH, sgd))
MOMENTUM = register(Rule(MomentumH, momentum, ("momentum_buffer",)))
ADAGRAD = register(Rule(AdaGradH, adagrad, ("sum",), not_negative=("sum",)))
ROWWISE_ADAGRAD = register(
    Rule(RowwiseAdaGradH, rowwise_adagrad, update_row=add_mean_square, row_slots=("sum",))
)
RMSPROP = register(Rule(RMSPropH, rmsprop, ("square_avg", None, None), not_negative=("square_avg",)))
RMSPROP_MOMENTUM = register(
    Rule(RMSPropMomentumH, rmsprop, ("square_avg", None, "momentum_buffer"), not_negative=("square_avg",))
)
CENTERED_RMSPROP = register(
    Rule(CenteredRMSPropH, rmsprop, ("square_avg", "grad_avg", None), not_negative=("square_avg",))
)
CENTERED_RMSPROP_MOMENTUM = register(
    Rule(
        CenteredRMSPropMomentumH,
        rmsprop,
        ("square_avg", "grad_avg", "momentum_buffer"),
        not_negative=("square_avg",),
    )
)
ADAM = register(Rule(AdamH, adam, ("exp_avg", "exp_avg_sq", None), not_negative=("exp_avg_sq",)))
ROWWISE_ADAM = register(Rule(RowwiseAdamH, rowwise_adam, ("exp_avg",), average_mean_square, ("exp_avg_sq",)))
AMSGRAD = register(
    Rule(
        AMSGradH,
        adam,
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        not_negative=("exp_avg_sq", "max_exp_avg_sq"),
    )
)
RADAM = register(Rule(RAdamH, radam, ("exp_avg", "exp_avg_sq"), not_negative=("exp_avg_sq",)))
NADAM = register(Rule(NAdamH, nadam, ("exp_avg", "exp_avg_sq"), not_negative=("exp_avg_sq",)))
LION = register(Rule(LionH, lion, ("exp_avg",)))
LAMB = register(
    Rule(
        LAMBH,
        lamb,
        ("exp_avg", "exp_avg_sq"),
        not_negative=("exp_avg_sq",),
        layer=trust_ratio,
        own_decay=True,
    )
)
ADAFACTOR = register(
    Rule(
        AdafactorH,
        adafactor,
        ("variance",),
        not_negative=("variance",),
        layer=adafactor_factor,
        matrix_slots=("row_var", "col_var"),
    )
)
