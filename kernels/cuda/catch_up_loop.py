"""Steps that a row missed, taken one by one, as updates with a gradient of zero.

A lane keeps the elements of a few vectors, and goes through the steps with them. By rules that look at the
whole row in every step, for the mean square of its gradient or for its trust ratio, the row is decoded into
memory of the warp's own, and all of it takes a step before any takes the next.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba.extending import register_jitable

from fastopt.kernels.cuda.elements import Code, prototypes
from fastopt.kernels.cuda.memory import WARP, integer, load, load_each, meet, store, warp_sum
from fastopt.kernels.cuda.row_vectors import row_slots, row_vectors
from fastopt.kernels.element import (
    direction,
    regularise,
    rescaled,
    trust_ratio,
    unpack,
    unpack_decay,
    update_element,
)
from fastopt.kernels.layout import (
    TABLE_DIM,
    TABLE_HISTORY,
    TABLE_HISTORY_BASE,
    TABLE_HISTORY_COLUMNS,
    TABLE_KEY,
    TABLE_POSITION,
)
from fastopt.kernels.magnitude import unit_of
from fastopt.kernels.rule import RULES, Rule
from fastopt.kernels.source import define


def takes_whole_rows(rule: Rule) -> bool:
    """Whether a step of an element depends on the others of its row."""
    return rule.update_row is not None or rule.trust_ratio is not None


def loop_over_steps(code: Code) -> Callable:
    """The function that has a row take the steps after ``first`` up to ``last``, and returns what becomes of
    its state of one element a row."""
    return _of_rows(code) if takes_whole_rows(RULES[code.h]) else _of_elements(code)


def _numbers_of(code: Code) -> Callable:
    """The function that finds the hyperparameters of a step."""
    h, c, like = prototypes(code)
    own, decay, double = len(h), len(c) - 2, np.float64(0)

    @register_jitable
    def address_of(table, step):
        row = (step - integer(table, TABLE_HISTORY_BASE)) * integer(table, TABLE_HISTORY_COLUMNS)
        return integer(table, TABLE_HISTORY) + row * 8

    of_decay = f"load_each(place + {own * 8}, double, {decay})" if decay else "()"
    lines = [
        "place = address_of(table, step)",
        f"own_h = unpack(h, load_each(place, double, {own}), like)",
        f"return own_h, unpack_decay(c, {of_decay}, like)",
    ]
    names: dict[str, Any] = {"address_of": address_of, "load_each": load_each, "unpack": unpack}
    names |= {"unpack_decay": unpack_decay, "h": h, "c": c, "like": like, "double": double}
    return register_jitable(define("numbers_of", "table, step", *lines, **names))


def _step(function: str, h_and_c: str, numbers: str, slots: int, row_values: str = "") -> str:
    """The expression of what a function makes of the tuple ``numbers`` and a gradient of zero."""
    state = "".join(f", {numbers}[{n + 1}]" for n in range(slots))
    return f"{function}({h_and_c}, {numbers}[0], zero{state}{row_values})"


def _of_elements(code: Code) -> Callable:
    vectors, slots = row_vectors(code.formats, code.compute), len(RULES[code.h].state_slots)
    lines = [*vectors.loads(), "for step in range(first + 1, final + 1):"]
    lines.append("    own_h, own_c = numbers_of(table, step)")
    for j, e in vectors.elements_of_lane():
        lines.append(f"    x{j}_{e} = {_step('update_element', 'own_h, own_c', f'x{j}_{e}', slots)}")
    lines += vectors.stores_of_elements()
    names = {"numbers_of": _numbers_of(code), "update_element": update_element, "zero": code.compute.type(0)}
    take_run, run = vectors.function(["first", "final"], lines, **names), vectors.run

    def of_elements(h, table, row, first, last, aligned, lane, memory):
        dim, key = integer(table, TABLE_DIM), integer(table, TABLE_KEY)
        position = integer(table, TABLE_POSITION) + row * dim
        at = np.int64(0)
        while at < dim:
            take_run(table, row, aligned, at, dim, key, position, lane, first, last)
            at += run
        return ()

    return of_elements


# By rules that look at the whole row. In its memory, element d of array m is at m * dim + d


def _of_rows(code: Code) -> Callable:
    vectors, rule, like = row_vectors(code.formats, code.compute), RULES[code.h], code.compute.type(0)
    size, run, numbers_of = code.compute.itemsize, vectors.run, _numbers_of(code)
    arrays = len(vectors.own)
    places = [f"memory + ({n} * last + i{{0}} + {{1}}) * {size}" for n in range(arrays)]
    opening, closing = vectors.loads(), vectors.opening()
    for j, e in vectors.elements_of_lane():
        opening.append(f"if i{j} + {e} < last:")
        opening += [f"    store({p.format(j, e)}, x{j}_{e}[{n}])" for n, p in enumerate(places)]
        loads = (f"load({p.format(j, e)}, like)" for p in places)
        closing += [f"x{j}_{e} = zeros", f"if i{j} + {e} < last:", f"    x{j}_{e} = ({', '.join(loads)},)"]
    open_run = vectors.function(["memory"], opening)
    closing += vectors.stores_of_elements()
    close_run = vectors.function(["memory"], closing, like=like, zeros=(like,) * arrays)
    begin, rate, update = _begin_row(rule, like), _rate_row(rule, like), _update_row(rule, like)
    load_row, _ = row_slots(code)

    def of_rows(h, table, row, first, last, aligned, lane, memory):
        dim, key = integer(table, TABLE_DIM), integer(table, TABLE_KEY)
        position = integer(table, TABLE_POSITION) + row * dim
        row_values = load_row(table, row)
        at = np.int64(0)
        while at < dim:
            open_run(table, row, aligned, at, dim, key, position, lane, memory)
            at += run
        meet()  # what one lane has decoded is another's from here on
        for step in range(first + 1, last + 1):
            own_h, own_c = numbers_of(table, step)
            row_values = begin(own_h, own_c, memory, dim, lane, row_values)
            own_h = rate(own_h, own_c, memory, dim, lane, row_values)
            update(own_h, own_c, memory, dim, lane, row_values)
        meet()
        at = np.int64(0)
        while at < dim:
            close_run(table, row, aligned, at, dim, key, position, lane, memory)
            at += run
        return row_values

    return of_rows


def _begin_row(rule: Rule, like: Any) -> Callable:
    """The function that takes a step with the state of one element a row."""
    if rule.update_row is None:
        return register_jitable(lambda h, c, memory, dim, lane, row_values: row_values)
    update_state, cast, size = register_jitable(rule.update_row), type(like), like.itemsize

    @register_jitable
    def mean_square(c, memory, dim, lane):
        total = like
        d = lane
        while d < dim:
            g = regularise(c, load(memory + d * size, like), like)
            total += g * g
            d += WARP
        total = warp_sum(total)
        if total != np.inf:
            return total / cast(dim)
        mean = like  # which need not be infinite as the sum is
        d = lane
        while d < dim:
            g = regularise(c, load(memory + d * size, like), like)
            mean += g / cast(dim) * g
            d += WARP
        return warp_sum(mean)

    @register_jitable
    def begin_row(h, c, memory, dim, lane, row_values):
        return update_state(h, mean_square(c, memory, dim, lane), *row_values)

    return begin_row


def _rate_row(rule: Rule, like: Any) -> Callable:
    """The function that puts the row's trust ratio into the learning rate."""
    if rule.trust_ratio is None:
        return register_jitable(lambda h, c, memory, dim, lane, row_values: h)
    lines = [
        *_numbers_of_element(rule, like),
        f"return np.float64(numbers[0]), np.float64({_step_of('direction', rule)})",
    ]
    arguments = "h, c, memory, dim, d, row_values"
    find_direction = register_jitable(define("of_element", arguments, *lines, **_names(like)))
    one, cast = np.float64(1), type(like)

    @register_jitable
    def squares(h, c, memory, dim, lane, row_values, over_p, over_u):
        p_sq = u_sq = 0.0
        d = lane
        while d < dim:
            p, u = find_direction(h, c, memory, dim, d, row_values)
            p_sq += p * over_p * (p * over_p)
            u_sq += u * over_u * (u * over_u)
            d += WARP
        return warp_sum(p_sq), warp_sum(u_sq)

    @register_jitable
    def rate_row(h, c, memory, dim, lane, row_values):
        p_sq, u_sq = squares(h, c, memory, dim, lane, row_values, one, one)
        p_unit, u_unit = unit_of(p_sq), unit_of(u_sq)
        if p_unit != one or u_unit != one:
            p_sq, u_sq = squares(h, c, memory, dim, lane, row_values, one / p_unit, one / u_unit)
        return rescaled(h, cast(trust_ratio(h, p_sq, u_sq, p_unit, u_unit, dim)))

    return rate_row


def _update_row(rule: Rule, like: Any) -> Callable:
    """The function that has the elements take a step."""
    lines = ["d = lane", "while d < dim:"]
    lines += [f"    {line}" for line in _numbers_of_element(rule, like)]
    lines.append(f"    new = {_step_of('update_element', rule)}")
    for n in range(1 + len(rule.state_slots)):
        lines.append(f"    store(memory + ({n} * dim + d) * {like.itemsize}, new[{n}])")
    lines.append(f"    d += {WARP}")
    arguments = "h, c, memory, dim, lane, row_values"
    return register_jitable(define("update_row", arguments, *lines, "return None", **_names(like)))


def _numbers_of_element(rule: Rule, like: Any) -> list[str]:
    """Lines that set ``numbers`` to element ``d`` of each array."""
    arrays = 1 + len(rule.state_slots)
    loads = "".join(f"load(memory + ({n} * dim + d) * {like.itemsize}, like), " for n in range(arrays))
    return [f"numbers = ({loads})"]


def _step_of(function: str, rule: Rule) -> str:
    """The expression of what a function makes of ``numbers`` and a gradient of zero."""
    return _step(function, "h, c", "numbers", len(rule.state_slots), ", *row_values")


def _names(like: Any) -> dict[str, Any]:
    """What such lines see."""
    names = {"load": load, "store": store, "np": np, "like": like, "zero": like}
    return {**names, "update_element": update_element, "direction": direction}
