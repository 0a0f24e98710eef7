"""What dense updates with a zero gradient do to an element, many steps at once.

A row of a table without a gradient in the steps t0 + 1 .. t1 goes on moving under a dense optimizer:
momentum, the decay of the moments and weight decay act on it. When the row is next needed,
:func:`coefficients` looks up what these steps come to, once a row, and :func:`caught_up` applies it
to each element. A history (see cpu/backend/history.py) keeps what there is to look up, in float64: one array
``steps``, whose row i belongs to step base + i. There are four kinds, chosen by :func:`missed_kind`.

Still: p and each slot are multiplied by a number. The product of the keeps is the exponential
of a difference of sums of logarithms.

Linear: (p, b), b being the momentum buffer, is multiplied by a 2x2 matrix a step. Row i of ``steps``
holds the matrix of its step and the product of the lowbit(i) matrices that end there (Fenwick 1994,
"A New Data Structure for Cumulative Frequency Tables"), so a product of n takes some log(n)^2.

Adaptive: Adam and its kin. With k = s - t0, m and v those of step t0, step s moves p by

    -step_size_s beta1^k m / (beta2^(k/2) sqrt(v) / root_s + eps),    root_s = sqrt(1 - beta2^s)

RAdam, rectified, has no root_s, and AMSGrad, whose maximum stays, no beta2^(k/2) either.
NAdam's step_size_s is that of its moment.
With y_s = root_s / beta2^(k/2) and W_s = step_size_s beta1^k times the keeps after s, the moves add
up to -m sum W_s y_s / (sqrt(v) + eps y_s). Let Y be the first y_s, y_s = Y (1 + u_s), u_s >= 0,
t = sqrt(v) + eps Y and x = eps Y / t, in [0, 1]:

    move = -m Y / t * sum W_s (1 + u_s) / (1 + u_s x)

The sum is taken by Gauss quadrature for the weights W_s / (1 + u_s)^4, with N = 5 nodes, which fits
its value and derivatives at both ends: five terms for eps -> 0, five for sqrt(v) -> 0 (a two-point
Padé approximant; Jones, Thron & Waadeland 1980, "A strong Stieltjes moment problem"). It
is exact for up to five missed steps. Kept are the 2 N moments of u for the latest ``window`` t0:
terms further off than that are below 1e-12 of the first, so moments older than that change
by the keeps alone. The nodes are not needed: Chebyshev's algorithm (Gautschi 2004, "Orthogonal
Polynomials: Computation and Approximation", 2.1) gives the recurrence of the orthogonal polynomials, the
last of which is Q(x) = prod (1 + u_i x), and the moments of W_s (1 + u_s) then give the numerator P,
so that the move is -m Y P(x) / (t Q(x)). Up to rounding, their coefficients are positive.

The error, of the movement, against the plain sum, for sqrt(v_hat) / eps from 1e-3 to 1e6, up to 1000
missed steps, a constant learning rate and warm-up with cosine decay, with weight decay and without; the
worst is where eps and sqrt(v) are of a size, and fades with the bias corrections:

    betas             t0 = 0     1         10 or more    1000 or more
    (0.9, 0.999)      3e-6       7e-7      4e-9          1e-12
    (0.9, 0.99)       8e-6       3e-6      4e-8          1e-12
    (0.95, 0.999)     1e-5       3e-6      5e-8          2e-12
    (0.5, 0.9)        4e-7       9e-8      1e-9          2e-10
    (0.99, 0.9999)    2e-4       5e-5      2e-6          1e-13
    (0.9, 0.95)       4e-3       2e-3      5e-4          6e-5

AMSGrad's is no larger, NAdam's up to 1.4 times this; RAdam's is at most 1e-9, 3e-4 with (0.9, 0.95). float32
adds its rounding, 2e-7.
The error grows with beta1 and with (1 - beta2) / (1 - beta1), up to 1/2, above which the kind is Loop:
with (0.999, 0.9995) it is 2e-2 for t0 = 1 and 1e-4 for t0 = 3000.

RAdam's steps that are not rectified move p by -step_size_s beta1^k m, whose sum is ``linear``.

Loop: all else; a kernel goes through the missed steps, whose folded hyperparameters are kept.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from numba.np.numpy_support import as_dtype

from fastopt.kernels.linked import overload, register_jitable
from fastopt.kernels.rule import L2, RULES, Adaptive, Linear, Loop, Rule, Still
from fastopt.kernels.source import define

NEGLIGIBLE = 1e-12  # of the first term of a sum, and of a moment
LARGEST_WINDOW = 65_536
LARGEST_LOG_GROWTH = math.log(1e4)  # of y over a window; beyond it the quadrature is too far off


def missed_kind(rule: Rule, decay_type: type, options: Mapping[str, Any]) -> type:
    """How ``rule`` makes up for missed steps, ``decay_type`` being Scaled, L2 or Decoupled."""
    kind = rule.missed_l2 if decay_type is L2 else rule.missed
    if kind is Adaptive:
        window = window_of(rule, options)
        if window > LARGEST_WINDOW or window * math.log(growth_of(rule, options)) > LARGEST_LOG_GROWTH:
            return Loop
    return kind


def growth_of(rule: Rule, options: Mapping[str, Any]) -> float:
    """How much y grows from a step to the next, bias corrections apart."""
    beta1, beta2 = options["betas"]
    if beta1 == 0 or "max_exp_avg_sq" in rule.state_slots:
        return 1.0
    return 1.0 / math.sqrt(beta2) if beta2 else math.inf


def window_of(rule: Rule, options: Mapping[str, Any]) -> int:
    """How many missed steps an adaptive rule's sum goes over."""
    ratio = options["betas"][0] * growth_of(rule, options)
    if ratio == 0:
        return 1
    if ratio >= 1:
        return LARGEST_WINDOW + 1
    return math.ceil(math.log(NEGLIGIBLE) / math.log(ratio))


# Columns of ``steps``

LOG_KEEP, DECAY = 0, 1  # Still: sum of the logarithms of the keeps, decay^i
OWN, PRODUCT, POWER = 0, 4, 8  # Linear: the step's matrix by rows, the product ending there, decay^i
# Adaptive, also LOG_KEEP: beta1^i, beta2^i; from this step on, the linear sum, Y, and the moments
DECAY1, DECAY2, LINEAR, FIRST, MOMENTS = 1, 2, 3, 4, 5
POINTS = 5
COLUMNS: dict[type, int] = {Still: 2, Linear: 9, Adaptive: MOMENTS + 2 * POINTS}


# Looking up


class StillCoefficients(NamedTuple):
    keep: float
    decay: float


class LinearCoefficients(NamedTuple):
    pp: float
    pb: float
    bp: float
    bb: float
    decay: float


class AdaptiveCoefficients(NamedTuple):
    """p0 .. p4, with Y in them, and q1 .. q5 are the coefficients of P and Q; first is Y."""

    keep: float
    decay1: float
    decay2: float
    linear: float
    first: float
    p0: float
    p1: float
    p2: float
    p3: float
    p4: float
    q1: float
    q2: float
    q3: float
    q4: float
    q5: float


@register_jitable
def _still(steps, window, base, t0, t1):
    return math.exp(steps[t1 - base, LOG_KEEP] - steps[t0 - base, LOG_KEEP]), steps[t1 - t0, DECAY]


@register_jitable
def times_matrix(a, steps, i, column):
    """The 2x2 matrix ``a`` times the one at ``column`` of row ``i``."""
    b0, b1, b2, b3 = steps[i, column], steps[i, column + 1], steps[i, column + 2], steps[i, column + 3]
    return a[0] * b0 + a[1] * b2, a[0] * b1 + a[1] * b3, a[2] * b0 + a[3] * b2, a[2] * b1 + a[3] * b3


@register_jitable
def _linear(steps, window, base, t0, t1):
    product = 1.0, 0.0, 0.0, 1.0
    i, end = t1 - base, t0 - base
    while i > end:
        size = i & -i
        if i - size >= end:
            product = times_matrix(product, steps, i, PRODUCT)
            i -= size
        else:
            product = times_matrix(product, steps, i, OWN)
            i -= 1
    return product[0], product[1], product[2], product[3], steps[t1 - t0, POWER]


def _quotient_source() -> list[str]:
    """Lines that turn the moments m0, m1, .. of a row into p0 .. and q1 .., for any number of points."""
    n = POINTS
    lines = [f"m{j} = steps[row, MOMENTS + {j}]" for j in range(2 * n)]
    # Chebyshev's algorithm: s{k}_{j} is the sum of the weights times u^j times the k-th polynomial
    lines += [f"s0_{j} = m{j}" for j in range(2 * n)]
    lines += ["real = m0 > 0.0", "a0 = m1 / m0 if real else 0.0"]
    for k in range(1, n):
        for j in range(k, 2 * n - k):
            older = f" - b{k - 1} * s{k - 2}_{j}" if k > 1 else ""
            lines.append(f"s{k}_{j} = s{k - 1}_{j + 1} - a{k - 1} * s{k - 1}_{j}{older}")
        # There are fewer points, those left over at 0, where that is all that the moments tell.
        lines += [
            f"real = real and s{k}_{k} > NEGLIGIBLE * m{2 * k}",
            f"a{k} = max(s{k}_{k + 1} / s{k}_{k} - s{k - 1}_{k} / s{k - 1}_{k - 1}, 0.0) if real else 0.0",
            f"b{k} = s{k}_{k} / s{k - 1}_{k - 1} if real else 0.0",
        ]
    # Q: c{k}_{j} is the coefficient of x^j in x^k times the k-th polynomial at -1 / x
    lines += ["c0_0 = 1.0", "c1_0 = 1.0", "c1_1 = a0"]
    for k in range(2, n + 1):
        for j in range(k + 1):
            terms = [f"c{k - 1}_{j}"] if j < k else []
            terms += [f"a{k - 1} * c{k - 1}_{j - 1}"] if j > 0 else []
            line = " + ".join(terms)
            line += f" - b{k - 1} * c{k - 2}_{j - 2}" if j > 1 else ""
            lines.append(f"c{k}_{j} = {line}")
    lines += [f"q{j} = c{n}_{j}" for j in range(n + 1)]
    # P: w{j} is the sum of W_s (1 + u_s) u_s^j
    for j in range(n):
        lines.append(f"w{j} = " + " + ".join(f"{math.comb(n, i)} * m{i + j}" for i in range(n + 1)))
    for j in range(n):
        terms = [f"{'-' if i % 2 else '+'} q{j - i} * w{i}" for i in range(j + 1)]
        lines.append(f"p{j} = scale * ({' '.join(terms)})")
    results = [f"p{j}" for j in range(n)] + [f"q{j}" for j in range(1, n + 1)]
    return [*lines, f"return {', '.join(results)}"]


_quotient = register_jitable(
    define("quotient", "steps, row, scale", *_quotient_source(), MOMENTS=MOMENTS, NEGLIGIBLE=NEGLIGIBLE)
)


@register_jitable
def _adaptive(steps, window, base, t0, t1):
    start, end = t0 - base, t1 - base
    keep = math.exp(steps[end, LOG_KEEP] - steps[start, LOG_KEEP])
    later = 1.0
    if end - start > window:
        later = math.exp(steps[end, LOG_KEEP] - steps[start + window, LOG_KEEP])
    first = steps[start, FIRST]
    k = t1 - t0
    head = keep, steps[k, DECAY1], steps[k, DECAY2], later * steps[start, LINEAR], first
    return head + _quotient(steps, start, later * first)


_LOOK_UP: dict[type, tuple[Callable, type]] = {
    Still: (_still, StillCoefficients),
    Linear: (_linear, LinearCoefficients),
    Adaptive: (_adaptive, AdaptiveCoefficients),
}


@functools.cache
def _coefficients(kind: type, cast: type) -> Callable:
    look_up, result = _LOOK_UP[kind]
    items = ", ".join(f"cast(found[{k}])" for k in range(len(result._fields)))  # type: ignore[attr-defined]
    return define(
        "coefficients",
        "kind, steps, window, base, t0, t1, like",
        "found = look_up(steps, window, base, t0, t1)",
        f"return result({items})",
        look_up=look_up,
        result=result,
        cast=cast,
    )


def coefficients(kind, steps, window, base, t0, t1, like):
    """What the steps t0 + 1 .. t1 come to, for a row that was last updated in step t0.

    kind: an instance of Still, Linear or Adaptive.
    steps, window, base: the history's.
    t0, t1: base <= t0 <= t1 <= the history's ``now``; Adaptive keeps the sums up to ``now``
        alone, so t1 is ``now``.
    like: a scalar of the type that the numbers are to have.
    """
    return _coefficients(type(kind), type(like))(kind, steps, window, base, t0, t1, like)


@overload(coefficients)
def _coefficients_overload(kind, steps, window, base, t0, t1, like):
    return _coefficients(kind.instance_class, as_dtype(like).type)


def coefficient_count(kind: type) -> int:
    """How many coefficients a kind has."""
    return len(_LOOK_UP[kind][1]._fields)  # type: ignore[attr-defined]


@functools.cache
def _tabulated(kind: type) -> Callable:
    result = _LOOK_UP[kind][1]
    items = ", ".join(f"row[{n}]" for n in range(coefficient_count(kind)))
    return define("tabulated", "kind, row", f"return result({items})", result=result)


def tabulated(kind, row):
    """The coefficients that a row of a table of them holds."""
    return _tabulated(type(kind))(kind, row)


@overload(tabulated)
def _tabulated_overload(kind, row):
    return _tabulated(kind.instance_class)


# Applying


@register_jitable
def move(k, h, m, second):
    """How far an adaptive rule moves an element."""
    first = k.first * h.eps
    t = math.sqrt(second) + first
    x = first / t
    above = k.p0 + x * (k.p1 + x * (k.p2 + x * (k.p3 + x * k.p4)))
    below = t + t * x * (k.q1 + x * (k.q2 + x * (k.q3 + x * (k.q4 + x * k.q5))))
    below = t if below != below else below  # t is infinite where v is, and t * x not a number
    return m * (k.linear + above / below)


@register_jitable
def decayed_slot(factor, slot):
    """``factor * slot``, infinite where the slot is, however many steps have made 0 of the factor."""
    new = factor * slot
    return slot if new != new else new


_FACTORS = {"exp_avg": "k.decay1", "exp_avg_sq": "k.decay2"}


def _new_slots(result: type, names: tuple[str, ...]) -> list[str]:
    """Expressions for the slots, but for a momentum buffer."""
    if result is AdaptiveCoefficients:
        return [
            f"decayed_slot({_FACTORS[name]}, slots[{n}])" if name in _FACTORS else f"slots[{n}]"
            for n, name in enumerate(names)
        ]
    return [f"decayed_slot(k.decay, slots[{n}])" for n, name in enumerate(names)]


_CALLED = {"move": move, "decayed_slot": decayed_slot}


@functools.cache
def _caught_up(result: type, hyper: type) -> Callable:
    rule = RULES[hyper]
    new = _new_slots(result, rule.state_slots)
    if result is StillCoefficients:
        p = "k.keep * p"
    elif result is LinearCoefficients:
        last = len(new) - 1
        p = f"k.pp * p + k.pb * slots[{last}]"
        new[last] = f"k.bp * p + k.bb * slots[{last}]"
    else:
        last = len(rule.state_slots) + len(rule.row_slots) - 1
        p = f"k.keep * p - move(k, h, slots[0], slots[{last}])"
    return define("caught_up", "k, h, p, *slots", f"return {', '.join([p, *new])},", **_CALLED)


def caught_up(k, h, p, *slots):
    """The new ``(p, *slots)`` of an element after the steps that ``k`` stands for.

    slots: those of the rule, present ones alone, then its row slots as they were before.
    """
    return _caught_up(type(k), type(h))(k, h, p, *slots)


@overload(caught_up)
def _caught_up_overload(k, h, p, *slots):
    return _caught_up(k.instance_class, h.instance_class)


@functools.cache
def _row_caught_up(result: type, hyper: type) -> Callable:
    new = _new_slots(result, RULES[hyper].row_slots)
    return define(
        "row_caught_up", "k, h, *slots", f"return ({''.join(f'{slot}, ' for slot in new)})", **_CALLED
    )


def row_caught_up(k, h, *slots):
    """The new row slots, to be set after :func:`caught_up` has seen the old ones."""
    return _row_caught_up(type(k), type(h))(k, h, *slots)


@overload(row_caught_up)
def _row_caught_up_overload(k, h, *slots):
    return _row_caught_up(k.instance_class, h.instance_class)
