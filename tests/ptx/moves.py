"""Moves between registers, of addresses between spaces, and of words into halves and back."""

import numpy as np

from .arithmetic import Run, assign, kind_of, makes, not_understood
from .columns import LOCAL, SHARED, Columns
from .kinds import KINDS, bits_of
from .parse import Instruction


@makes("mov")
def mov(i: Instruction, columns: Columns) -> Run:
    kind = kind_of(i)
    target, source = i.operands
    if target.startswith("{") or source.startswith("{"):
        return _pack(i, columns, kind)
    x, out = columns.read(source, kind), columns.write(target, kind)

    def run(c: list, where: object) -> None:
        np.copyto(c[out], c[x], where=where)

    return run


def _pack(i: Instruction, columns: Columns, kind: str) -> Run:
    """``mov.b64 {a, b}, c`` and the other way."""
    target, source = i.operands
    unpack = target.startswith("{")
    parts = [part.strip() for part in (target if unpack else source).strip("{}").split(",")]
    piece = bits_of(kind) // len(parts)
    if kind == "b128" or piece < 8:
        raise not_understood(i)
    whole, part_dtype, dtype = f"u{bits_of(kind)}", KINDS[f"u{piece}"], KINDS[f"u{bits_of(kind)}"]
    if unpack:
        x = columns.read(source, whole)
        outs = [columns.write(part, f"u{piece}") for part in parts]

        def run(c: list, where: object) -> None:
            value = np.atleast_1d(c[x]).copy().view(part_dtype)
            for k, out in enumerate(outs):
                np.copyto(c[out], value[k :: len(outs)], where=where)

        return run
    places = [columns.read(part, f"u{piece}") for part in parts]

    def compute(c: list) -> np.ndarray:
        value = c[places[0]].astype(dtype)
        for k, place in enumerate(places[1:], 1):
            value = value | (c[place].astype(dtype) << dtype.type(k * piece))
        return value

    return assign(columns, target, whole, compute)


@makes("cvta")
def cvta(i: Instruction, columns: Columns) -> Run:
    mods = [mod for mod in i.mods if mod != "to"]
    base = {"shared": SHARED, "local": LOCAL}.get(mods[0].split("::")[0], 0)
    if mods[-1] != "u64" or mods[0].split("::")[0] not in ("global", "shared", "local", "const", "param"):
        raise not_understood(i)
    x, shift_ = (
        columns.read(i.operands[1], "u64"),
        np.uint64(base if "to" not in i.mods else (1 << 64) - base & (1 << 64) - 1),
    )
    return assign(columns, i.operands[0], "u64", lambda c: c[x] + shift_)
