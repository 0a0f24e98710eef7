"""Instructions that work on registers alone, each made into one function of columns; first, arithmetic.

``make(instruction, columns)`` gives ``run(c, where)``: ``c`` is the list of columns, ``where`` is True or
says for each thread whether its registers change.
"""

from collections.abc import Callable

import numpy as np

from . import ufuncs
from .columns import Columns
from .fault import Fault
from .kinds import KINDS, bits_of, is_float
from .parse import Instruction
from .ufuncs import ufunc

Run = Callable[[list, object], None]
MAKE: dict[str, Callable[[Instruction, Columns], Run]] = {}


def makes(*names: str) -> Callable:
    def register(function: Callable) -> Callable:
        MAKE.update(dict.fromkeys(names, function))
        return function

    return register


def not_understood(i: Instruction) -> Fault:
    return Fault(f"not understood: {i.text}")


def kind_of(i: Instruction, *allowed: str) -> str:
    """The type of an instruction of one type; anything beside it has to be in ``allowed``."""
    *rest, kind = i.mods
    if kind not in KINDS or any(mod not in allowed for mod in rest):
        raise not_understood(i)
    return kind


def assign(columns: Columns, text: str, kind: str, compute: Callable[[list], np.ndarray]) -> Run:
    """Write what ``compute`` makes of the columns."""
    out = columns.write(text, kind)
    dtype = KINDS[kind]

    def run(c: list, where: object) -> None:
        np.copyto(c[out], np.asarray(compute(c), dtype), where=where)

    return run


def apply(columns: Columns, i: Instruction, function: np.ufunc, kind: str, count: int) -> Run:
    """A ufunc of ``count`` operands of a type, written in place."""
    places = [columns.read(text, kind) for text in i.operands[1 : count + 1]]
    out = columns.write(i.operands[0], kind)
    if "ftz" in i.mods and kind == "f32":
        return _flushed(function, places, out)
    if not isinstance(function, np.ufunc):  # a compiled function, which knows no ``where``
        return assign(columns, i.operands[0], kind, lambda c: function(*(c[p] for p in places)))
    if count == 1:
        (x,) = places

        def run(c: list, where: object) -> None:
            function(c[x], out=c[out], where=where)

    elif count == 2:
        x, y = places

        def run(c: list, where: object) -> None:
            function(c[x], c[y], out=c[out], where=where)

    else:
        x, y, z = places

        def run(c: list, where: object) -> None:
            function(c[x], c[y], c[z], out=c[out], where=where)

    return run


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers become zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).smallest_normal, np.copysign(np.float32(0), x), x)


def _flushed(function: Callable, places: list[int], out: int) -> Run:
    def run(c: list, where: object) -> None:
        np.copyto(c[out], flush(function(*(flush(c[p]) for p in places))), where=where)

    return run


# -- sums, products, quotients


@makes("add", "sub")
def add(i: Instruction, columns: Columns) -> Run:
    if "cc" in i.mods:
        return _carry(i, columns)
    kind = kind_of(i, "rn", "ftz")
    if kind in ("bf16", "f16x2", "bf16x2"):
        raise not_understood(i)
    return apply(columns, i, np.add if i.base == "add" else np.subtract, kind, 2)


@makes("addc", "subc")
def _carry(i: Instruction, columns: Columns) -> Run:
    """Sums with a carry, which is a register that no text names."""
    kind = kind_of(i, "cc")
    bits = bits_of(kind)
    unsigned = f"u{bits}"
    x, y = (columns.read(text, unsigned) for text in i.operands[1:3])
    out, flag = columns.write(i.operands[0], unsigned), columns.write("%cc", "pred")
    takes, subtracts, sets = i.base.endswith("c"), i.base.startswith("sub"), "cc" in i.mods
    zero, one = KINDS[unsigned].type(0), KINDS[unsigned].type(1)

    def run(c: list, where: object) -> None:
        a, b = c[x], c[y]
        carry = np.where(c[flag], one, zero) if takes else zero
        if subtracts:
            total = a - b - carry
            over = (a < b) | ((a == b) & (carry != 0))
        else:
            total = a + b + carry
            over = (total < a) | ((carry != 0) & (total == a))
        np.copyto(c[out], total, where=where)
        if sets:
            np.copyto(c[flag], over, where=where)

    return run


def high(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The upper half of a product."""
    dtype = np.asarray(x).dtype
    if dtype.itemsize == 8:
        return ufunc(ufuncs.high_signed if dtype.kind == "i" else ufuncs.high_unsigned)(x, y)
    wide = np.int64 if dtype.kind == "i" else np.uint64
    product = np.asarray(x).astype(wide) * np.asarray(y).astype(wide)
    return (product >> wide(8 * dtype.itemsize)).astype(dtype)


def _double(kind: str) -> str:
    return f"{kind[0]}{2 * bits_of(kind)}"


@makes("mul", "mad")
def mul(i: Instruction, columns: Columns) -> Run:
    kind = kind_of(i, "lo", "hi", "wide", "rn", "ftz", "cc")
    if is_float(kind):
        if i.base == "mad":
            return fma(i, columns)
        if kind not in ("f16", "f32", "f64"):
            raise not_understood(i)
        return apply(columns, i, np.multiply, kind, 2)
    if i.base == "mad":
        return _mad(i, columns, kind)
    x, y = (columns.read(text, kind) for text in i.operands[1:3])
    if "wide" in i.mods:
        dtype = KINDS[_double(kind)]
        return assign(columns, i.operands[0], _double(kind), lambda c: np.multiply(c[x], c[y], dtype=dtype))
    if "hi" in i.mods:
        return assign(columns, i.operands[0], kind, lambda c: high(c[x], c[y]))
    return apply(columns, i, np.multiply, kind, 2)


@makes("madc")
def _mad_carry(i: Instruction, columns: Columns) -> Run:
    return _mad(i, columns, kind_of(i, "lo", "hi", "cc"))


def _mad(i: Instruction, columns: Columns, kind: str) -> Run:
    x, y = (columns.read(text, kind) for text in i.operands[1:3])
    if "wide" in i.mods:
        dtype = KINDS[_double(kind)]
        z = columns.read(i.operands[3], _double(kind))
        return assign(
            columns, i.operands[0], _double(kind), lambda c: np.multiply(c[x], c[y], dtype=dtype) + c[z]
        )
    product = high if "hi" in i.mods else np.multiply
    if "cc" in i.mods or i.base == "madc":
        unsigned = f"u{bits_of(kind)}"
        scratch = "%product" + unsigned
        first = assign(columns, scratch, kind, lambda c: product(c[x], c[y]))
        mods = (*(("cc",) if "cc" in i.mods else ()), unsigned)
        base = "addc" if i.base == "madc" else "add"
        second = _carry(
            Instruction(None, False, base, mods, [i.operands[0], scratch, i.operands[3]], i.text), columns
        )

        def run(c: list, where: object) -> None:
            first(c, where)
            second(c, where)

        return run
    z = columns.read(i.operands[3], kind)
    return assign(columns, i.operands[0], kind, lambda c: product(c[x], c[y]) + c[z])


@makes("fma")
def fma(i: Instruction, columns: Columns) -> Run:
    kind = kind_of(i, "rn", "ftz")
    if kind not in ("f32", "f64"):
        raise not_understood(i)
    return apply(columns, i, ufunc(ufuncs.fma), kind, 3)


def _quotient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Towards 0; whatever a division by 0 gives."""
    return (x - np.fmod(x, y)) // y


@makes("div")
def div(i: Instruction, columns: Columns) -> Run:
    kind = kind_of(i, "rn", "ftz", "approx", "full")
    if kind in ("f32", "f64"):
        return apply(columns, i, np.divide, kind, 2)
    x, y = (columns.read(text, kind) for text in i.operands[1:3])
    divide = _quotient if kind[0] == "s" else np.floor_divide
    return assign(columns, i.operands[0], kind, lambda c: divide(c[x], c[y]))


@makes("rem")
def rem(i: Instruction, columns: Columns) -> Run:
    return apply(columns, i, np.fmod, kind_of(i), 2)


@makes("min", "max")
def min_max(i: Instruction, columns: Columns) -> Run:
    kind = kind_of(i, "ftz", "NaN")
    if kind not in ("f32", "f64"):
        if is_float(kind):
            raise not_understood(i)
        return apply(columns, i, np.minimum if i.base == "min" else np.maximum, kind, 2)
    pick = ufunc(ufuncs.fmin if i.base == "min" else ufuncs.fmax)
    if "NaN" not in i.mods:
        return apply(columns, i, pick, kind, 2)
    x, y = (columns.read(text, kind) for text in i.operands[1:3])
    nan = KINDS[kind].type(np.nan)
    return assign(
        columns,
        i.operands[0],
        kind,
        lambda c: np.where(np.isnan(c[x]) | np.isnan(c[y]), nan, pick(c[x], c[y])),
    )


@makes("abs", "neg", "not", "sqrt")
def one(i: Instruction, columns: Columns) -> Run:
    allowed = {"sqrt": ("rn", "ftz", "approx")}.get(i.base, ("ftz",))
    kind = kind_of(i, *allowed)
    if kind in ("bf16", "f16x2", "bf16x2") or (i.base in ("abs", "neg") and kind[0] not in "sf"):
        raise not_understood(i)
    function = {"abs": np.abs, "neg": np.negative, "not": np.invert, "sqrt": np.sqrt}[i.base]
    return apply(columns, i, function, kind, 1)


APPROXIMATE = {
    "rcp": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@makes(*APPROXIMATE)
def approximate(i: Instruction, columns: Columns) -> Run:
    """Computed in double precision and rounded: more exact than a GPU, whose error is bounded alone."""
    kind = kind_of(i, "approx", "ftz", *(["rn"] if i.base == "rcp" else []))
    x, function, dtype = columns.read(i.operands[1], kind), APPROXIMATE[i.base], KINDS[kind]
    if kind not in ("f32", "f64"):
        raise not_understood(i)
    if "rn" in i.mods and kind == "f32":
        function = lambda x: np.float32(1) / x.astype(np.float32)  # noqa: E731
    flushes = "ftz" in i.mods and kind == "f32"

    def compute(c: list) -> np.ndarray:
        value = flush(c[x]) if flushes else c[x]
        value = function(np.asarray(value, np.float64)).astype(dtype)
        return flush(value) if flushes else value

    return assign(columns, i.operands[0], kind, compute)


@makes("copysign")
def copysign(i: Instruction, columns: Columns) -> Run:
    kind = kind_of(i)
    sign, x = (columns.read(text, kind) for text in i.operands[1:3])
    return assign(columns, i.operands[0], kind, lambda c: np.copysign(c[x], c[sign]))


@makes("testp")
def testp(i: Instruction, columns: Columns) -> Run:
    how, kind = i.mods
    x, tiny = columns.read(i.operands[1], kind), np.finfo(KINDS[kind]).smallest_normal
    test = {
        "finite": np.isfinite, "infinite": np.isinf, "number": lambda x: ~np.isnan(x), "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (np.abs(x) < tiny) & (x != 0),
    }[how]  # fmt: skip
    return assign(columns, i.operands[0], "pred", lambda c: test(c[x]))
