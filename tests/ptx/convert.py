"""cvt: from one type to another."""

from collections.abc import Callable

import numpy as np

from .arithmetic import Run, assign, flush, makes, not_understood
from .columns import Columns
from .kinds import KINDS, bits_of, is_float
from .parse import Instruction

INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
DIRECTED = ("rz", "rm", "rp")
Convert = Callable[[np.ndarray], np.ndarray]


@makes("cvt")
def cvt(i: Instruction, columns: Columns) -> Run:
    *how, to, source = i.mods
    if any(mod not in ("rn", "ftz", "sat", *DIRECTED, *INTEGRAL) for mod in how):
        raise not_understood(i)
    if to in ("f16x2", "bf16x2"):
        return _pair(i, columns, how, to[:-2], source)
    x = columns.read(i.operands[1], source)
    convert = _conversion(i, how, to, source)
    return assign(columns, i.operands[0], to, lambda c: convert(np.asarray(c[x])))


def _pair(i: Instruction, columns: Columns, how: list[str], to: str, source: str) -> Run:
    """Two numbers become the two halves of a word, the first the upper one."""
    if source != "f32":
        raise not_understood(i)
    upper, lower = (columns.read(text, source) for text in i.operands[1:3])
    convert = _conversion(i, how, to, source)

    def half(x: np.ndarray) -> np.ndarray:
        return convert(np.asarray(x)).view(np.uint16).astype(np.uint32)

    return assign(columns, i.operands[0], "b32", lambda c: (half(c[upper]) << np.uint32(16)) | half(c[lower]))


def _conversion(i: Instruction, how: list[str], to: str, source: str) -> Convert:
    """The conversion of an array."""
    if source == "bf16":
        if to != "f32":
            raise not_understood(i)
        return lambda x: (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if to == "bf16":
        if source != "f32" or "sat" in how or not {"rn", "rz"} & {*how}:
            raise not_understood(i)
        return lambda x: bfloat16(x, "rn" in how)
    if not is_float(to):
        return _to_integer(i, how, to, source) if is_float(source) else _between_integers(how, to, source)
    return _to_float(how, to, source)


def bfloat16(x: np.ndarray, nearest: bool) -> np.ndarray:
    """The bits of float32 numbers as bfloat16, to nearest and ties to even, or towards 0."""
    bits = x.view(np.uint32)
    half = np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) if nearest else np.uint32(0)
    rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def _between_integers(how: list[str], to: str, source: str) -> Convert:
    dtype = KINDS[to]
    if "sat" not in how:
        return lambda x: x.astype(dtype)
    low = max(np.iinfo(dtype).min, np.iinfo(KINDS[source]).min)
    high = min(np.iinfo(dtype).max, np.iinfo(KINDS[source]).max)
    return lambda x: np.clip(x, KINDS[source].type(low), KINDS[source].type(high)).astype(dtype)


def _to_integer(i: Instruction, how: list[str], to: str, source: str) -> Convert:
    """What lies outside becomes the nearest number there is; a NaN becomes 0, or the top bit of 64."""
    rounds = [INTEGRAL[mod] for mod in how if mod in INTEGRAL]
    if len(rounds) != 1:
        raise not_understood(i)
    (round_,), dtype = rounds, KINDS[to]
    info = np.iinfo(dtype)
    nan = dtype.type(0)
    if source == "f64" or bits_of(to) == 64:
        nan = dtype.type(info.min if dtype.kind == "i" else 1 << (bits_of(to) - 1))
    flushes = "ftz" in how and source == "f32"

    def convert(x: np.ndarray) -> np.ndarray:
        value = round_((flush(x) if flushes else x).astype(np.float64))
        above, below, none = value >= float(info.max) + 1.0, value < float(info.min), np.isnan(value)
        out = np.where(above | below | none, 0.0, value).astype(dtype)
        return np.where(none, nan, np.where(above, info.max, np.where(below, info.min, out)).astype(dtype))

    return convert


def _to_float(how: list[str], to: str, source: str) -> Convert:
    dtype = KINDS[to]
    integral = [INTEGRAL[mod] for mod in how if mod in INTEGRAL]
    directed = [mod for mod in how if mod in DIRECTED]
    flushes = "ftz" in how

    def convert(x: np.ndarray) -> np.ndarray:
        if flushes and source == "f32":
            x = flush(x)
        if integral:
            x = integral[0](x)
        y = x.astype(dtype)
        if directed:
            y = _towards(x, y, directed[0])
        if "sat" in how:
            y = np.where(np.isnan(y), dtype.type(0), np.clip(y, dtype.type(0), dtype.type(1)))
        return flush(y) if flushes and to == "f32" else y

    return convert


def _towards(x: np.ndarray, y: np.ndarray, how: str) -> np.ndarray:
    """``x`` rounded in one direction, ``y`` being the nearest: a step back where that went the other way."""
    exact, near = x.astype(np.longdouble), y.astype(np.longdouble)
    infinity = y.dtype.type(np.inf)
    down = (how == "rm") | ((how == "rz") & (exact > 0))
    up = (how == "rp") | ((how == "rz") & (exact < 0))
    y = np.where(down & (near > exact), np.nextafter(y, -infinity), y)
    return np.where(up & (near < exact), np.nextafter(y, infinity), y)
