"""Comparisons, and instructions that choose between values."""

from collections.abc import Callable

import numpy as np

from .arithmetic import Run, assign, flush, kind_of, makes, not_understood
from .columns import Columns
from .kinds import KINDS, is_float
from .parse import Instruction


@makes("selp")
def selp(i: Instruction, columns: Columns) -> Run:
    kind = kind_of(i)
    x, y = (columns.read(text, kind) for text in i.operands[1:3])
    p, opposite = columns.predicate(i.operands[3])
    if opposite:
        x, y = y, x
    return assign(columns, i.operands[0], kind, lambda c: np.where(c[p], c[x], c[y]))


@makes("slct")
def slct(i: Instruction, columns: Columns) -> Run:
    kind, by = (mod for mod in i.mods if mod != "ftz")
    x, y = (columns.read(text, kind) for text in i.operands[1:3])
    sign = columns.read(i.operands[3], by)
    return assign(columns, i.operands[0], kind, lambda c: np.where(c[sign] >= 0, c[x], c[y]))


COMPARE = {
    "eq": np.equal, "ne": np.not_equal,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _comparison(i: Instruction, columns: Columns, how: str, kind: str) -> Callable[[list], np.ndarray]:
    x, y = (columns.read(text, kind) for text in i.operands[1:3])
    flushes = "ftz" in i.mods and kind == "f32"
    if flushes:
        values = lambda c: (flush(c[x]), flush(c[y]))  # noqa: E731
    else:
        values = lambda c: (c[x], c[y])  # noqa: E731
    if how in ("nan", "num"):
        return lambda c: (np.isnan(c[x]) | np.isnan(c[y])) == (how == "nan")
    if is_float(kind) and how == "ne":  # of NumPy's comparisons this alone holds of a NaN
        return lambda c: np.less(*values(c)) | np.greater(*values(c))
    if is_float(kind) and how.endswith("u") and len(how) == 3:
        compare = COMPARE[how[:2]]
        return lambda c: compare(*values(c)) | np.isnan(c[x]) | np.isnan(c[y])
    compare = COMPARE[how]
    return lambda c: compare(*values(c))


@makes("set")
def set_(i: Instruction, columns: Columns) -> Run:
    how, to, kind = (mod for mod in i.mods if mod != "ftz")
    compute, dtype = _comparison(i, columns, how, kind), KINDS[to]
    truth = dtype.type(1) if dtype.kind == "f" else np.array(-1).astype(dtype)[()]
    return assign(columns, i.operands[0], to, lambda c: np.where(compute(c), truth, dtype.type(0)))


@makes("setp")
def setp(i: Instruction, columns: Columns) -> Run:
    how, *boolean, kind = (mod for mod in i.mods if mod != "ftz")
    target, _, second = i.operands[0].partition("|")
    if kind in ("bf16", "f16x2", "bf16x2") or len(i.operands) != 3 + len(boolean):
        raise not_understood(i)
    if boolean or second or is_float(kind):
        return _general(i, columns, _comparison(i, columns, how, kind), boolean, target, second)
    out, compare = columns.write(target, "pred"), COMPARE[how]
    x, y = (columns.read(text, kind) for text in i.operands[1:3])

    def run(c: list, where: object) -> None:
        compare(c[x], c[y], out=c[out], where=where)

    return run


def _general(
    i: Instruction, columns: Columns, compute: Callable, boolean: list[str], target: str, second: str
) -> Run:
    """A comparison that another predicate is combined with, or whose opposite is kept as well."""
    out = columns.write(target, "pred")
    other = columns.write(second, "pred") if second else None
    combine, p, opposite = None, 0, False
    if boolean:
        (name,) = boolean
        combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[name]
        p, opposite = columns.predicate(i.operands[3])

    def run(c: list, where: object) -> None:
        value = compute(c)
        third = c[p] != opposite if combine else None
        np.copyto(c[out], combine(value, third) if combine else value, where=where)
        if other is not None:
            np.copyto(c[other], combine(~value, third) if combine else ~value, where=where)

    return run
