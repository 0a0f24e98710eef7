"""ld, st, atom and red."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from . import checked as m
from .arithmetic import Run, not_understood
from .columns import Columns
from .kinds import KINDS, bits_of
from .parse import Instruction

SPACES = {"global": m.GLOBAL, "shared": m.SHARED, "local": m.LOCAL, "const": m.GLOBAL, "param": m.LOCAL}
ORDERED = {"relaxed", "acquire", "release", "acq_rel", "volatile", "mmio"}
HINTS = {
    "weak",
    "nc",
    "ca",
    "cg",
    "cs",
    "cv",
    "lu",
    "wb",
    "wt",
    "cta",
    "cluster",
    "gpu",
    "sys",
    "noftz",
    *ORDERED,
}
VECTORS = {"v2": 2, "v4": 4, "v8": 8}
_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+)|-\s*(\w+))?\s*\]")
ATOMICS = {"add": m.ADD, "min": m.MIN, "max": m.MAX, "exch": m.EXCH, "cas": m.CAS, "and": m.AND, "or": m.OR,
           "xor": m.XOR, "inc": m.INC, "dec": m.DEC}  # fmt: skip


class Access:
    """What an instruction says of the memory that it touches."""

    def __init__(self, i: Instruction, operand: str):
        *mods, self.kind = i.mods
        spaces = [mod.split("::")[0] for mod in mods if mod.split("::")[0] in SPACES]
        rest = [mod for mod in mods if mod.split("::")[0] not in SPACES]
        self.named = spaces[0] if spaces else None
        self.space = SPACES[spaces[0]] if spaces else m.GENERIC
        self.count = next((VECTORS[mod] for mod in rest if mod in VECTORS), 1)
        self.atomic = any(mod in ORDERED for mod in rest)
        self.operation = next((mod for mod in rest if mod in ATOMICS), None)
        known = {*HINTS, *VECTORS, *(ATOMICS if i.base in ("atom", "red") else ())}
        if self.kind not in KINDS or len(spaces) > 1:
            raise not_understood(i)
        if not all(mod in known or mod.startswith(("L1::", "L2::", "level::")) for mod in rest):
            raise not_understood(i)
        match = _ADDRESS.fullmatch(operand)
        if not match:
            raise not_understood(i)
        self.base = match[1]
        self.move = int(match[2], 0) if match[2] else -int(match[3], 0) if match[3] else 0
        self.size = KINDS[self.kind].itemsize

    @property
    def bytes(self) -> int:
        return self.size * self.count


def addresses(access: Access, columns: Columns) -> Callable[[list], np.ndarray]:
    """A function of the columns that gives the addresses, one for each thread."""
    width = columns.width(access.base)
    if width == 8:
        place = columns.read(access.base, "u64")
        return lambda c: c[place]
    place = columns.read(access.base, "u32" if width else "u64")
    return lambda c: np.array(np.broadcast_to(c[place], c[0].frame.threads), np.uint64)


def _elements(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{}").split(",")]


def smallest(code: list, spaces: tuple[int, ...]) -> int:
    """The bytes of the smallest access to spaces, at most 8: the unit in which races are looked for."""
    sizes = [8]
    for i in code:
        if isinstance(i, Instruction) and i.base in ("ld", "st", "atom", "red", "ldu"):
            operand = i.operands[1] if i.base in ("ld", "ldu", "atom") else i.operands[0]
            access = Access(i, operand)
            if access.space in (*spaces, m.GENERIC):
                sizes.append(access.bytes)
    return min(sizes)


def ld(i: Instruction, columns: Columns) -> tuple[Run, bool]:
    """The function, and whether it has to know exactly which threads are active."""
    access = Access(i, i.operands[1])
    targets = _elements(i.operands[0])
    if len(targets) != access.count:
        raise not_understood(i)
    outs = [columns.write(target, access.kind) for target in targets]
    if access.named == "param" and access.base in columns.params:
        return _load_param(access, columns, outs), False
    where_from, dtype, text = addresses(access, columns), KINDS[access.kind], i.text
    how = m.ATOMIC if access.atomic else m.READ
    move, size, count, space = np.uint64(access.move % (1 << 64)), access.size, access.count, access.space

    def run(c: list, active: np.ndarray) -> None:
        launch = c[0]
        launch.reserve(space, size * count)
        fault = m.load(
            active, where_from(c), move, size, count, launch.frame.words, space, how, *launch.memory
        )
        if fault[0]:
            raise launch.fault(fault, text, size * count)
        for k, out in enumerate(outs):
            np.copyto(c[out], launch.frame.low(k, dtype), where=active)

    return run, True


def _load_param(access: Access, columns: Columns, outs: list[int]) -> Run:
    first = columns.params[access.base][0] + access.move
    places = [columns.param(first + k * access.size, access.kind) for k in range(access.count)]

    def run(c: list, where: Any) -> None:
        for out, place in zip(outs, places, strict=True):
            np.copyto(c[out], c[place], where=where)

    return run


def st(i: Instruction, columns: Columns) -> tuple[Run, bool]:
    access = Access(i, i.operands[0])
    sources = [columns.read(part, f"u{bits_of(access.kind)}") for part in _elements(i.operands[1])]
    if len(sources) != access.count:
        raise not_understood(i)
    where_to, text = addresses(access, columns), i.text
    how = m.ATOMIC if access.atomic else m.WRITE
    move, size, count, space = np.uint64(access.move % (1 << 64)), access.size, access.count, access.space

    def run(c: list, active: np.ndarray) -> None:
        launch = c[0]
        launch.reserve(space, size * count)
        words = launch.frame.words
        for k, source in enumerate(sources):
            words[k] = c[source]
        fault = m.store(active, where_to(c), move, size, count, words, space, how, *launch.memory)
        if fault[0]:
            raise launch.fault(fault, text, size * count)

    return run, True


def atom(i: Instruction, columns: Columns) -> tuple[Run, bool]:
    """atom, and red, which gives nothing back."""
    operands = i.operands[1:] if i.base == "atom" else i.operands
    access = Access(i, operands[0])
    kind, size, space, text = access.kind, access.size, access.space, i.text
    floating = kind in ("f32", "f64")
    if (
        access.count != 1
        or access.operation is None
        or size not in (2, 4, 8)
        or (kind[0] in "f" and not floating)
    ):
        raise not_understood(i)
    if (floating or size == 2) and access.operation not in (("add", "exch") if floating else ("cas", "exch")):
        raise not_understood(i)
    if "bf16" in kind or "x2" in kind or len(operands) != (3 if access.operation == "cas" else 2):
        raise not_understood(i)
    sources = [columns.read(text_, f"u{8 * size}") for text_ in operands[1:]]
    out = columns.write(i.operands[0], f"u{8 * size}") if i.base == "atom" else None
    where_to, what, dtype = addresses(access, columns), ATOMICS[access.operation], KINDS[f"u{8 * size}"]
    sort = m.FLOAT if floating else m.SIGNED if kind[0] == "s" else m.UNSIGNED
    move = np.uint64(access.move % (1 << 64))

    def run(c: list, active: np.ndarray) -> None:
        launch = c[0]
        launch.reserve(space, size)
        words = launch.frame.words
        for k, source in enumerate(sources):
            words[1 + k] = c[source]
        fault = m.atomic(
            active, where_to(c), move, size, what, sort, words[1], words[2], words[0], space, *launch.memory
        )
        if fault[0]:
            raise launch.fault(fault, text, size)
        if out is not None:
            np.copyto(c[out], launch.frame.low(0, dtype), where=active)

    return run, True
