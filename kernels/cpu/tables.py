"""How kernels see tables and their gradients: a row of int64 numbers each, so that one launch can
work on any number of tables.

The gradient of a table is the rows of ``values``: sorted position j (see index.py) adds row
``source[j - SOURCE_ORIGIN] - SOURCE_BASE`` of them to its group's sum, times
``weights[j - SOURCE_ORIGIN]`` if there are weights. With winners, [rows of values, dim], only those
elements count whose winner is the position itself: the gradient of a maximum.
"""

import numpy as np

from fastopt.kernels.cpu.memory import AHEAD, prefetch, view
from fastopt.kernels.cpu.sums import sum_rows
from fastopt.kernels.jit import helper, restricted_helper

(
    PARAM,  # address of [rows, dim]
    DIM,
    VALUES,  # address of [any number, dim]
    SOURCE,  # address of int32
    SOURCE_ORIGIN,
    SOURCE_BASE,
    WEIGHTS,  # address, or 0
    WINNERS,  # address of int32, or 0
    ORDER,  # address of int32: the position of each sorted position
    FIRST_POSITION,
    ROWS,  # address of int64: the row of each group, plus FIRST_ROW
    FIRST_ROW,
    STARTS,  # address of int32: where each group starts, and the last ends
    GROUPS,
    SKIPPED,  # a row that gets no gradient, or -1
    STATE_STRIDE,  # elements from row to row of the state arrays
    ROW_STEPS,  # address of int64: one number of steps a row, or 0
    STEP,  # of the update: 1 is the first
    HISTORY,  # address of float64 [any number, HISTORY_COLUMNS]
    HISTORY_COLUMNS,
    HISTORY_ROWS,
    HISTORY_BASE,
    HISTORY_WINDOW,
    TABULATED,  # address of [any number, TABULATED_COLUMNS]: coefficients of rest.py for the last steps
    TABULATED_COLUMNS,
    TABULATED_FROM,  # the step that the first of them are for
    MASTER,  # address of the parameter's master, or 0
    POSITION,  # that random bits are counted from
    KEY,  # of the random bits
    STATE,  # two addresses (see formats.py) each of the state arrays, and of those of one element a row
) = range(30)


@restricted_helper
def add_row(total, values):
    for d in range(total.size):
        total[d] += values[d]


@restricted_helper
def add_weighted_row(total, weight, values):
    for d in range(total.size):
        total[d] += weight * values[d]


@restricted_helper
def add_won_row(total, position, winners, values):
    for d in range(total.size):
        if winners[d] == position:
            total[d] += values[d]


@helper
def gradient_of(table, like, total, group):
    """Address of the gradient of a group: of its only row of values, or of ``total``, which has
    become the sum of several in the order of their positions."""
    starts = view(table[STARTS], table[GROUPS] + 1, np.int32(0))
    origin = table[SOURCE_ORIGIN]
    first, last = np.int64(starts[group]) - origin, np.int64(starts[group + 1]) - origin
    end = np.int64(starts[table[GROUPS]]) - origin
    source = view(table[SOURCE], end, np.int32(0))
    base, address = table[SOURCE_BASE], table[VALUES]
    stride = total.size * total.itemsize
    weights = view(table[WEIGHTS], end if table[WEIGHTS] else np.int64(0), like)
    if table[WINNERS]:
        sum_won_rows(table, like, total, first, last)
    elif last - first > 1 or weights.size:
        sum_rows(address, stride, source, base, weights, first, last, end, total)
    else:
        if first + AHEAD < end:
            prefetch(address + (source[first + AHEAD] - base) * stride, stride)
        return address + (source[first] - base) * stride
    return total.ctypes.data


@helper
def sum_won_rows(table, like, total, first, last):
    """The sum of those elements whose winners are the positions themselves."""
    dim, origin = total.size, table[SOURCE_ORIGIN]
    source = view(table[SOURCE], last, np.int32(0))
    order = view(table[ORDER], last + origin, np.int32(0))
    total[:] = 0
    for j in range(first, last):
        row = source[j] - table[SOURCE_BASE]
        values = view(table[VALUES] + row * dim * total.itemsize, dim, like)
        winners = view(table[WINNERS] + row * dim * 4, dim, np.int32(0))
        add_won_row(total, np.int32(order[j + origin] - table[FIRST_POSITION]), winners, values)


@helper
def row_of_group(table, group):
    """The row of the table that a group belongs to."""
    return view(table[ROWS], table[GROUPS], np.int64(0))[group] - table[FIRST_ROW]


@helper
def first_group(table, part, parts):
    """Where part ``part`` of ``parts`` equal shares of the work begins: a row costs about as much as
    two of its gradients."""
    groups = table[GROUPS]
    starts = view(table[STARTS], groups + 1, np.int32(0))
    begin = np.int64(starts[0])
    work = np.int64(starts[groups]) - begin + 2 * groups
    wanted = part * work // parts
    low, high = np.int64(0), groups
    while low < high:
        middle = (low + high) // 2
        if np.int64(starts[middle]) - begin + 2 * middle < wanted:
            low = middle + 1
        else:
            high = middle
    return low
