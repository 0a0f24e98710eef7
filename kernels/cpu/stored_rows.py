"""Rows of tables as they are stored (see formats.py): opened, updated, closed, and fetched ahead."""

import functools
from typing import Any

import numpy as np
from numba.np.numpy_support import as_dtype

from fastopt.kernels.cpu.for_each import for_each
from fastopt.kernels.cpu.jit import Kernel, helper, restricted_helper
from fastopt.kernels.cpu.row_means import begin_row
from fastopt.kernels.cpu.runs import NO_SCALES, Formats, new_array, reader, reblock_row, writer
from fastopt.kernels.cpu.trust import rated
from fastopt.kernels.element import update_elements
from fastopt.kernels.formats import blocks_of
from fastopt.kernels.intrinsics import prefetch, view
from fastopt.kernels.layout import (
    TABLE_DIM,
    TABLE_KEY,
    TABLE_MASTER,
    TABLE_PARAMETER,
    TABLE_POSITION,
    TABLE_ROW_STEPS,
    TABLE_STATE,
    TABLE_STATE_STRIDE,
)
from fastopt.kernels.linked import overload
from fastopt.kernels.rule import RULES, Rule
from fastopt.kernels.source import define


@functools.cache
def _row_functions(rule: Rule, members: Formats, like: np.dtype) -> dict[str, Any]:
    """Functions that open, close and prefetch a row of the parameter and of its state (see formats.py)."""
    size, slots = like.itemsize, len(rule.state_slots)
    names: dict[str, Any] = {"view": view, "prefetch": prefetch, "np": np, "blocks_of": blocks_of}
    names["members"] = tuple(kind.name for kind in members)
    opening: list[str] = []
    closing: list[str] = []
    fetching: list[str] = []
    opened: list[str] = []
    for k, kind in enumerate(members):
        if k == 1:  # the gradient is summed up elsewhere
            continue
        width = kind.itemsize(like)
        column = TABLE_PARAMETER if k == 0 else TABLE_STATE + 2 * (k - 2)
        stride = f"table[{TABLE_DIM if k == 0 else TABLE_STATE_STRIDE}] * {width}"
        address = f"table[{column}] + row * {stride}"
        fetching.append(f"prefetch({address}, table[{TABLE_DIM}] * {width})")
        if kind.master:
            master = f"table[{TABLE_MASTER}] + row * table[{TABLE_DIM}] * {size}"
            fetching.append(f"prefetch({master}, table[{TABLE_DIM}] * {size})")
            opening.append(f"a{k} = view({master}, table[{TABLE_DIM}], like)")
        elif kind.stored is None:
            opening.append(f"a{k} = view({address}, table[{TABLE_DIM}], like)")
        else:
            buffer = f"buffers + {len(closing)} * table[{TABLE_DIM}] * {size}"
            opening.append(f"a{k} = view({buffer}, table[{TABLE_DIM}], like)")
        opened.append(f"a{k}")
        if kind.stored is None:
            continue
        names |= {
            f"zero{k}": kind.zero(like),
            f"read{k}": reader(kind),
            f"write{k}": writer(kind, k - 2 if k else None),
        }
        stored, scales = f"view({address}, table[{TABLE_DIM}], zero{k})", NO_SCALES
        if kind.coded:
            start = f"table[{column + 1}] + row * blocks_of(table[{TABLE_DIM}]) * 4"
            scales = f"view({start}, blocks_of(table[{TABLE_DIM}]), np.float32(0))"
        if not kind.master:
            opening.append(f"read{k}({stored}, {scales}, a{k})")
        values = "p" if k == 0 else f"state[{k - 2}]"
        position = f"table[{TABLE_POSITION}] + row * table[{TABLE_DIM}]"
        closing.append(f"write{k}({values}, {stored}, {scales}, np.uint64(table[{TABLE_KEY}]), {position})")
    narrow = [f"table[{TABLE_STATE + 2 * (slots + k)}] + row * {size}" for k in range(len(rule.row_slots))]
    fetching += [f"prefetch({address}, {size})" for address in narrow]
    fetching += [f"if table[{TABLE_ROW_STEPS}]:", f"    prefetch(table[{TABLE_ROW_STEPS}] + row * 8, 8)"]
    state = "".join(f"{name}, " for name in opened[1:])
    row_state = "".join(f"view({address}, 1, like), " for address in narrow)
    opening.append(f"return {opened[0]}, ({state}), ({row_state})")
    return {
        "open": define("open_row", _OPEN, *opening, **names),
        "close": define("close_row", _CLOSE, *closing, "return None", **names),
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
    what is stored otherwise than it is computed with is decoded into the memory at ``buffers``, as many
    rows as :func:`decoded` says."""
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


def decoded(kinds: Any) -> int:
    """How many rows an update decodes."""
    return sum(kind.stored is not None for kind in kinds.members)


@restricted_helper
def update_apart(h, c, p, g, state, row_state, mean_sq):
    """Update the row ``p`` and its state with the row's whole gradient ``g``: 1-D arrays that do not
    overlap, those of ``row_state`` of one element. mean_sq: see row_means.py."""
    row_values = begin_row(h, c, p, g, row_state, mean_sq)
    update_elements(rated(h, c, p, g, state, row_values), c, p, g, state, row_values)


@Kernel
def reblock(team, kinds, like, codes, scales, new, new_scales):
    """Encode the table ``codes``, [rows, dim], whose blocks go on over its rows, as ``new``, whose blocks end
    with its rows, rounded to the nearest. kinds: the format of both. scales: 1-D. new_scales: [rows, blocks
    of a row]."""
    flat = codes.reshape(-1)
    for_each(team, reblock_part, codes.shape[0], (kinds, like, flat, scales, new, new_scales))


@helper
def reblock_part(row, kinds, like, flat, scales, new, new_scales):
    dim = new.shape[1]
    reblock_row(kinds, like, flat, scales, row * dim, new_array(dim, like), new[row], new_scales[row])
