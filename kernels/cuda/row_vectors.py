"""Source of how the lanes of a warp read and write a row of a table and of its state."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba.extending import register_jitable

from fastopt.kernels.cuda.dense import coding, larger_if
from fastopt.kernels.cuda.elements import Code, Formats, Place
from fastopt.kernels.cuda.memory import integer, load, meet, store, warp_max
from fastopt.kernels.cuda.vectors import OF_BLOCK, Vectors
from fastopt.kernels.formats import blocks_of, scale_from
from fastopt.kernels.layout import (
    TABLE_DIM,
    TABLE_MASTER,
    TABLE_PARAMETER,
    TABLE_STATE,
    TABLE_STATE_STRIDE,
)
from fastopt.kernels.rule import RULES
from fastopt.kernels.source import define


class RowVectors(Vectors):
    """The vectors of a row, the gradient of which is not in memory as the row is.

    In the source, ``table`` is the address of the table's columns (see ``fastopt.kernels.layout``), ``row``
    the number of the row, ``at`` the warp's first element of it, and ``last`` how many it has.

    Attributes:
        own: the arrays but for the gradient.
    """

    def __init__(self, members: Formats, like: np.dtype) -> None:
        super().__init__(members, like)
        self._places = [place for place in self._places if place.array != 1]
        self.own = [k for k in range(len(members)) if k != 1]
        open_element = _open_element(self.elements.read, self.own, like)
        self.names |= {"open_element": open_element, "close_element": self.elements.close}
        self.names |= {"blocks_of": blocks_of, "nothing": (members[1].zero(like),) * self.length}
        self.names |= {"encode": self.elements.encode, "meet": meet, "warp_max": warp_max}
        self.names |= {"larger_if": larger_if, "scale_from": scale_from}

    def column(self, place: Place) -> int:
        if place.array == 0:
            return TABLE_MASTER if place.second else TABLE_PARAMETER
        return TABLE_STATE + 2 * (place.array - 2)

    def start(self, place: Place) -> str:
        stride = TABLE_STATE_STRIDE if place.array else TABLE_DIM
        address = f"integer(table, {self.column(place)})"
        return f"{address} + row * integer(table, {stride}) * {place.itemsize}"

    def scale(self, k: int) -> str:
        blocks = f"blocks_of(integer(table, {TABLE_DIM}))"
        return f"integer(table, {TABLE_STATE + 2 * (k - 2) + 1}) + row * {blocks} * 4 + {OF_BLOCK}"

    def elements_of_lane(self) -> list[tuple[int, int]]:
        """The vector, and the number in it, of each element of a lane."""
        return [(j, e) for j in range(self.count) for e in range(self.length)]

    def loads(self) -> list[str]:
        """Lines that find addresses, and read and decode the elements of a lane: ``x{j}_{e}`` is the tuple of
        an element of each array of ``own``, of the type that is computed with."""
        lines = self.opening()
        for j in range(self.count):
            lines += [*self.reads(j, self.own), f"v{j}_1 = nothing"]
        return lines + [f"x{j}_{e} = open_element({self.given(j, e)})" for j, e in self.elements_of_lane()]

    def stores_of_elements(self) -> list[str]:
        """Lines that encode and write the elements ``x{j}_{e}`` again, after :meth:`loads`."""
        lines = [
            f"n{j}_{e} = close_element(key, position, i{j} + {e}, *x{j}_{e})"
            for j, e in self.elements_of_lane()
        ]
        known = [(m, place) for m, place in enumerate(self.elements.outputs) if place is not None]
        for j in range(self.count):
            lines += self.stores(known, "n", j)
        return lines + (coding(self) if self.elements.coded else [])

    def function(self, arguments: Sequence[str], lines: Sequence[str], **names: Any) -> Callable:
        """A function of a warp and of a part of a row, with these arguments after ``table, row, aligned, at,
        last, key, position, lane``."""
        given = ", ".join(["table, row, aligned, at, last, key, position, lane", *arguments])
        return register_jitable(define("of_run", given, *lines, "return None", **self.names, **names))


row_vectors = functools.cache(RowVectors)  # the functions of formats are defined, and compiled, once


def _open_element(read: Callable, own: Sequence[int], like: np.dtype) -> Callable:
    """The function that decodes an element of each array but the gradient."""
    numbers = "".join(f"cast(numbers[{k}]), " for k in own)
    lines = "numbers = read(*given)", f"return ({numbers})"
    return register_jitable(define("open_element", "*given", *lines, read=read, cast=like.type))


def row_slots(code: Code) -> tuple[Callable, Callable]:
    """The functions ``(table, row) -> values`` and ``(table, row, values)`` that load and store the state of
    one element a row."""
    rule, like = RULES[code.h], code.compute.type(0)
    first, size = TABLE_STATE + 2 * len(rule.state_slots), like.itemsize
    places = [f"integer(table, {first + 2 * k}) + row * {size}" for k in range(len(rule.row_slots))]
    names: dict[str, Any] = {"integer": integer, "load": load, "store": store, "like": like}
    loads = "".join(f"load({place}, like), " for place in places)
    stores = [f"store({place}, values[{k}])" for k, place in enumerate(places)]
    return (
        register_jitable(define("load_row", "table, row", f"return ({loads})", **names)),
        register_jitable(define("store_row", "table, row, values", *stores, "return None", **names)),
    )
