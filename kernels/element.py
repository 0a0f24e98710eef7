"""What every kernel does to one element and to one row: weight decay, then the rule.

Each function has two faces: the plain Python one runs in the CUDA simulator and without JIT,
the ``@overload`` is what compiled kernels on the CPU and the GPU get. Loops over the slots of a
state are unrolled into source text: a recursion over its tuple compiles several times slower.
"""

import math
from collections.abc import Callable

import numpy as np
from numba import types
from numba.np.numpy_support import as_dtype

from fastopt.kernels.linked import overload, register_jitable
from fastopt.kernels.magnitude import HUGE, sum_of_squares
from fastopt.kernels.rule import L2, RULES, Decoupled, Rule
from fastopt.kernels.source import define

NORM_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm it divides by


def load(arrays, i):
    """Element, or row, ``i`` of each array of a tuple."""
    return tuple(array[i] for array in arrays)


@overload(load)
def _load(arrays, i):
    items = "".join(f"arrays[{k}][i], " for k in range(len(arrays)))
    return define("load", "arrays, i", f"return ({items})")


def store(arrays, i, values):
    """Set element ``i`` of each array of a tuple."""
    for array, value in zip(arrays, values, strict=True):
        array[i] = value


@overload(store)
def _store(arrays, i, values):
    lines = [f"arrays[{k}][i] = values[{k}]" for k in range(len(arrays))]
    return define("store", "arrays, i, values", *lines, "return None")


def unpack(prototype, numbers, like, factor=1.0):
    """A named tuple of the type of ``prototype`` from an array of its numbers, the first of them times
    ``factor``, cast to the type of ``like``, flags being 0 or 1."""
    numbers = [numbers[0] * factor, *numbers[1:]]
    cast = type(like)
    return type(prototype)(
        *(n != 0 if isinstance(p, bool) else cast(n) for p, n in zip(prototype, numbers, strict=False))
    )


@overload(unpack)
def _unpack(prototype, numbers, like, factor=1.0):
    items = ", ".join(
        f"numbers[{k}] != 0"
        if isinstance(kind, types.Boolean)
        else f"cast(numbers[{k}]{' * factor' if k == 0 else ''})"
        for k, kind in enumerate(prototype.types)
    )
    return define(
        "unpack",
        "prototype, numbers, like, factor=1.0",
        f"return cls({items})",
        cls=prototype.instance_class,
        cast=as_dtype(like).type,
    )


def unpack_decay(prototype, numbers, like):
    """A weight decay of the type of ``prototype`` for a gradient of zeros, from its numbers but for the
    scale and the limit."""
    cast = type(like)
    return type(prototype)(cast(1), cast(np.inf), *(cast(n) for n in numbers))


@overload(unpack_decay)
def _unpack_decay(prototype, numbers, like):
    items = "".join(f", cast(numbers[{k}])" for k in range(len(prototype.types) - 2))
    return define(
        "unpack_decay",
        "prototype, numbers, like",
        f"return cls(cast(1), cast(inf){items})",
        cls=prototype.instance_class,
        inf=np.inf,
        cast=as_dtype(like).type,
    )


def _adapter(rule: Rule, direction: bool = False) -> Callable:
    """``rule.update`` on present slots alone: ``None`` goes in, and is dropped, for the others.

    In the adapter's source, because a tuple of state in a kernel can't hold a ``None``. With
    ``direction`` it returns only the direction that a rule with a trust ratio takes.
    """
    arguments: list[str] = []
    results: list[str] = []
    present = 0
    for slot in rule.slots:
        arguments.append("None" if slot is None else f"state[{present}]")
        results.append(f"slot{len(results)}")
        present += slot is not None
    arguments += [f"state[{present + k}]" for k in range(len(rule.row_slots))]
    kept = [result for result, slot in zip(results, rule.slots, strict=True) if slot is not None]
    first = f"p - h.{rule.hyper._fields[0]} * new" if rule.trust_ratio else "new"  # type: ignore[attr-defined]
    return define(
        "adapter",
        "h, p, g, *state",
        f"{', '.join(['new', *results])}, = rule_update({', '.join(['h', 'p', 'g', *arguments])})",
        "return new" if direction else f"return {', '.join([first, *kept])},",
        rule_update=register_jitable(rule.update),
    )


def update(h, p, g, *state):
    """The rule that belongs to ``type(h)``: the new ``(p, *slots)``."""
    return _adapter(RULES[type(h)])(h, p, g, *state)


@overload(update)
def _update(h, p, g, *state):
    return _adapter(RULES[h.instance_class])


@register_jitable
def scaled(c, g):
    """The gradient, scaled and clipped; NaN stays NaN."""
    g = c.scale * g
    g = c.limit if g > c.limit else g
    return -c.limit if g < -c.limit else g


def regularise(c, p, g):
    """The gradient as the rule sees it."""
    return scaled(c, g) + c.weight_decay * p if isinstance(c, L2) else scaled(c, g)


@overload(regularise)
def _regularise(c, p, g):
    if c.instance_class is L2:
        return lambda c, p, g: scaled(c, g) + c.weight_decay * p
    return lambda c, p, g: scaled(c, g)


def decayed(c, p):
    """The parameter as the rule sees it."""
    return c.keep * p if isinstance(c, Decoupled) else p


@overload(decayed)
def _decayed(c, p):
    if c.instance_class is Decoupled:
        return lambda c, p: c.keep * p
    return lambda c, p: p


@register_jitable
def update_element(h, c, p, g, *state):
    """Scale and weight decay, then the rule."""
    return update(h, decayed(c, p), regularise(c, p, g), *state)


def direction(h, c, p, g, *state):
    """The direction in which :func:`update_element` goes, by a rule with a trust ratio."""
    return _adapter(RULES[type(h)], direction=True)(h, decayed(c, p), regularise(c, p, g), *state)


@overload(direction)
def _direction(h, c, p, g, *state):
    rule_direction = register_jitable(_adapter(RULES[h.instance_class], direction=True))
    return lambda h, c, p, g, *state: rule_direction(h, decayed(c, p), regularise(c, p, g), *state)


def trust_ratio(h, p_sq, u_sq, p_unit, u_unit, size):
    """The trust ratio of the rule that belongs to ``type(h)``."""
    return RULES[type(h)].trust_ratio(h, p_sq, u_sq, p_unit, u_unit, size)


@overload(trust_ratio)
def _trust_ratio(h, p_sq, u_sq, p_unit, u_unit, size):
    return RULES[h.instance_class].trust_ratio


def rescaled(numbers, factor):
    """The named tuple ``numbers`` with its first, a scale or a learning rate, times ``factor``."""
    return numbers._replace(**{numbers._fields[0]: numbers[0] * factor})


@overload(rescaled)
def _rescaled(numbers, factor):
    first, *others = (f"numbers.{name}" for name in numbers.fields)
    return define(
        "rescaled",
        "numbers, factor",
        f"return cls({', '.join([f'{first} * factor', *others])})",
        cls=numbers.instance_class,
    )


@register_jitable
def limited(c, g, limits, t):
    """``c`` with its scale such that the row's gradient ``g`` has at most the norm ``limits[t]``, where there
    are limits: ``limit / (norm + NORM_EPS)`` as ``torch.nn.utils.clip_grad_norm_``, NaN for a NaN norm."""
    if limits is None:
        return c
    return c if limits[t] == np.inf else within_norm(c, g, limits[t])


@register_jitable
def within_norm(c, g, limit):
    """``c`` with its scale such that the norm of ``g`` is at most the finite ``limit``."""
    total = sum_of_squares(c.scale, g, 1.0)
    factor = limit / (math.sqrt(total) + NORM_EPS)
    if factor > 1.0:
        return c
    if total == np.inf:
        # NORM_EPS is nothing beside such a norm, as is a norm too small for squares beside NORM_EPS.
        factor = limit / HUGE / math.sqrt(sum_of_squares(c.scale, g, HUGE))
    return rescaled(c, g.dtype.type(factor))


def begin_row(h, mean_sq, row_state):
    """Update a row's own state, arrays of one element, with the mean square of the row's gradient as the rule
    sees it, and return it for the row's elements; h: of a rule that has such state."""
    new = RULES[type(h)].update_row(h, mean_sq, *load(row_state, 0))
    store(row_state, 0, new)
    return new


@overload(begin_row)
def _begin_row(h, mean_sq, row_state):
    update_state = register_jitable(RULES[h.instance_class].update_row)

    def implementation(h, mean_sq, row_state):
        new = update_state(h, mean_sq, *load(row_state, 0))
        store(row_state, 0, new)
        return new

    return implementation


def part_of(arrays, first, last):
    """The elements from ``first`` on, up to ``last``, of each 1-D array of a tuple."""
    return tuple(array[first:last] for array in arrays)


@overload(part_of)
def _part_of(arrays, first, last):
    items = "".join(f"arrays[{k}][first:last], " for k in range(len(arrays)))
    return define("part_of", "arrays, first, last", f"return ({items})")


@register_jitable
def update_elements(h, c, p, g, state, row_values):
    """Update each element of the row ``p`` and of its state; row_values: what :func:`begin_row` returned."""
    for d in range(g.size):
        new = update_element(h, c, p[d], g[d], *load(state, d), *row_values)
        p[d] = new[0]
        store(state, d, new[1:])
