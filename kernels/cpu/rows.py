"""Sparse updates and reads: the rows of tables that indices name."""

import numpy as np

from fastopt.kernels.cpu.catch_up import take_missed_steps
from fastopt.kernels.cpu.chunks import chunk_count, chunk_ends
from fastopt.kernels.cpu.for_each import for_each
from fastopt.kernels.cpu.jit import Kernel, helper, inlined_helper, optimised_helper, restricted_helper
from fastopt.kernels.cpu.row_means import find_means
from fastopt.kernels.cpu.segments import (
    add_row,
    fetch_values,
    fetching,
    first_segment,
    gradient_of,
    row_of_segment,
)
from fastopt.kernels.cpu.stored_rows import close_row, open_row, prefetch_row, update_apart
from fastopt.kernels.element import limited, unpack
from fastopt.kernels.intrinsics import AHEAD, on_stack, prefetch_rows, view, view_2d
from fastopt.kernels.layout import (
    TABLE_DIM,
    TABLE_HISTORY,
    TABLE_HISTORY_COLUMNS,
    TABLE_HISTORY_ROWS,
    TABLE_ROW_STEPS,
    TABLE_SEGMENTS,
    TABLE_SKIPPED,
    TABLE_STEP,
)
from fastopt.kernels.linked import overload, register_jitable
from fastopt.kernels.rule import Lazy, PerRow

LOOKUPS_PER_CHUNK = 256
SEGMENTS_PER_CHUNK = 256
BLOCK, BLOCK_BYTES = 32, 16_384  # at most so many rows (on_stack has room), of so many bytes, or one


# What comes before the update of a row is selected by the type of an argument without contents, the mode (see
# rule.py): for the kinds of missed steps a row takes those that it has missed.


@register_jitable
def _enter_lazy(mode, h, c, like, table, row, p, state, row_state):
    return h


@register_jitable
def _enter_per_row(mode, h, c, like, table, row, p, state, row_state):
    """``h`` has the learning rate in its first place; a row of the history has a count, which are ascending,
    and what the rule folds for the learning rate 1 at it."""
    count = view(table[TABLE_ROW_STEPS] + row * 8, 1, np.int64(0))
    count[0] += 1
    columns = table[TABLE_HISTORY_COLUMNS]
    counts = view_2d(table[TABLE_HISTORY], table[TABLE_HISTORY_ROWS], columns, np.float64(0))
    # The last of the counts that are not above it: a count from a damaged file must not lead astray. It is as
    # far from the first as their difference says, or nearer where counts between them are missing.
    wanted = np.float64(count[0])
    low, end = np.int64(0), max(min(count[0] - np.int64(counts[0, 0]) + 1, counts.shape[0]), 1)
    middle = end - 1
    while end - low > 1:
        if counts[middle, 0] <= wanted:
            low = middle
        else:
            end = middle
        middle = (low + end) // 2
    numbers = view(table[TABLE_HISTORY] + (low * columns + 1) * 8, columns - 1, np.float64(0))
    return unpack(h, numbers, like, np.float64(h[0]))


@register_jitable
def _enter_dense(mode, h, c, like, table, row, p, state, row_state):
    take_missed_steps(mode, h, c, like, table, row, p, state, row_state, table[TABLE_STEP] - 1)
    view(table[TABLE_ROW_STEPS] + row * 8, 1, np.int64(0))[0] = table[TABLE_STEP]
    return h


_ENTER = {Lazy: _enter_lazy, PerRow: _enter_per_row}


def enter_row(mode, h, c, like, table, row, p, state, row_state):
    """Do what comes before the update of a row; returns the row's ``h``."""
    return _ENTER.get(type(mode), _enter_dense)(mode, h, c, like, table, row, p, state, row_state)


@overload(enter_row)
def _enter_row(mode, h, c, like, table, row, p, state, row_state):
    return _ENTER.get(mode.instance_class, _enter_dense)


@Kernel
def update_tables(team, mode, won, h, c, like, kinds, tables, numbers, limits, parts, totals, buffers):
    """Update the rows of tables that their segments name, each once, with the sum of its gradients.

    mode: what comes before a row's update. won: see segments.py. kinds: formats of the parameter, of the
    gradient, which is as computed with, and of the state. tables: see layout.py. h, c: the types of the
    hyperparameters. numbers[t]: those of table t, float64, of h and then of c. limits[t]: largest norm of a
    row's gradient; None in place of the array where no table has one.
    parts: [table, part, how many parts the table has]. totals: [parts, memory for as many rows as block_of
    says]. buffers: [parts, memory for as many rows as stored_rows.decoded says].

    Bytes moved: the rows of values once for each position, and each distinct row of the table and
    of the state read and written.
    """
    arguments = mode, won, h, c, like, kinds, tables, numbers, limits, parts, totals, buffers
    for_each(team, update_part, parts.shape[0], arguments)


@optimised_helper
def update_part(
    k, mode, won, h, c, like, kinds, tables, all_numbers, limits, all_parts, all_totals, all_buffers
):
    """The share of part ``k`` in :func:`update_tables`.

    Gradients are found for a block of rows before these are updated, and fetching ahead is done with that: a
    core waits for some dozens of lines at a time, and what it reads in between, though it is in a cache,
    would have to wait its turn among them.
    """
    t, part, parts = all_parts[k, 0], all_parts[k, 1], all_parts[k, 2]
    numbers = all_numbers[t]
    # Without an owner, which each function that gets the row would count a reference to.
    table = view(tables.ctypes.data + t * tables.shape[1] * tables.itemsize, tables.shape[1], np.int64(0))
    totals = all_totals.ctypes.data + k * all_totals.shape[1] * all_totals.itemsize
    buffers = all_buffers.ctypes.data + k * all_buffers.shape[1] * all_buffers.itemsize
    c = unpack(c, numbers[len(h) :], like)
    h = unpack(h, numbers, like)
    dim = table[TABLE_DIM]
    block = block_of(dim * all_totals.itemsize)
    gradients, means = on_stack(np.int64(0)), on_stack(like)
    begin, end = first_segment(table, part, parts), first_segment(table, part + 1, parts)
    for first in range(begin, end, block):
        last = min(first + block, end)
        find_gradients(h, won, kinds, table, like, first, last, totals, dim * all_totals.itemsize, gradients)
        find_means(h, c, limits, t, gradients, last - first, dim, means)
        for segment in range(first, last):
            row = row_of_segment(table, segment)
            if row == table[TABLE_SKIPPED]:
                continue
            g = view(gradients[segment - first], dim, like)
            p, state, row_state = open_row(h, kinds, table, like, row, buffers)
            row_h = enter_row(mode, h, c, like, table, row, p, state, row_state)
            own_c = limited(c, g, limits, t)
            update_apart(row_h, own_c, p, g, state, row_state, means[segment - first])
            close_row(h, kinds, table, like, row, p, state)


@inlined_helper
def find_gradients(h, won, kinds, table, like, first, last, totals, stride, gradients):
    """Set ``gradients[k]`` to the address of the gradient of the segment ``first + k``, for those up to
    ``last``, or of any numbers where it is skipped; totals: memory for as many rows, ``stride`` bytes each.
    The rows that are later in the turn, and those of their gradients, are fetched."""
    dim, segments = table[TABLE_DIM], table[TABLE_SEGMENTS]
    fetched, each, final = fetching(table, first, last)
    for segment in range(first, last):
        fetch_values(table, fetched, min(fetched + each, final))
        fetched += each
        if segment + AHEAD < segments:
            prefetch_row(h, kinds, table, like, row_of_segment(table, segment + AHEAD))
        place = totals + (segment - first) * stride
        gradients[segment - first] = place
        if row_of_segment(table, segment) != table[TABLE_SKIPPED]:
            gradients[segment - first] = gradient_of(table, won, like, view(place, dim, like), segment)


@register_jitable
def block_of(size):
    """How many rows, of ``size`` bytes each, are a block; a row may have none."""
    return max(min(BLOCK, BLOCK_BYTES // max(size, 1)), 1)


@helper
def gather_rows(chunk, table, indices, out):
    first, last = chunk_ends(chunk, LOOKUPS_PER_CHUNK, indices.size)
    stride = table.shape[1] * table.itemsize
    block = block_of(stride)
    zero = np.int64(0)
    for k in range(first, last, block):
        until = min(k + block, last)
        prefetch_rows(table.ctypes.data, stride, indices, zero, until, min(until + block, indices.size))
        for j in range(k, until):
            copy_row(out[j], table[indices[j]])


@restricted_helper
def copy_row(out, row):
    for d in range(out.size):
        out[d] = row[d]


@Kernel
def gather(team, table, indices, out):
    """``out[k] = table[indices[k]]``, for a 2-D table and 1-D indices."""
    chunks = chunk_count(indices.size, LOOKUPS_PER_CHUNK)
    for_each(team, gather_rows, chunks, (table, indices, out))


@Kernel
def coalesce(team, values, order, starts, first_position):
    """Put each segment's sum in the place of its first member and zeros in the places of the others."""
    chunks = chunk_count(starts.size - 1, SEGMENTS_PER_CHUNK)
    for_each(team, coalesce_segments, chunks, (values, order, starts, first_position))


@helper
def coalesce_segments(chunk, values, order, starts, first_position):
    first, last = chunk_ends(chunk, SEGMENTS_PER_CHUNK, starts.size - 1)
    for k in range(first, last):
        coalesce_segment(values, order, starts[k], starts[k + 1], first_position)


@helper
def coalesce_segment(values, order, first, last, first_position):
    total = values[np.int64(order[first]) - first_position]
    for j in range(first + 1, last):
        other = values[np.int64(order[j]) - first_position]
        add_row(total, other)
        other[:] = 0
