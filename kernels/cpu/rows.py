"""Sparse updates and reads: the rows of tables that indices name."""

import functools
from typing import Any, NamedTuple

import numpy as np
from numba import prange
from numba.extending import overload, register_jitable
from numba.np.numpy_support import as_dtype

from fastopt.kernels.cpu.formats import (
    CODECS,
    CODED,
    MASTERED,
    PLAIN,
    Format,
    blocks_of,
    itemsize,
    reader,
    writer,
)
from fastopt.kernels.cpu.memory import AHEAD, prefetch, view, view_2d
from fastopt.kernels.cpu.tables import (
    DIM,
    GROUPS,
    HISTORY,
    HISTORY_BASE,
    HISTORY_COLUMNS,
    HISTORY_ROWS,
    HISTORY_WINDOW,
    KEY,
    MASTER,
    PARAM,
    POSITION,
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
from fastopt.kernels.rules import RULES, Rule

LOOKUPS_PER_CHUNK = 256
GROUPS_PER_CHUNK = 256


@functools.cache
def _row_functions(rule: Rule, members: tuple[Format, ...], like: np.dtype) -> dict[str, Any]:
    """Functions that open, close and prefetch a row of the parameter and of its state (see formats.py)."""
    size, slots = like.itemsize, len(rule.state_slots)
    names: dict[str, Any] = {"view": view, "prefetch": prefetch, "np": np, "blocks_of": blocks_of}
    opening: list[str] = []
    closing: list[str] = []
    fetching: list[str] = []
    opened: list[str] = []
    for k, kind in enumerate(members):
        if k == 1:  # the gradient is summed up elsewhere
            continue
        width = itemsize(kind, size)
        column = PARAM if k == 0 else STATE + 2 * (k - 2)
        stride = f"table[{DIM if k == 0 else STATE_STRIDE}] * {width}"
        address = f"table[{column}] + row * {stride}"
        fetching.append(f"prefetch({address}, table[{DIM}] * {width})")
        if kind in MASTERED:
            master = f"table[{MASTER}] + row * table[{DIM}] * {size}"
            fetching.append(f"prefetch({master}, table[{DIM}] * {size})")
            opening.append(f"a{k} = view({master}, table[{DIM}], like)")
        elif kind is PLAIN:
            opening.append(f"a{k} = view({address}, table[{DIM}], like)")
        else:
            opening.append(
                f"a{k} = view(buffers + {1 + len(closing)} * table[{DIM}] * {size}, table[{DIM}], like)"
            )
        opened.append(f"a{k}")
        if kind is PLAIN:
            continue
        names |= {
            f"zero{k}": CODECS[kind].stored(0),
            f"read{k}": reader(kind),
            f"write{k}": writer(kind, k - 2),
        }
        stored, scales = f"view({address}, table[{DIM}], zero{k})", "no_scales"
        if kind in CODED:
            start = f"table[{column + 1}] + row * blocks_of(table[{DIM}]) * 4"
            scales = f"view({start}, blocks_of(table[{DIM}]), np.float32(0))"
        if kind not in MASTERED:
            opening.append(f"read{k}({stored}, {scales}, a{k})")
        values = "p" if k == 0 else f"state[{k - 2}]"
        position = f"table[{POSITION}] + row * table[{DIM}]"
        closing.append(f"write{k}({values}, {stored}, {scales}, np.uint64(table[{KEY}]), {position})")
    narrow = [f"table[{STATE + 2 * (slots + k)}] + row * {size}" for k in range(len(rule.row_slots))]
    fetching += [f"prefetch({address}, {size})" for address in narrow]
    fetching += [f"if table[{ROW_STEPS}]:", f"    prefetch(table[{ROW_STEPS}] + row * 8, 8)"]
    state = "".join(f"{name}, " for name in opened[1:])
    row_state = "".join(f"view({address}, 1, like), " for address in narrow)
    no_scales = "no_scales = view(np.int64(0), np.int64(0), np.float32(0))"
    return {
        "open": define(
            "open_row", _OPEN, no_scales, *opening, f"return {opened[0]}, ({state}), ({row_state})", **names
        ),
        "close": define("close_row", _CLOSE, no_scales, *closing, "return None", **names),
        "fetch": define("prefetch_row", _FETCH, *fetching, "return None", **names),
    }


_OPEN = "h, kinds, table, like, row, buffers"
_CLOSE = "h, kinds, table, like, row, p, state"
_FETCH = "h, kinds, table, like, row"


def _of_values(h: Any, kinds: Any, like: Any) -> dict[str, Any]:
    return _row_functions(RULES[type(h)], kinds.members, np.dtype(type(like)))


def _of_types(h: Any, kinds: Any, like: Any) -> dict[str, Any]:
    return _row_functions(RULES[h.instance_class], kinds.instance_class.members, as_dtype(like))


def open_row(h, kinds, table, like, row, buffers):
    """Row ``row`` of the parameter and of the state as 1-D arrays, and of the state of one element a row:
    what is stored otherwise than it is computed with is decoded into the memory at ``buffers``, after its
    first row."""
    return _of_values(h, kinds, like)["open"](h, kinds, table, like, row, buffers)


@overload(open_row)
def _open_row(h, kinds, table, like, row, buffers):
    return _of_types(h, kinds, like)["open"]


def close_row(h, kinds, table, like, row, p, state):
    """Store what :func:`open_row` decoded."""
    _of_values(h, kinds, like)["close"](h, kinds, table, like, row, p, state)


@overload(close_row)
def _close_row(h, kinds, table, like, row, p, state):
    return _of_types(h, kinds, like)["close"]


def prefetch_row(h, kinds, table, like, row):
    """Have row ``row`` of the parameter and of the state loaded."""
    _of_values(h, kinds, like)["fetch"](h, kinds, table, like, row)


@overload(prefetch_row)
def _prefetch_row(h, kinds, table, like, row):
    return _of_types(h, kinds, like)["fetch"]


def buffer_rows(kinds: Any) -> int:
    """How many rows of memory an update needs: for the sum of gradients, and for what it decodes."""
    return 1 + sum(kind is not PLAIN for kind in kinds.members)


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
def catch_up(mode, h, c, like, kinds, table, rows, count, buffers):
    """Bring rows up to date with the step before ``table[STEP]``: the ``count`` different ones of ``rows``
    or, if that is empty, the first ``count``. buffers: [parts, memory], as for :func:`update_tables`."""
    parts = buffers.shape[0]
    for part in prange(parts):
        memory = buffers.ctypes.data + part * buffers.shape[1] * buffers.itemsize
        begin, end = part * count // parts, (part + 1) * count // parts
        catch_up_part(mode, h, c, like, kinds, table, rows, begin, end, memory)


@helper
def catch_up_part(mode, h, c, like, kinds, table, rows, begin, end, buffers):
    for k in range(begin, end):
        if k + AHEAD < end:
            prefetch_row(h, kinds, table, like, rows[k + AHEAD] if rows.size else k + AHEAD)
        row = rows[k] if rows.size else k
        if view(table[ROW_STEPS] + row * 8, 1, np.int64(0))[0] >= table[STEP] - 1:
            continue
        p, state, row_state = open_row(h, kinds, table, like, row, buffers)
        take_missed_steps(mode, h, c, like, table, row, p, state, row_state, table[STEP] - 1)
        close_row(h, kinds, table, like, row, p, state)


@Kernel
def update_tables(mode, h, c, like, kinds, tables, numbers, limits, parts, buffers):
    """Update the rows of tables that their groups name, each once, with the sum of its gradients.

    mode: what comes before a row's update. kinds: formats of the parameter, of the gradient, which is as
    computed with, and of the state. tables: see tables.py. h, c: the types of the hyperparameters.
    numbers[t]: those of table t, float64, of h and then of c. limits[t]: largest norm of a row's gradient.
    parts: [table, part, how many parts the table has]. buffers: [parts, memory for as many rows as
    :func:`buffer_rows` says].

    Bytes moved: the rows of values once for each position, and each distinct row of the table and
    of the state read and written.
    """
    for k in prange(parts.shape[0]):
        t = parts[k, 0]
        memory = buffers.ctypes.data + k * buffers.shape[1] * buffers.itemsize
        update_part(
            mode, h, c, like, kinds, tables[t], numbers[t], limits[t], parts[k, 1], parts[k, 2], memory
        )


@helper
def update_part(mode, h, c, like, kinds, table, numbers, limit, part, parts, buffers):
    """One part's share of :func:`update_tables`; apart, because what stands in a prange compiles slowly."""
    c = unpack(c, numbers[len(h) :], like)
    h = unpack(h, numbers, like)
    dim, groups = table[DIM], table[GROUPS]
    total = view(buffers, dim, like)
    for group in range(first_group(table, part, parts), first_group(table, part + 1, parts)):
        if group + AHEAD < groups:
            prefetch_row(h, kinds, table, like, row_of_group(table, group + AHEAD))
        row = row_of_group(table, group)
        if row == table[SKIPPED]:
            continue
        g = view(gradient_of(table, like, total, group), dim, like)
        p, state, row_state = open_row(h, kinds, table, like, row, buffers)
        row_h = enter_row(mode, h, c, like, table, row, p, state, row_state)
        update_apart(row_h, limited(c, g, limit), p, g, state, row_state)
        close_row(h, kinds, table, like, row, p, state)


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
