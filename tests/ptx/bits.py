"""Instructions on bits: logic, shifts, fields, permutations."""

import numpy as np

from . import ufuncs
from .arithmetic import Run, apply, assign, kind_of, makes, not_understood
from .columns import Columns
from .kinds import KINDS, bits_of
from .parse import Instruction
from .ufuncs import ufunc


@makes("and", "or", "xor")
def logic(i: Instruction, columns: Columns) -> Run:
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[i.base]
    return apply(columns, i, function, kind_of(i), 2)


@makes("shl", "shr")
def shift(i: Instruction, columns: Columns) -> Run:
    """A shift by the width or beyond leaves zeros, or the sign."""
    kind = kind_of(i)
    if i.base == "shl" or kind[0] == "b":
        kind = f"u{bits_of(kind)}"
    dtype, width = KINDS[kind], bits_of(kind)
    function = np.left_shift if i.base == "shl" else np.right_shift
    if not i.operands[2].startswith("%"):
        by = int(columns.constant(i.operands[2], "u32"))
        x, out = columns.read(i.operands[1], kind), columns.write(i.operands[0], kind)
        if by >= width and kind[0] == "u":
            return assign(columns, i.operands[0], kind, lambda c: dtype.type(0))
        by = dtype.type(min(by, width - 1))

        def run(c: list, where: object) -> None:
            function(c[x], by, c[out], where=where)

        return run
    x, n = columns.read(i.operands[1], kind), columns.read(i.operands[2], "u32")
    # NumPy itself shifts out all bits where a shift is by the width or more
    most = np.uint32(width)
    return assign(
        columns, i.operands[0], kind, lambda c: function(c[x], np.minimum(c[n], most).astype(dtype))
    )


@makes("shf")
def shf(i: Instruction, columns: Columns) -> Run:
    left, wrap = "l" in i.mods, "wrap" in i.mods
    low, top, by = (columns.read(text, "u32") for text in i.operands[1:4])
    function = ufunc(ufuncs.funnel)
    return assign(columns, i.operands[0], "u32", lambda c: function(c[low], c[top], c[by], left, wrap))


@makes("bfe", "bfi")
def bit_field(i: Instruction, columns: Columns) -> Run:
    kind = kind_of(i)
    width, unsigned = bits_of(kind), f"u{bits_of(kind)}"
    dtype = KINDS[unsigned]
    count = 1 if i.base == "bfe" else 2
    words = [columns.read(text, unsigned) for text in i.operands[1 : count + 1]]
    first, size = (columns.read(text, "u32") for text in i.operands[count + 1 : count + 3])
    function = ufunc(ufuncs.bfe if i.base == "bfe" else ufuncs.bfi)
    last = (width, kind[0] == "s") if i.base == "bfe" else (width,)

    def compute(c: list) -> np.ndarray:
        wide = [np.asarray(c[p], np.uint64) for p in words]
        return function(*wide, c[first], c[size], *last).astype(dtype)

    return assign(columns, i.operands[0], unsigned, compute)


@makes("bfind")
def bfind(i: Instruction, columns: Columns) -> Run:
    kind = kind_of(i, "shiftamt")
    x, width = columns.read(i.operands[1], f"u{bits_of(kind)}"), bits_of(kind)
    function, signed, amount = ufunc(ufuncs.bfind), kind[0] == "s", "shiftamt" in i.mods
    return assign(
        columns, i.operands[0], "u32", lambda c: function(np.asarray(c[x], np.uint64), width, signed, amount)
    )


@makes("popc")
def popc(i: Instruction, columns: Columns) -> Run:
    x = columns.read(i.operands[1], kind_of(i))
    return assign(columns, i.operands[0], "u32", lambda c: np.bitwise_count(c[x]))


@makes("clz")
def clz(i: Instruction, columns: Columns) -> Run:
    kind = kind_of(i)
    x, spare = columns.read(i.operands[1], kind), np.uint32(64 - bits_of(kind))
    return assign(
        columns, i.operands[0], "u32", lambda c: ufunc(ufuncs.clz)(np.asarray(c[x], np.uint64)) - spare
    )


@makes("brev")
def brev(i: Instruction, columns: Columns) -> Run:
    kind = kind_of(i)
    x, spare = columns.read(i.operands[1], kind), np.uint64(64 - bits_of(kind))
    dtype = KINDS[kind]

    def compute(c: list) -> np.ndarray:
        return (ufunc(ufuncs.brev)(np.asarray(c[x], np.uint64)) >> spare).astype(dtype)

    return assign(columns, i.operands[0], kind, compute)


@makes("prmt")
def prmt(i: Instruction, columns: Columns) -> Run:
    if i.mods != ("b32",):
        raise not_understood(i)
    return apply(columns, i, ufunc(ufuncs.prmt), "b32", 3)


@makes("lop3")
def lop3(i: Instruction, columns: Columns) -> Run:
    if i.mods != ("b32",):
        raise not_understood(i)
    a, b, c_ = (columns.read(text, "b32") for text in i.operands[1:4])
    table = int(i.operands[4], 0)

    def compute(c: list) -> np.ndarray:
        x, y, z = c[a], c[b], c[c_]
        out = np.uint32(0)
        for k in range(8):
            if table >> k & 1:
                out = out | ((x if k & 4 else ~x) & (y if k & 2 else ~y) & (z if k & 1 else ~z))
        return out

    return assign(columns, i.operands[0], "b32", compute)
