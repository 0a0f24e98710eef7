"""Instructions on whole numbers, against Python's."""

import numpy as np
import pytest

from ptx.kinds import KINDS, bits_of
from ptx.programs import combinations, compute, same


def expected(function, kind, columns):
    """``function`` of Python's integers, modulo the width of ``kind``."""
    rows = zip(*(column.tolist() for _, column in columns), strict=True)
    mask = (1 << bits_of(kind)) - 1
    words = np.array([function(*row) & mask for row in rows], np.uint64)
    return words.astype(f"u{KINDS[kind].itemsize}").view(KINDS[kind])


def towards_zero(x, y):
    quotient = abs(x) // abs(y)
    return quotient if (x < 0) == (y < 0) else -quotient


def check(instruction, out, kinds, function, where=None):
    columns = combinations(*kinds)
    if where is not None:
        chosen = [where(*row) for row in zip(*(column.tolist() for _, column in columns), strict=True)]
        columns = [(kind, column[chosen]) for kind, column in columns]
    operands = ", ".join(f"%x{k}" for k in range(len(kinds)))
    same(compute(f"{instruction} %y, {operands};", out, *columns), expected(function, out, columns))


WHOLE = ["u16", "s16", "u32", "s32", "u64", "s64"]
TWO = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul.lo": lambda x, y: x * y,
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("name", TWO)
def test_two_operands(name, kind):
    check(f"{name}.{kind}", kind, [kind, kind], TWO[name])


@pytest.mark.parametrize("kind", WHOLE)
def test_products(kind):
    bits = bits_of(kind)
    check(f"mul.hi.{kind}", kind, [kind, kind], lambda x, y: x * y >> bits)
    check(f"mad.lo.{kind}", kind, [kind] * 3, lambda x, y, z: x * y + z)
    check(f"mad.hi.{kind}", kind, [kind] * 3, lambda x, y, z: (x * y >> bits) + z)
    if bits < 64:
        wide = f"{kind[0]}{2 * bits}"
        check(f"mul.wide.{kind}", wide, [kind, kind], lambda x, y: x * y)
        check(f"mad.wide.{kind}", wide, [kind, kind, wide], lambda x, y, z: x * y + z)


@pytest.mark.parametrize("kind", WHOLE)
def test_quotients(kind):
    check(f"div.{kind}", kind, [kind, kind], towards_zero, lambda x, y: y != 0)
    check(f"rem.{kind}", kind, [kind, kind], lambda x, y: x - y * towards_zero(x, y), lambda x, y: y != 0)


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_signs(kind):
    check(f"abs.{kind}", kind, [kind], abs)
    check(f"neg.{kind}", kind, [kind], lambda x: -x)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_logic(kind):
    check(f"and.{kind}", kind, [kind, kind], lambda x, y: x & y)
    check(f"or.{kind}", kind, [kind, kind], lambda x, y: x | y)
    check(f"xor.{kind}", kind, [kind, kind], lambda x, y: x ^ y)
    check(f"not.{kind}", kind, [kind], lambda x: ~x)


@pytest.mark.parametrize("kind", WHOLE)
def test_shifts(kind):
    bits = bits_of(kind)
    check(f"shr.{kind}", kind, [kind, "u32"], lambda x, n: x >> min(n, bits))
    check(f"shl.b{bits}", kind, [kind, "u32"], lambda x, n: x << min(n, bits))
    for n in (0, 5, bits - 1, bits, bits + 1, 200):
        columns = combinations(kind)
        same(
            compute(f"shr.{kind} %y, %x0, {n};", kind, *columns),
            expected(lambda x, n=n: x >> n, kind, columns),
        )
        same(
            compute(f"shl.b{bits} %y, %x0, {n};", kind, *columns),
            expected(lambda x, n=n: x << n, kind, columns),
        )


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shifts(mode):
    def by(n):
        return n % 32 if mode == "wrap" else min(n, 32)

    kinds = ["b32", "b32", "u32"]
    check(f"shf.l.{mode}.b32", "b32", kinds, lambda x, y, n: ((y << 32 | x) << by(n)) >> 32)
    check(f"shf.r.{mode}.b32", "b32", kinds, lambda x, y, n: (y << 32 | x) >> by(n))


def field(x, first, count, bits, signed):
    first, count = first & 255, count & 255
    word = x & ((1 << bits) - 1)
    out = 0
    for k in range(bits):
        at = first + k if k < count and first + k < bits else min(first + count - 1, bits - 1)
        bit = word >> at & 1 if count else 0
        if not signed and not (k < count and first + k < bits):
            bit = 0
        out |= bit << k
    return out


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind):
    bits, signed = bits_of(kind), kind[0] == "s"
    check(f"bfe.{kind}", kind, [kind, "u32", "u32"], lambda x, p, n: field(x, p, n, bits, signed))


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_bit_field_insertion(kind):
    bits = bits_of(kind)

    def insert(a, b, first, count):
        mask = ((1 << (count & 255)) - 1) << (first & 255)
        return (a << (first & 255)) & mask | b & ~mask

    check(f"bfi.{kind}", kind, [kind, kind, "u32", "u32"], lambda *row: insert(*row) & ((1 << bits) - 1))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_highest_bits(kind):
    bits, signed = bits_of(kind), kind[0] == "s"

    def highest(x):
        length = (~x if x < 0 else x).bit_length()
        return length - 1

    check(f"bfind.{kind}", "u32", [kind], highest)
    check(f"bfind.shiftamt.{kind}", "u32", [kind], lambda x: bits - 1 - highest(x) if highest(x) >= 0 else -1)
    if not signed:
        check(f"clz.b{bits}", "u32", [kind], lambda x: bits - x.bit_length())
        check(f"popc.b{bits}", "u32", [kind], lambda x: x.bit_count())
        check(f"brev.b{bits}", kind, [kind], lambda x: int(f"{x:0{bits}b}"[::-1], 2))


def test_permutations():
    def permuted(a, b, c):
        whole, out = b << 32 | a, 0
        for k in range(4):
            pick = c >> 4 * k & 15
            byte = whole >> 8 * (pick & 7) & 255
            out |= (byte if pick < 8 else 255 * (byte >> 7)) << 8 * k
        return out

    check("prmt.b32", "b32", ["b32", "b32", "b32"], permuted)


@pytest.mark.parametrize("table", [0x00, 0x80, 0xEA, 0x96, 0xE8, 0xFF])
def test_logic_of_three(table):
    def looked_up(a, b, c):
        return sum(
            (table >> ((a >> k & 1) << 2 | (b >> k & 1) << 1 | (c >> k & 1)) & 1) << k for k in range(32)
        )

    columns = combinations("b32", "b32", "b32")
    same(
        compute(f"lop3.b32 %y, %x0, %x1, %x2, {table};", "b32", *columns), expected(looked_up, "b32", columns)
    )


@pytest.mark.parametrize("bits", [32, 64])
def test_carries(bits):
    """Numbers of twice the width, whose halves are added one after the other."""
    mask = (1 << bits) - 1
    columns = combinations(*[f"u{bits}"] * 4)
    for name, function in (("add", lambda x, y: x + y), ("sub", lambda x, y: x - y)):
        body = f"{name}.cc.u{bits} %low, %x0, %x2; {name}c.u{bits} %y, %x1, %x3;"
        body = f".reg .b{bits} %low;\n{body}"
        rows = expected(
            lambda a, b, c, d, f=function: f(b << bits | a, d << bits | c) >> bits & mask, f"u{bits}", columns
        )
        same(compute(body, f"u{bits}", *columns), rows)


def test_products_with_carries():
    columns = combinations("u32", "u32", "u32", "u32")
    body = ".reg .b32 %low;\nmad.lo.cc.u32 %low, %x0, %x1, %x2; madc.hi.u32 %y, %x0, %x1, %x3;"
    rows = expected(lambda a, b, c, d: (a * b + (d << 32 | c)) >> 32, "u32", columns)
    same(compute(body, "u32", *columns), rows)


COMPARISONS = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("how", COMPARISONS)
def test_comparisons(how, kind):
    function = COMPARISONS[how]
    columns = combinations(kind, kind)
    body = f"setp.{how}.{kind} %p0, %x0, %x1; selp.u32 %y, 1, 0, %p0;"
    same(compute(body, "u32", *columns), expected(function, "u32", columns))
    body = f"set.{how}.u32.{kind} %y, %x0, %x1;"
    same(compute(body, "u32", *columns), expected(lambda x, y: -int(function(x, y)), "u32", columns))


@pytest.mark.parametrize("how", ["lo", "ls", "hi", "hs"])
def test_comparisons_of_the_unsigned(how):
    function = COMPARISONS[{"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}[how]]
    columns = combinations("u32", "u32")
    body = f"setp.{how}.u32 %p0, %x0, %x1; selp.u32 %y, 1, 0, %p0;"
    same(compute(body, "u32", *columns), expected(function, "u32", columns))


@pytest.mark.parametrize("boolean", ["and", "or", "xor"])
def test_comparisons_that_are_combined(boolean):
    columns = combinations("s32", "s32", "s32")
    body = (
        "setp.gt.s32 %p2, %x2, 0;"
        f"setp.lt.{boolean}.s32 %p0|%p1, %x0, %x1, !%p2;"
        "selp.u32 %r1, 1, 0, %p0; selp.u32 %y, 2, 0, %p1; or.b32 %y, %y, %r1;"
    )
    combine = {"and": lambda x, y: x and y, "or": lambda x, y: x or y, "xor": lambda x, y: x != y}[boolean]

    def both(x, y, z):
        return combine(x < y, not z > 0) + 2 * combine(not x < y, not z > 0)

    same(compute(body, "u32", *columns), expected(both, "u32", columns))


def test_choices():
    columns = combinations("s32", "s64", "s64")
    body = "setp.gt.s32 %p0, %x0, 3; selp.b64 %y, %x1, %x2, %p0;"
    same(compute(body, "s64", *columns), expected(lambda x, y, z: y if x > 3 else z, "s64", columns))
    body = "slct.s64.s32 %y, %x1, %x2, %x0;"
    same(compute(body, "s64", *columns), expected(lambda x, y, z: y if x >= 0 else z, "s64", columns))


def test_predicates_have_arithmetic_of_their_own():
    columns = combinations("s32", "s32")
    body = (
        "setp.gt.s32 %p0, %x0, 3; setp.lt.s32 %p1, %x1, 9; and.pred %p2, %p0, %p1; or.pred %p3, %p0, %p1;"
        "xor.pred %p4, %p2, %p3; not.pred %p4, %p4; selp.u32 %y, 1, 0, %p4;"
    )
    rows = expected(lambda x, y: not ((x > 3 and y < 9) ^ (x > 3 or y < 9)), "u32", columns)
    same(compute(body, "u32", *columns), rows)


def test_words_are_packed_and_unpacked():
    columns = combinations("u32", "u32")
    same(
        compute("mov.b64 %y, {%x0, %x1};", "u64", *columns),
        expected(lambda x, y: y << 32 | x, "u64", columns),
    )
    columns = combinations("u64")
    same(compute("mov.b64 {%r0, %y}, %x0;", "u32", *columns), expected(lambda x: x >> 32, "u32", columns))
    same(
        compute("mov.b64 {%rs0, %rs1, %rs2, %rs3}, %x0; mov.b16 %y, %rs2;", "u16", *columns),
        expected(lambda x: x >> 32, "u16", columns),
    )


def test_guards_say_whose_registers_change():
    columns = combinations("s32", "s32")
    body = "setp.lt.s32 %p0, %x0, %x1; mov.u32 %y, 5; @%p0 add.s32 %y, %y, 1; @!%p0 mul.lo.s32 %y, %y, 7;"
    same(compute(body, "s32", *columns), expected(lambda x, y: 6 if x < y else 35, "s32", columns))
