"""Kernels for the steps that rows have missed (see fastopt.kernels.catch_up): keeping each step, tabulating
what the latest come to, and having rows take theirs."""

import math

import numpy as np

from fastopt.kernels.catch_up import (
    DECAY1,
    DECAY2,
    FIRST,
    LINEAR,
    LOG_KEEP,
    MOMENTS,
    OWN,
    POINTS,
    POWER,
    PRODUCT,
    caught_up,
    coefficients,
    row_caught_up,
    tabulated,
    times_matrix,
)
from fastopt.kernels.cpu.for_each import for_each
from fastopt.kernels.cpu.jit import Kernel, helper, restricted_helper
from fastopt.kernels.cpu.row_means import NOT_FOUND
from fastopt.kernels.cpu.stored_rows import close_row, open_row, prefetch_row, update_apart
from fastopt.kernels.element import load, store, unpack, unpack_decay
from fastopt.kernels.intrinsics import AHEAD, view, view_2d
from fastopt.kernels.layout import (
    TABLE_HISTORY,
    TABLE_HISTORY_BASE,
    TABLE_HISTORY_COLUMNS,
    TABLE_HISTORY_ROWS,
    TABLE_HISTORY_WINDOW,
    TABLE_ROW_STEPS,
    TABLE_STEP,
    TABLE_TABULATED,
    TABLE_TABULATED_COLUMNS,
    TABLE_TABULATED_FROM,
)
from fastopt.kernels.linked import overload, register_jitable
from fastopt.kernels.rule import Loop

# Keeping a step


@Kernel
def add_linear(team, steps, i, keep, penalty, lr, momentum, undampened, nesterov, decay):
    """Set row ``i`` for b = momentum b + undampened g and p = keep p - lr b, or with Nesterov
    p = keep p - lr (g + momentum b), where g = penalty p."""
    own = steps[i, OWN : OWN + 4]
    own[2], own[3] = undampened * penalty, momentum
    if nesterov:
        own[0], own[1] = keep - lr * (penalty + momentum * own[2]), -lr * momentum * own[3]
    else:
        own[0], own[1] = keep - lr * own[2], -lr * own[3]
    product = own[0], own[1], own[2], own[3]
    end = i - (i & -i)
    j = i - 1
    while j > end:
        product = times_matrix(product, steps, j, PRODUCT)
        j -= j & -j
    for n in range(4):
        steps[i, PRODUCT + n] = product[n]
    steps[i, POWER] = steps[i - 1, POWER] * decay


@Kernel
def add_adaptive(team, steps, i, window, root, growth, step_size, keep, rectified, beta1, beta2):
    """Set row ``i`` and add its step to the sums of the ``window`` rows before it."""
    steps[i, LOG_KEEP] = steps[i - 1, LOG_KEEP] + (0.0 if keep == 1.0 else math.log(keep))
    steps[i, DECAY1] = steps[i - 1, DECAY1] * beta1
    steps[i, DECAY2] = steps[i - 1, DECAY2] * beta2
    steps[i, FIRST] = 1.0
    steps[i - 1, FIRST] = root * growth
    weight, y = step_size, root
    for row in range(i - 1, max(i - window, 0) - 1, -1):
        weight *= beta1
        y *= growth
        steps[row, LINEAR] *= keep
        if keep != 1.0:
            for n in range(2 * POINTS):
                steps[row, MOMENTS + n] *= keep
        if rectified:
            scaled = y / steps[row, FIRST]
            square = scaled * scaled
            term = weight / (square * square)
            for n in range(2 * POINTS):
                steps[row, MOMENTS + n] += term
                term *= scaled - 1.0
        else:
            steps[row, LINEAR] += weight


@register_jitable
def _store_numbers(k, row):
    for n in range(len(k)):
        row[n] = k[n]


@Kernel
def tabulate(team, kind, steps, window, base, first, now, table):
    """``table[i]``: the numbers of ``coefficients(kind, steps, window, base, first + i, now)``."""
    for_each(team, tabulate_row, table.shape[0], (kind, steps, window, base, first, now, table))


@helper
def tabulate_row(i, kind, steps, window, base, first, now, table):
    k = coefficients(kind, steps, window, base, first + i, now, table.dtype.type(0))
    _store_numbers(k, table[i])


# Taking the steps


@restricted_helper
def catch_up_apart(k, h, p, state, row_state):
    """Apply ``k``, what the steps come to in which the row had no gradient."""
    row_values = load(row_state, 0)
    for d in range(p.size):
        new = caught_up(k, h, p[d], *load(state, d), *row_values)
        p[d] = new[0]
        store(state, d, new[1:])
    store(row_state, 0, row_caught_up(k, h, *row_values))


@register_jitable
def take_missed_steps(mode, h, c, like, table, row, p, state, row_state, now):
    """Do to a row what dense updates with a zero gradient would have done until step ``now``."""
    last = view(table[TABLE_ROW_STEPS] + row * 8, 1, np.int64(0))
    if last[0] < now:
        rows, columns = table[TABLE_HISTORY_ROWS], table[TABLE_HISTORY_COLUMNS]
        history = view_2d(table[TABLE_HISTORY], rows, columns, np.float64(0))
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
    i = first - table[TABLE_TABULATED_FROM]
    if i >= 0:
        columns = table[TABLE_TABULATED_COLUMNS]
        k = tabulated(mode, view(table[TABLE_TABULATED] + i * columns * p.itemsize, columns, like))
    else:
        window, base = table[TABLE_HISTORY_WINDOW], table[TABLE_HISTORY_BASE]
        k = coefficients(mode, history, window, base, first, last, like)
    catch_up_apart(k, h, p, state, row_state)


@register_jitable
def _loop_steps(mode, h, c, like, table, history, first, last, p, state, row_state):
    base = table[TABLE_HISTORY_BASE]
    zeros = np.zeros_like(p)
    for step in range(first + 1, last + 1):
        numbers = history[step - base]
        own_h = unpack(h, numbers, like)
        own_c = unpack_decay(c, numbers[len(h) :], like)
        update_apart(own_h, own_c, p, zeros, state, row_state, p.dtype.type(NOT_FOUND))


@Kernel
def catch_up(team, mode, h, c, like, kinds, table, rows, count, buffers):
    """Bring rows up to date with the step before ``table[TABLE_STEP]``: the ``count`` different ones of
    ``rows`` or, if that is empty, the first ``count``. buffers: [parts, memory], as update_tables gets."""
    for_each(team, catch_up_part, buffers.shape[0], (mode, h, c, like, kinds, table, rows, count, buffers))


@helper
def catch_up_part(part, mode, h, c, like, kinds, table, rows, count, all_buffers):
    parts = all_buffers.shape[0]
    buffers = all_buffers.ctypes.data + part * all_buffers.shape[1] * all_buffers.itemsize
    begin, end = part * count // parts, (part + 1) * count // parts
    for k in range(begin, end):
        if k + AHEAD < end:
            prefetch_row(h, kinds, table, like, rows[k + AHEAD] if rows.size else k + AHEAD)
        row = rows[k] if rows.size else k
        if view(table[TABLE_ROW_STEPS] + row * 8, 1, np.int64(0))[0] >= table[TABLE_STEP] - 1:
            continue
        p, state, row_state = open_row(h, kinds, table, like, row, buffers)
        take_missed_steps(mode, h, c, like, table, row, p, state, row_state, table[TABLE_STEP] - 1)
        close_row(h, kinds, table, like, row, p, state)
