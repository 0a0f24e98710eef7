"""Source of how a lane reads and writes elements of arrays that lie next to each other: by one instruction
where addresses allow it and the arrays go so far, else one by one.

Elements of 8 and 16 bits are kept in words, as they come: a register for each would be two or four times as
many.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numba.extending import register_jitable

from fastopt.kernels.cuda.elements import Formats, Place, elements_of
from fastopt.kernels.cuda.lanes import VECTOR_BYTES
from fastopt.kernels.cuda.layout import PLACES
from fastopt.kernels.cuda.memory import (
    WARP,
    integer,
    load,
    load_if,
    load_vector,
    store,
    store_if,
    store_vector,
)
from fastopt.kernels.formats import BLOCK

WORD = 4  # bytes
OF_BLOCK = f"(at >> {BLOCK.bit_length() - 1}) * 4"  # bytes of the scales before that of element ``at``
MOST_OF_A_VECTOR = 8  # elements: more of them would not fit into the registers of a thread


def column_of(place: Place) -> int:
    """Where a row of layout.py has the address of an array, or that of its master."""
    return PLACES + 2 * place.array + place.second


def is_packed(place: Place, length: int) -> bool:
    """Whether vectors of so many elements are kept in words."""
    return isinstance(place.zero, np.uint8 | np.uint16) and length * place.itemsize % WORD == 0


def packed(place: Place, values: Sequence[str]) -> str:
    """The expression of a vector of these values."""
    if not is_packed(place, len(values)):
        return f"({', '.join(values)},)"
    per_word = WORD // place.itemsize
    words = (
        f"word_of_{per_word}({', '.join(values[first : first + per_word])})"
        for first in range(0, len(values), per_word)
    )
    return f"({', '.join(words)},)"


@register_jitable
def word_of_2(a, b):
    """A word of two numbers of 16 bits, the first in its low half."""
    return np.uint32(np.uint32(a) | np.uint32(np.uint32(b) << np.uint32(16)))


@register_jitable
def word_of_4(a, b, c, d):
    """A word of four numbers of 8 bits, the first in its low byte."""
    return word_of_2(
        np.uint32(a) | np.uint32(np.uint32(b) << np.uint32(8)),
        np.uint32(c) | np.uint32(np.uint32(d) << np.uint32(8)),
    )


@register_jitable
def part_of_2(word, k):
    """Number ``k`` of the two in a word."""
    return np.uint16(np.uint32(word >> np.uint32(16 * k)))


@register_jitable
def part_of_4(word, k):
    """Number ``k`` of the four in a word."""
    return np.uint8(np.uint32(word >> np.uint32(8 * k)))


class Vectors:
    """The vectors that a lane works on at a time, of arrays in these formats, ``like`` being computed with.

    In the source, vector ``j`` begins with element ``i{j}`` and may be read and written as a whole if
    ``whole{j}``; ``row`` is that of the array (see layout.py), ``at`` the warp's first element, and ``last``
    where the array ends.

    Attributes:
        elements: what is done to elements. length: elements of a vector, of which the widest are 16 bytes.
        run: elements that a warp works on: as many as are asked for, else a vector for each lane or, where
            arrays have codes, a block of them. count: vectors of a lane. names: what the source sees.
    """

    def __init__(self, members: Formats, like: np.dtype, run: int | None = None) -> None:
        self.elements = elements_of(members, like)
        self._places = [
            place for place in (*self.elements.inputs, *self.elements.outputs) if place is not None
        ]
        widest = max(place.itemsize for place in self._places)
        self.length = min(VECTOR_BYTES // widest, MOST_OF_A_VECTOR)
        of_warp = WARP * self.length
        self.run = run or (BLOCK if self.elements.coded else of_warp)
        self.count = self.run // of_warp
        self.names: dict[str, Any] = {"np": np, "integer": integer, "load": load, "store": store}
        self.names |= {"load_if": load_if, "store_if": store_if, "word_of_2": word_of_2}
        self.names |= {"word_of_4": word_of_4, "part_of_2": part_of_2, "part_of_4": part_of_4}
        self.names |= {"load_vector": load_vector, "store_vector": store_vector}
        self.names |= {f"zero_{_name(place)}": place.zero for place in self._places}
        coded = zip(self.elements.coded, self.elements.factors, self.elements.inverses, strict=True)
        for k, factor, inverse in coded:
            self.names |= {f"factor{k}": factor, f"inverse{k}": inverse}

    @functools.cached_property
    def aligned(self) -> dict[int, int]:
        """By column of layout.py, to how many bytes addresses have to be aligned for whole vectors."""
        return {self.column(place): self.length * place.itemsize for place in self._places}

    def column(self, place: Place) -> int:
        """The column of ``row`` that has the address of an array, or of its master."""
        return column_of(place)

    def start(self, place: Place) -> str:
        """The expression of the address of an array's first element."""
        return f"integer(row, {self.column(place)})"

    def scale(self, k: int) -> str:
        """The expression of the address of the scale of the codes from ``at`` on."""
        return f"integer(row, {PLACES + 2 * k + 1}) + {OF_BLOCK}"

    def opening(self) -> list[str]:
        """Lines that find addresses, the factors of codes, and where vectors are."""
        lines = [
            f"{name} = {start}" for name, start in {_name(p): self.start(p) for p in self._places}.items()
        ]
        for k in self.elements.coded:
            lines.append(f"s{k} = {self.scale(k)}")
            lines.append(f"f{k} = factor{k}(load(s{k}, np.float32(0)))")
        for j in range(self.count):
            lines.append(f"i{j} = at + lane * {self.length} + {j * self.length * WARP}")
            lines.append(f"whole{j} = aligned and i{j} + {self.length} <= last")
        return lines

    def reads(self, j: int, arrays: Sequence[int] | None = None) -> list[str]:
        """Lines that read vector ``j`` of these arrays, else of all; elements beyond the last are 0."""
        whole, part = [], []
        for place in self.elements.inputs:
            if arrays is not None and place.array not in arrays:
                continue
            target, zero = f"    v{j}_{place.array} = ", f"zero_{_name(place)}"
            each = [
                f"load_if(i{j} + {e} < last, {_address(place, j, e)}, {zero})" for e in range(self.length)
            ]
            part.append(target + packed(place, each))
            kind, count = zero, self.length
            if is_packed(place, self.length):
                kind, count = "np.uint32(0)", self.length * place.itemsize // WORD
            whole.append(f"{target}load_vector({_address(place, j)}, {kind}, {count})")
        return [f"if whole{j}:", *whole, "else:", *part]

    def given(self, j: int, e: int) -> str:
        """The last of what functions in elements.py are given for element ``e`` of vector ``j``."""
        inputs = (self._element(place, f"v{j}_{place.array}", e) for place in self.elements.inputs)
        return ", ".join([*inputs, *(f"f{k}" for k in self.elements.coded)])

    def stores(self, places: Sequence[tuple[int, Place]], values: str, j: int) -> list[str]:
        """Lines that store vector ``j``: to each place the number that it is given with, of the tuple
        ``{values}{j}_{e}`` that each element has."""
        lines, whole, part = [], [], []
        for m, place in places:
            vector = f"{values}{j}of{m}"
            each = [f"{values}{j}_{e}[{m}]" for e in range(self.length)]
            lines.append(f"{vector} = {packed(place, each)}")
            whole.append(f"    store_vector({_address(place, j)}, {vector})")
        for e in range(self.length):
            for m, place in places:
                number = self._element(place, f"{values}{j}of{m}", e)
                part.append(f"    store_if(i{j} + {e} < last, {_address(place, j, e)}, {number})")
        return [*lines, f"if whole{j}:", *whole, "else:", *part]

    def clearing(self, j: int) -> list[str]:
        """Lines that set vector ``j`` of the gradient to 0."""
        place = self.elements.inputs[1]
        zero = f"zero_{_name(place)}"
        part = (
            f"    store_if(i{j} + {e} < last, {_address(place, j, e)}, {zero})" for e in range(self.length)
        )
        whole = f"    store_vector({_address(place, j)}, {packed(place, [zero] * self.length)})"
        return [f"if whole{j}:", whole, "else:", *part]

    def _element(self, place: Place, vector: str, e: int) -> str:
        """The expression of an element of a vector."""
        if not is_packed(place, self.length):
            return f"{vector}[{e}]"
        per_word = WORD // place.itemsize
        return f"part_of_{per_word}({vector}[{e // per_word}], {e % per_word})"


def _name(place: Place) -> str:
    """That of the address of an array, or of its master."""
    return f"m{place.array}" if place.second else f"a{place.array}"


def _address(place: Place, j: int, e: int = 0) -> str:
    """The expression of the address of element ``e`` of vector ``j``."""
    return f"{_name(place)} + i{j} * {place.itemsize} + {e * place.itemsize}"
