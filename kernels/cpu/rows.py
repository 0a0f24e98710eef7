"""Sparse updates and reads: the rows of tables that indices name."""

from typing import NamedTuple

import numpy as np
from numba import prange
from numba.extending import overload, register_jitable

from fastopt.kernels.cpu.memory import AHEAD, prefetch, view, view_2d
from fastopt.kernels.cpu.tables import (
    DIM,
    GROUPS,
    HISTORY,
    HISTORY_BASE,
    HISTORY_COLUMNS,
    HISTORY_ROWS,
    HISTORY_WINDOW,
    PARAM,
    ROW_STEPS,
    SKIPPED,
    STATE,
    STATE_STRIDE,
    STEP,
    TABULATED,
    TABULATED_COLUMNS,
    TABULATED_FROM,
    add_row,
    first_group,
    gradient_of,
    row_of_group,
)
from fastopt.kernels.elements import (
    define,
    limited,
    load,
    store,
    unpack,
    unpack_decay,
    unpack_times,
    update_row,
)
from fastopt.kernels.jit import Kernel, helper, restricted_helper
from fastopt.kernels.rest import Loop, coefficients, rest, rest_row, tabulated
from fastopt.kernels.rules import RULES

LOOKUPS_PER_CHUNK = 256
GROUPS_PER_CHUNK = 256


def state_rows(h, table, like, row):
    """Row ``row`` of the state arrays, and the elements of those of one a row: two tuples of 1-D arrays."""
    rule = RULES[type(h)]
    size = np.dtype(type(like)).itemsize
    slots = len(rule.state_slots)
    return (
        tuple(
            view(table[STATE + k] + row * table[STATE_STRIDE] * size, table[DIM], like) for k in range(slots)
        ),
        tuple(view(table[STATE + slots + k] + row * size, 1, like) for k in range(len(rule.row_slots))),
    )


@overload(state_rows)
def _state_rows(h, table, like, row):
    rule = RULES[h.instance_class]
    size = like.bitwidth // 8
    slots = len(rule.state_slots)
    wide = "".join(
        f"view(table[{STATE + k}] + row * table[{STATE_STRIDE}] * {size}, table[{DIM}], like), "
        for k in range(slots)
    )
    narrow = "".join(
        f"view(table[{STATE + slots + k}] + row * {size}, 1, like), " for k in range(len(rule.row_slots))
    )
    return define("state_rows", "h, table, like, row", f"return ({wide}), ({narrow})", view=view)


def prefetch_state(h, table, like, row):
    """Have row ``row`` of the state loaded."""


@overload(prefetch_state)
def _prefetch_state(h, table, like, row):
    rule = RULES[h.instance_class]
    size = like.bitwidth // 8
    slots = len(rule.state_slots)
    lines = [
        f"prefetch(table[{STATE + k}] + row * table[{STATE_STRIDE}] * {size}, table[{DIM}] * {size})"
        for k in range(slots)
    ]
    lines += [
        f"prefetch(table[{STATE + slots + k}] + row * {size}, {size})" for k in range(len(rule.row_slots))
    ]
    lines += [f"if table[{ROW_STEPS}]:", f"    prefetch(table[{ROW_STEPS}] + row * 8, 8)"]
    return define("prefetch_state", "h, table, like, row", *lines, "return None", prefetch=prefetch)


@restricted_helper
def update_apart(h, c, p, g, state, row_state):
    """``update_row``, for arrays that do not overlap."""
    update_row(h, c, p, g, state, row_state)


@restricted_helper
def rest_apart(k, h, p, state, row_state):
    """Apply ``k``, what the steps come to in which the row had no gradient."""
    row_values = load(row_state, 0)
    for d in range(p.size):
        new = rest(k, h, p[d], *load(state, d), *row_values)
        p[d] = new[0]
        store(state, d, new[1:])
    store(row_state, 0, rest_row(k, h, *row_values))


# What comes before the update of a row, by the type of an argument without contents: for the kinds of
# rest.py the steps that the row has missed, and else


class Lazy(NamedTuple):
    """nothing;"""


class PerRow(NamedTuple):
    """counting the row's own updates, by which its hyperparameters are chosen."""


@register_jitable
def _enter_lazy(mode, h, c, like, table, row, p, state, row_state):
    return h


@register_jitable
def _enter_per_row(mode, h, c, like, table, row, p, state, row_state):
    """``h`` has the learning rate in its first place, the history what the rule folds for the learning
    rate 1 at each count."""
    count = view(table[ROW_STEPS] + row * 8, 1, np.int64(0))
    count[0] += 1
    columns = table[HISTORY_COLUMNS]
    known = max(min(count[0], table[HISTORY_ROWS]), 1)  # a count from a damaged file must not lead astray
    numbers = view(table[HISTORY] + (known - 1) * columns * 8, columns, np.float64(0))
    return unpack_times(h, numbers, np.float64(h[0]), like)


@register_jitable
def _enter_dense(mode, h, c, like, table, row, p, state, row_state):
    take_missed_steps(mode, h, c, like, table, row, p, state, row_state, table[STEP] - 1)
    view(table[ROW_STEPS] + row * 8, 1, np.int64(0))[0] = table[STEP]
    return h


@register_jitable
def take_missed_steps(mode, h, c, like, table, row, p, state, row_state, now):
    """Do to a row what dense updates with a zero gradient would have done until step ``now``."""
    last = view(table[ROW_STEPS] + row * 8, 1, np.int64(0))
    if last[0] < now:
        rows, columns = table[HISTORY_ROWS], table[HISTORY_COLUMNS]
        history = view_2d(table[HISTORY], rows, columns, np.float64(0))
        take_steps(mode, h, c, like, table, history, last[0], now, p, state, row_state)
        last[0] = now


def take_steps(mode, h, c, like, table, history, first, last, p, state, row_state):
    """The steps after ``first`` up to ``last``, in one go or, for the kind Loop, one by one."""
    take = _loop_steps if isinstance(mode, Loop) else _all_steps
    take(mode, h, c, like, table, history, first, last, p, state, row_state)


@overload(take_steps)
def _take_steps(mode, h, c, like, table, history, first, last, p, state, row_state):
    return _loop_steps if mode.instance_class is Loop else _all_steps


@register_jitable
def _all_steps(mode, h, c, like, table, history, first, last, p, state, row_state):
    i = first - table[TABULATED_FROM]
    if i >= 0:
        columns = table[TABULATED_COLUMNS]
        k = tabulated(mode, view(table[TABULATED] + i * columns * p.itemsize, columns, like))
    else:
        k = coefficients(mode, history, table[HISTORY_WINDOW], table[HISTORY_BASE], first, last, like)
    rest_apart(k, h, p, state, row_state)


@register_jitable
def _loop_steps(mode, h, c, like, table, history, first, last, p, state, row_state):
    base = table[HISTORY_BASE]
    zeros = np.zeros_like(p)
    for step in range(first + 1, last + 1):
        numbers = history[step - base]
        own_h = unpack_times(h, numbers, np.float64(1), like)
        update_apart(own_h, unpack_decay(c, numbers[len(h) :], like), p, zeros, state, row_state)


_ENTER = {Lazy: _enter_lazy, PerRow: _enter_per_row}


def enter_row(mode, h, c, like, table, row, p, state, row_state):
    """Do what comes before the update of a row; returns the row's ``h``."""
    return _ENTER.get(type(mode), _enter_dense)(mode, h, c, like, table, row, p, state, row_state)


@overload(enter_row)
def _enter_row(mode, h, c, like, table, row, p, state, row_state):
    return _ENTER.get(mode.instance_class, _enter_dense)


@Kernel
def catch_up(mode, h, c, like, table, rows, count):
    """Bring rows up to date with the step before ``table[STEP]``: the ``count`` different ones of ``rows``
    or, if that is empty, the first ``count``."""
    for chunk in prange((count + GROUPS_PER_CHUNK - 1) // GROUPS_PER_CHUNK):
        begin = chunk * GROUPS_PER_CHUNK
        catch_up_chunk(mode, h, c, like, table, rows, begin, min(begin + GROUPS_PER_CHUNK, count))


@helper
def catch_up_chunk(mode, h, c, like, table, rows, begin, end):
    dim = table[DIM]
    stride = dim * view(table[PARAM], dim, like).itemsize
    for k in range(begin, end):
        if k + AHEAD < end:
            ahead = rows[k + AHEAD] if rows.size else k + AHEAD
            prefetch(table[PARAM] + ahead * stride, stride)
            prefetch_state(h, table, like, ahead)
        row = rows[k] if rows.size else k
        p = view(table[PARAM] + row * stride, dim, like)
        state, row_state = state_rows(h, table, like, row)
        take_missed_steps(mode, h, c, like, table, row, p, state, row_state, table[STEP] - 1)


@Kernel
def update_tables(mode, h, c, like, tables, hs, cs, limits, parts, totals):
    """Update the rows of tables that their groups name, each once, with the sum of its gradients.

    mode: what comes before a row's update. tables: see tables.py. h, c: the types of hs[t] and cs[t],
    the hyperparameters of table t. limits[t]: largest norm of a row's gradient. parts: [table, part,
    how many parts the table has]. totals: memory for the sum of a row in each part.

    Bytes moved: the rows of values once for each position, and each distinct row of the table and
    of the state read and written.
    """
    for k in prange(parts.shape[0]):
        t = parts[k, 0]
        total = view(totals.ctypes.data + k * totals.shape[1] * totals.itemsize, tables[t, DIM], like)
        update_part(mode, h, c, like, tables[t], hs[t], cs[t], limits[t], parts[k, 1], parts[k, 2], total)


@helper
def update_part(mode, h, c, like, table, h_numbers, c_numbers, limit, part, parts, total):
    """One part's share of :func:`update_tables`; apart, because what stands in a prange compiles slowly."""
    h = unpack(h, h_numbers, like)
    c = unpack(c, c_numbers, like)
    dim, groups = table[DIM], table[GROUPS]
    stride = dim * total.itemsize
    for group in range(first_group(table, part, parts), first_group(table, part + 1, parts)):
        if group + AHEAD < groups:
            ahead = row_of_group(table, group + AHEAD)
            prefetch(table[PARAM] + ahead * stride, stride)
            prefetch_state(h, table, like, ahead)
        row = row_of_group(table, group)
        if row == table[SKIPPED]:
            continue
        g = view(gradient_of(table, like, total, group), dim, like)
        p = view(table[PARAM] + row * stride, dim, like)
        state, row_state = state_rows(h, table, like, row)
        row_h = enter_row(mode, h, c, like, table, row, p, state, row_state)
        update_apart(row_h, limited(c, g, limit), p, g, state, row_state)


@helper
def gather_rows(table, indices, out, first, last):
    stride = table.shape[1] * table.itemsize
    start = table.ctypes.data
    for k in range(first, last):
        if k + AHEAD < indices.size:
            prefetch(start + np.int64(indices[k + AHEAD]) * stride, stride)
        copy_row(out[k], table[indices[k]])


@restricted_helper
def copy_row(out, row):
    for d in range(out.size):
        out[d] = row[d]


@Kernel
def gather(table, indices, out):
    """``out[k] = table[indices[k]]``, for a 2-D table and 1-D indices."""
    chunks = (indices.size + LOOKUPS_PER_CHUNK - 1) // LOOKUPS_PER_CHUNK
    for chunk in prange(chunks):
        first = chunk * LOOKUPS_PER_CHUNK
        gather_rows(table, indices, out, first, min(first + LOOKUPS_PER_CHUNK, indices.size))


@Kernel
def coalesce(values, order, starts, first_position):
    """Put each group's sum in the place of its first member and zeros in the places of the others."""
    groups = starts.size - 1
    chunks = (groups + GROUPS_PER_CHUNK - 1) // GROUPS_PER_CHUNK
    for chunk in prange(chunks):
        first = chunk * GROUPS_PER_CHUNK
        for k in range(first, min(first + GROUPS_PER_CHUNK, groups)):
            coalesce_group(values, order, starts[k], starts[k + 1], first_position)


@helper
def coalesce_group(values, order, first, last, first_position):
    total = values[np.int64(order[first]) - first_position]
    for j in range(first + 1, last):
        other = values[np.int64(order[j]) - first_position]
        add_row(total, other)
        other[:] = 0
