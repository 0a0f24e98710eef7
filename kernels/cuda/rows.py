"""Sparse updates: the rows of any number of tables that their segments name, each once, in one launch.

A block of threads takes segments of one table. A warp takes a row at a time, a lane as many elements next to
each other as are 16 bytes of what is computed with; where rows are short, a few of its lanes take a row each.
How many segments there are is known on the device alone: there are as many blocks as positions could need,
and those beyond the segments leave.

What depends on a whole row comes before its update, in passes over it that write nothing: the norm that
limits its gradient, the mean square for state of one element a row, the trust ratio. Each sums up the row's
gradient again, from the cache. Sums over a row's elements are in a fixed order, but not in the CPU's.

Bytes moved: the rows of values once for each position, and each distinct row of the table and of the state
read and written.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.extending import register_jitable

from fastopt.kernels.cuda.dense import coding
from fastopt.kernels.cuda.elements import Code, prototypes
from fastopt.kernels.cuda.lanes import group_sum, lane_bits
from fastopt.kernels.cuda.launch import kernel
from fastopt.kernels.cuda.layout import (
    ROWS_ALIGNED,
    ROWS_BOUNDS,
    ROWS_LANE_BITS,
    ROWS_LIMIT,
    ROWS_SHARED,
    ROWS_SLOTS,
    ROWS_TABLE_ROWS,
)
from fastopt.kernels.cuda.memory import (
    integer,
    lane_and_warp,
    last_at_most,
    load,
    meet,
    numbers_at,
    store,
    warp_max,
)
from fastopt.kernels.cuda.row_sums import THREADS, bounds_of, gradient_of
from fastopt.kernels.cuda.row_vectors import RowVectors, row_slots, row_vectors
from fastopt.kernels.element import NORM_EPS, regularise, rescaled, trust_ratio, unpack
from fastopt.kernels.layout import (
    TABLE_DIM,
    TABLE_FIRST_ROW,
    TABLE_HISTORY,
    TABLE_HISTORY_COLUMNS,
    TABLE_HISTORY_ROWS,
    TABLE_KEY,
    TABLE_POSITION,
    TABLE_ROW_STEPS,
    TABLE_ROWS,
    TABLE_SKIPPED,
)
from fastopt.kernels.magnitude import HUGE, unit_of
from fastopt.kernels.rule import RULES, PerRow
from fastopt.kernels.source import define

ROUNDS = 4  # rows that a warp, or a group of its lanes, takes one after the other
WARP_BITS = 5
_DOUBLE = np.float64(0)


@kernel("iiiii", THREADS)
def update_rows(code: Code, mode: type, limits: bool) -> Any:
    """``(tables, columns, bases, count, numbers)``: update the rows of tables.

    tables: rows of so many columns (see layout.py). bases: int64, the number of each table's first block, and
    that of all. numbers: hyperparameters of each table, of the type that is computed with. limits: whether
    the norms of rows' gradients are limited.
    """
    h, c, like = prototypes(code)
    width, size = len(h) + len(c), like.itemsize
    of_c = len(h) * size
    update = register_jitable(_update_of_row(code, mode, limits))

    def update_rows(tables, columns, bases, count, numbers):
        lane, warp = lane_and_warp()
        block = np.int64(cuda.blockIdx.x)
        while block < integer(bases, count):
            t = last_at_most(bases, count, block)
            own, place = tables + t * columns * 8, numbers + t * width * size
            table = own + ROWS_SHARED * 8
            own_h = unpack(h, numbers_at(h, place, like), like)
            own_c = unpack(c, numbers_at(c, place + of_c, like), like)
            bounds, bits = integer(own, ROWS_BOUNDS), integer(own, ROWS_LANE_BITS)
            together = THREADS >> bits
            of_warp = integer(bounds, 0) + (block - integer(bases, t)) * (together * ROUNDS)
            end = min(of_warp + together * ROUNDS, integer(bounds, 1))
            of_warp += warp << (WARP_BITS - bits)
            while of_warp < end:
                segment = of_warp + (lane >> bits)
                row, first, last = np.int64(-1), np.int64(0), np.int64(0)
                if segment < end:
                    row = integer(integer(table, TABLE_ROWS), segment) - integer(table, TABLE_FIRST_ROW)
                    if row == integer(table, TABLE_SKIPPED) or row == integer(own, ROWS_TABLE_ROWS):
                        row = np.int64(-1)
                    else:
                        first, last = bounds_of(table, segment)
                if row >= 0 or bits < WARP_BITS:  # the lanes of a warp go on together
                    update(own_h, own_c, own, table, row, first, last, lane & ((1 << bits) - 1), bits)
                of_warp += together
            block += np.int64(cuda.gridDim.x)

    return update_rows


def lanes_of(vectors: RowVectors, dim: int) -> int:
    """2 to this are the lanes that take a row of ``dim`` elements."""
    if vectors.elements.coded:
        return WARP_BITS
    return lane_bits(-(-dim // vectors.length))


def _update_of_row(code: Code, mode: type, limits: bool) -> Callable:
    """``(h, c, own, table, row, first, last, lane, bits)``: update a row with the gradient of the sorted
    positions from ``first`` up to ``last``. A row below 0 is none: its lanes come along."""
    rule, like = RULES[code.h], code.compute.type(0)
    vectors = row_vectors(code.formats, code.compute)
    update = _final_pass(vectors, code.compute)
    names: dict[str, Any] = {}
    lines = [
        f"slots, aligned = integer(own, {ROWS_SLOTS}), integer(own, {ROWS_ALIGNED}) != 0",
        f"dim, key = integer(table, {TABLE_DIM}), integer(table, {TABLE_KEY})",
        "end = dim if row >= 0 else 0",
        f"position = integer(table, {TABLE_POSITION}) + row * dim",
        "row_values = ()",
    ]
    of_table = "table, row, aligned, {at}, end, key, position, lane, first, last, slots, bits"
    given = of_table.format(at=0)
    if mode is PerRow:
        lines.append("h = enter(h, table, row, lane)")
        names["enter"] = _entering_per_row(like)
    if limits:
        lines.append(f"c = limited(c, load(own + {ROWS_LIMIT * 8}, double), dim, {given})")
        names["limited"] = _limiting(vectors, code.compute)
    if rule.update_row is not None:
        load_row, store_row = row_slots(code)
        zeros = "zero, " * len(rule.row_slots)
        lines += [
            f"row_values = load_row(table, row) if row >= 0 else ({zeros})",
            f"row_values = update_state(h, mean_square(c, dim, {given}), *row_values)",
            "meet()",  # every lane has read what one of them writes
            "if row >= 0 and lane == 0:",
            "    store_row(table, row, row_values)",
        ]
        names |= {"load_row": load_row, "store_row": store_row}
        names["update_state"] = register_jitable(rule.update_row)
        names["mean_square"] = _averaging(vectors, code.compute)
    if rule.trust_ratio is not None:
        lines.append(f"h = rated(h, c, dim, row_values, {given})")
        names["rated"] = _rating(vectors, code.compute)
    lines += [
        "at = np.int64(0)",
        "while at < dim:",
        f"    update_part(h, c, row_values, {of_table.format(at='at')})",
        f"    at += {_step(vectors)}",
        "return None",
    ]
    names |= {"np": np, "integer": integer, "load": load, "meet": meet, "zero": like, "double": _DOUBLE}
    names["update_part"] = update
    return define("update", "h, c, own, table, row, first, last, lane, bits", *lines, **names)


_OF_ROW = "table, row, aligned, at, last, key, position, lane, first, stop, slots, bits"


def _step(vectors: RowVectors) -> str:
    """The expression of how many elements the lanes of a row take at a time."""
    return f"{vectors.run}" if vectors.elements.coded else f"({vectors.length} << bits)"


def _pass(
    vectors: RowVectors, like: np.dtype, arguments: str, lines: list[str], result: str, names: dict[str, Any]
) -> Callable:
    """A function of a part of a row, with these arguments before those of every pass, in which the lines
    find the row's elements and, as its array 1, their gradient."""
    whole, part = (gradient_of(like, vectors.length, own) for own in (True, False))
    opening = vectors.opening()
    for j in range(vectors.count):
        opening += vectors.reads(j, vectors.own)
        given = f"table, first, stop, i{j}, last, slots"
        opening += [f"if whole{j}:", f"    v{j}_1 = whole_gradient({given})"]
        opening += ["else:", f"    v{j}_1 = part_gradient({given})"]
    names = {**vectors.names, **names, "whole_gradient": whole, "part_gradient": part}
    return register_jitable(
        define("of_part", f"{arguments}{_OF_ROW}", *opening, *lines, f"return {result}", **names)
    )


def _final_pass(vectors: RowVectors, like: np.dtype) -> Callable:
    """``(h, c, row_values, ...)``: update a part of a row."""
    lines = [
        f"n{j}_{e} = element(h, c, key, position, i{j} + {e}, {vectors.given(j, e)}, *row_values)"
        for j, e in vectors.elements_of_lane()
    ]
    known = [(m, place) for m, place in enumerate(vectors.elements.outputs) if place is not None]
    for j in range(vectors.count):
        lines += vectors.stores(known, "n", j)
    if vectors.elements.coded:
        lines += coding(vectors)
    names = {"element": vectors.elements.element}
    return _pass(vectors, like, "h, c, row_values, ", lines, "None", names)


def _summing(
    vectors: RowVectors,
    like: np.dtype,
    arguments: str,
    lines: Callable[[str, str], list[str]],
    sums: tuple[str, ...],
    names: dict[str, Any],
) -> Callable:
    """A function with these arguments and those of a pass: a tuple of sums over a row's elements, to which
    ``lines`` add what an element gives: they are told its number in a row of lanes, and its arrays."""
    of_part = []
    for j, e in vectors.elements_of_lane():
        of_part.append(f"if i{j} + {e} < last:")
        of_part += [f"    {line}" for line in lines(f"v{j}_1[{e}]", vectors.given(j, e))]
    result = "".join(f"{own}, " for own in sums)
    part = _pass(vectors, like, f"{arguments}{result}", of_part, f"({result})", names)
    zeros = "".join("zero, " for _ in sums)
    return register_jitable(
        define(
            "sums_of_row",
            f"{arguments}zero, dim, {_OF_ROW}",
            f"{result} = {zeros}",
            "while at < dim:",
            f"    {result} = of_part({arguments}{result}{_OF_ROW})",
            f"    at += {_step(vectors)}",
            f"return ({''.join(f'group_sum({own}, bits), ' for own in sums)})",
            of_part=part,
            group_sum=group_sum,
        )
    )


def _limiting(vectors: RowVectors, like: np.dtype) -> Callable:
    """``(c, limit, dim, ...)``: what ``fastopt.kernels.element.limited`` gives."""

    def lines(g: str, _: str) -> list[str]:
        return [f"y = np.float64(scale * {g}) * over", "total += y * y"]

    squares = _summing(vectors, like, "scale, over, ", lines, ("total",), {})
    return register_jitable(
        define(
            "limited",
            f"c, limit, dim, {_OF_ROW}",
            f"(total,) = squares(c.scale, 1.0, 0.0, dim, {_OF_ROW})",
            "again = warp_max(np.uint32(total == np.inf)) != 0",
            "norm = math.sqrt(total) + NORM_EPS",
            "factor = limit / norm",
            "if again:",
            f"    (large,) = squares(c.scale, 1.0 / HUGE, 0.0, dim, {_OF_ROW})",
            "    if total == np.inf and not factor > 1.0:",
            "        factor = limit / HUGE / math.sqrt(large)",
            "if limit == np.inf or factor > 1.0:",
            "    return c",
            "return rescaled(c, cast(factor))",
            squares=squares,
            warp_max=warp_max,
            np=np,
            math=math,
            NORM_EPS=NORM_EPS,
            HUGE=HUGE,
            rescaled=rescaled,
            cast=like.type,
        )
    )


def _averaging(vectors: RowVectors, like: np.dtype) -> Callable:
    """``(c, dim, ...)``: the mean over a row of the squared gradient as the rule sees it."""
    numbers = {"read": vectors.elements.read, "regularise": regularise}

    def lines(g: str, given: str) -> list[str]:
        return [f"x = regularise(c, read({given})[0], {g})", "total += x * x"]

    def lines_of_large(g: str, given: str) -> list[str]:
        return [f"x = regularise(c, read({given})[0], {g})", "total += x / size * x"]

    squares = _summing(vectors, like, "c, ", lines, ("total",), numbers)
    large = _summing(vectors, like, "c, size, ", lines_of_large, ("total",), numbers)
    return register_jitable(
        define(
            "mean_square",
            f"c, dim, {_OF_ROW}",
            f"(total,) = squares(c, zero, dim, {_OF_ROW})",
            "if warp_max(np.uint32(total == np.inf)) == 0:",
            "    return total / cast(dim)",
            f"(mean,) = large(c, cast(dim), zero, dim, {_OF_ROW})",
            "return mean if total == np.inf else total / cast(dim)",
            squares=squares,
            large=large,
            warp_max=warp_max,
            np=np,
            zero=like.type(0),
            cast=like.type,
        )
    )


def _rating(vectors: RowVectors, like: np.dtype) -> Callable:
    """``(h, c, dim, row_values, ...)``: ``h`` with its learning rate times the trust ratio of the row."""

    def lines(_: str, given: str) -> list[str]:
        return [
            f"p, u = direction(h, c, {given}, *row_values)",
            "x, y = np.float64(p) * over_p, np.float64(u) * over_u",
            "p_sq += x * x",
            "u_sq += y * y",
        ]

    names = {"direction": vectors.elements.direction}
    given = "h, c, row_values, over_p, over_u, "
    squares = _summing(vectors, like, given, lines, ("p_sq", "u_sq"), names)
    return register_jitable(
        define(
            "rated",
            f"h, c, dim, row_values, {_OF_ROW}",
            f"p_sq, u_sq = squares(h, c, row_values, 1.0, 1.0, 0.0, dim, {_OF_ROW})",
            "p_unit, u_unit = unit_of(p_sq), unit_of(u_sq)",
            "again = last > 0 and (p_unit != 1.0 or u_unit != 1.0)",
            "if warp_max(np.uint32(again)) != 0:",
            "    over_p, over_u = 1.0 / p_unit, 1.0 / u_unit",
            f"    p_sq, u_sq = squares(h, c, row_values, over_p, over_u, 0.0, dim, {_OF_ROW})",
            "return rescaled(h, cast(trust_ratio(h, p_sq, u_sq, p_unit, u_unit, dim)))",
            squares=squares,
            unit_of=unit_of,
            warp_max=warp_max,
            np=np,
            rescaled=rescaled,
            trust_ratio=trust_ratio,
            cast=like.type,
        )
    )


def _entering_per_row(like: Any) -> Callable:
    """``(h, table, row, lane)``: count an update of the row, and take what is folded at its count.

    ``h`` has the learning rate in its first place; a row of the history has a count, which are ascending, and
    what the rule folds for the learning rate 1 at it.
    """

    @register_jitable
    def enter(h, table, row, lane):
        place = integer(table, TABLE_ROW_STEPS) + row * 8
        count = integer(place, 0) + 1 if row >= 0 else np.int64(1)
        meet()  # every lane has read what one of them writes
        if row >= 0 and lane == 0:
            store(place, count)
        history, width = integer(table, TABLE_HISTORY), integer(table, TABLE_HISTORY_COLUMNS) * 8
        # The last of the counts that are not above it: a count from a damaged file must not lead astray. It
        # is as far from the first as their difference says, or nearer where counts between them are missing.
        first = np.int64(load(history, _DOUBLE))
        low, end = np.int64(0), max(min(count - first + 1, integer(table, TABLE_HISTORY_ROWS)), 1)
        middle = end - 1
        while end - low > 1:
            if load(history + middle * width, _DOUBLE) <= np.float64(count):
                low = middle
            else:
                end = middle
            middle = (low + end) >> 1
        return unpack(h, numbers_at(h, history + low * width + 8, _DOUBLE), like, np.float64(h[0]))

    return enter
