"""Instructions that work on registers alone, each made into one function of columns and of where they count.

``make(instruction, columns)`` gives ``run(c, where)``: ``c`` is the list of columns, ``where`` is True or says
for each thread whether its registers change.
"""

from collections.abc import Callable

import numpy as np

from . import ufuncs
from .columns import LOCAL, SHARED, Columns
from .fault import Fault
from .kinds import KINDS, bits_of, is_float
from .parse import Instruction
from .ufuncs import ufunc

Run = Callable[[list, object], None]
MAKE: dict[str, Callable[[Instruction, Columns], Run]] = {}
IGNORED_MODS = {"lo", "uni", "sync"}


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
    if not isinstance(function, np.ufunc):  # a compiled function, which knows no ``where``
        return assign(columns, i.operands[0], kind, lambda c: function(*(c[p] for p in places)))
    if "ftz" in i.mods and kind == "f32":
        return _flushed(function, places, out)
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

ROUNDING = ("rn", "ftz", "sat")


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


# -- bits


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


# -- choices and comparisons


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
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
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


@makes("setp", "set")
def setp(i: Instruction, columns: Columns) -> Run:
    mods = [mod for mod in i.mods if mod != "ftz"]
    how = mods.pop(0)
    boolean = mods.pop(0) if mods[0] in ("and", "or", "xor") else None
    kind = mods[-1]
    if kind in ("bf16", "f16x2", "bf16x2"):
        raise not_understood(i)
    target, _, second = i.operands[0].partition("|")
    compute = _comparison(i, columns, how, kind)
    if i.base == "set":
        if boolean or len(mods) != 2:
            raise not_understood(i)
        dtype = KINDS[mods[0]]
        truth = dtype.type(1) if dtype.kind == "f" else np.array(-1).astype(dtype)[()]
        return assign(columns, target, mods[0], lambda c: np.where(compute(c), truth, dtype.type(0)))
    if (
        not boolean
        and not second
        and ((how not in ("ne", "nan", "num") and not is_float(kind)) or how in COMPARE)
    ):
        if not (is_float(kind) and (how == "ne" or "ftz" in i.mods)):
            out, compare = columns.write(target, "pred"), COMPARE[how]
            x, y = (columns.read(text, kind) for text in i.operands[1:3])

            def run(c: list, where: object) -> None:
                compare(c[x], c[y], c[out], where=where)

            return run
    if not boolean:
        combine, p, opposite = None, 0, False
    else:
        combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[boolean]
        p, opposite = columns.predicate(i.operands[3])
    out = columns.write(target, "pred")
    other = columns.write(second, "pred") if second else None

    def run(c: list, where: object) -> None:
        value = compute(c)
        third = c[p] != opposite
        np.copyto(c[out], combine(value, third) if combine else value, where=where)
        if other is not None:
            np.copyto(c[other], combine(~value, third) if combine else ~value, where=where)

    return run


# -- moves


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
