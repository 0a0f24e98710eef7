"""Instructions on floating-point numbers: .rn arithmetic against exact fractions, bit for bit."""

from fractions import Fraction

import numpy as np
import pytest

from ptx.kinds import KINDS, bits_of
from ptx.programs import combinations, compute, extremes, kernel, run, same

REAL = ["f32", "f64"]


def nearest(exact, dtype):
    """A fraction as the nearest number of a type, ties to even."""
    largest = Fraction(float(np.finfo(dtype).max))
    step = largest - Fraction(float(np.nextafter(np.finfo(dtype).max, dtype(0))))
    if abs(exact) >= largest + step / 2:
        return dtype(np.inf) if exact > 0 else dtype(-np.inf)
    guess = dtype(float(exact)) if abs(exact) <= largest else np.finfo(dtype).max * (1 if exact > 0 else -1)
    with np.errstate(over="ignore"):
        near = [np.nextafter(guess, dtype(-np.inf)), guess, np.nextafter(guess, dtype(np.inf))]
    near = [x for x in near if np.isfinite(x)]
    word = f"u{np.dtype(dtype).itemsize}"
    return min(near, key=lambda x: (abs(Fraction(float(x)) - exact), int(np.array(x).view(word)) & 1))


def rounded(function, kind, columns):
    """What a function of fractions gives; for numbers that are none what NumPy says, which is exact."""
    dtype = KINDS[kind].type
    out = []
    for row in zip(*(column for _, column in columns), strict=True):
        with np.errstate(all="ignore"):
            plain = function(*(np.float64(x) for x in row))
        finite = all(np.isfinite(x) for x in row)
        exact = None
        if finite:
            try:
                exact = function(*(Fraction(float(x)) for x in row))
            except ZeroDivisionError:
                exact = None
        if not exact:  # a zero's sign, an infinity or a NaN
            out.append(dtype(plain) if exact is None else dtype(np.copysign(0.0, plain)))
        else:
            value = nearest(exact, dtype)
            out.append(value if value else dtype(np.copysign(0.0, 1 if exact > 0 else -1)))
    return np.array(out, KINDS[kind])


@pytest.mark.parametrize("kind", ["f16", *REAL])
@pytest.mark.parametrize(
    ("name", "function"),
    [("add", lambda x, y: x + y), ("sub", lambda x, y: x - y), ("mul", lambda x, y: x * y)],
    ids=["add", "sub", "mul"],
)
def test_sums_and_products(name, function, kind):
    columns = combinations(kind, kind)
    for rn in ("", ".rn"):
        same(compute(f"{name}{rn}.{kind} %y, %x0, %x1;", kind, *columns), rounded(function, kind, columns))


@pytest.mark.parametrize("kind", REAL)
def test_quotients(kind):
    columns = combinations(kind, kind)
    same(compute(f"div.rn.{kind} %y, %x0, %x1;", kind, *columns), rounded(lambda x, y: x / y, kind, columns))
    columns = combinations(kind)
    same(compute(f"rcp.rn.{kind} %y, %x0;", kind, *columns), rounded(lambda x: 1 / x, kind, columns))


@pytest.mark.parametrize("kind", REAL)
def test_fused_products(kind):
    (_, x), (_, y), (_, z) = columns = [(k, c[:1200]) for k, c in combinations(kind, kind, kind)]
    got = compute(f"fma.rn.{kind} %y, %x0, %x1, %x2;", kind, *columns)
    dtype = KINDS[kind].type
    for row in zip(x, y, z, got, strict=True):
        *inputs, value = row
        if all(np.isfinite(inputs)):
            a, b, c = (Fraction(float(v)) for v in inputs)
            if a * b + c:
                assert value == nearest(a * b + c, dtype), row
            else:
                assert value == 0
        else:
            with np.errstate(all="ignore"):
                plain = np.float64(inputs[0]) * np.float64(inputs[1]) + np.float64(inputs[2])
            if np.isfinite(inputs[0]) and np.isfinite(
                inputs[1]
            ):  # the product is, though double's may not be
                plain = np.float64(inputs[2])
            assert value == plain or (np.isnan(value) and np.isnan(plain)), row


@pytest.mark.parametrize("kind", REAL)
def test_roots(kind):
    columns = combinations(kind)
    dtype, got = KINDS[kind].type, compute(f"sqrt.rn.{kind} %y, %x0;", kind, *columns)
    for x, y in zip(columns[0][1], got, strict=True):
        if x > 0 and np.isfinite(x):  # the root lies between the middles to both neighbours
            below, above = np.nextafter(y, dtype(0)), np.nextafter(y, dtype(np.inf))
            low, high = ((Fraction(float(y)) + Fraction(float(v))) / 2 for v in (below, above))
            assert low**2 <= Fraction(float(x)) <= high**2
        else:
            assert np.isnan(y) if x < 0 or np.isnan(x) else y == x and np.signbit(x) == np.signbit(y)


@pytest.mark.parametrize("kind", REAL)
def test_signs(kind):
    bits, sign = f"u{bits_of(kind) // 8}", 1 << (bits_of(kind) - 1)
    columns = combinations(kind, kind)
    (_, x), (_, y) = columns
    word = x.view(bits)
    top, rest = x.view(bits).dtype.type(sign), x.view(bits).dtype.type(sign - 1)
    same(compute(f"neg.{kind} %y, %x0;", kind, *columns), (word ^ top).view(x.dtype))
    same(compute(f"abs.{kind} %y, %x0;", kind, *columns), (word & rest).view(x.dtype))
    expected = (word & top) | (y.view(bits) & rest)
    same(compute(f"copysign.{kind} %y, %x0, %x1;", kind, *columns), expected.view(x.dtype))


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("name", ["min", "max"])
def test_the_smaller_and_the_larger(name, kind):
    columns = combinations(kind, kind)
    pick = min if name == "min" else max

    def place(x):  # -0 comes before +0
        return float(x), not np.signbit(x)

    plain, strict = [], []
    for x, y in zip(columns[0][1], columns[1][1], strict=True):
        numbers = [v for v in (x, y) if not np.isnan(v)]
        plain.append(pick(numbers, key=place) if numbers else np.nan)
        strict.append(plain[-1] if len(numbers) == 2 else np.nan)
    same(compute(f"{name}.{kind} %y, %x0, %x1;", kind, *columns), np.array(plain, KINDS[kind]))
    same(compute(f"{name}.NaN.{kind} %y, %x0, %x1;", kind, *columns), np.array(strict, KINDS[kind]))


ORDERED = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x < y or x > y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "num": lambda x, y: x == x and y == y,
    "nan": lambda x, y: x != x or y != y,
}


@pytest.mark.parametrize("kind", ["f16", *REAL])
@pytest.mark.parametrize("how", ORDERED)
def test_comparisons(how, kind):
    columns = combinations(kind, kind)
    rows = [*zip(*(column.tolist() for _, column in columns), strict=True)]
    body = "setp.{}.{} %p0, %x0, %x1; selp.u32 %y, 1, 0, %p0;"
    expected = [ORDERED[how](x, y) for x, y in rows]
    same(compute(body.format(how, kind), "u32", *columns), np.array(expected, np.uint32))
    if how in ("num", "nan"):
        return
    unordered = [ORDERED[how](x, y) or x != x or y != y for x, y in rows]
    same(compute(body.format(how + "u", kind), "u32", *columns), np.array(unordered, np.uint32))
    body = f"setp.{how}.{kind} %p0|%p1, %x0, %x1; selp.u32 %y, 1, 0, %p1;"
    same(compute(body, "u32", *columns), np.array(expected, np.uint32) ^ np.uint32(1))
    body = f"set.{how}.f32.{kind} %y, %x0, %x1;"
    same(compute(body, "f32", *columns), np.array(expected, np.float32))


@pytest.mark.parametrize("kind", REAL)
def test_classes(kind):
    (_, x), *_ = columns = combinations(kind)
    tiny = np.finfo(KINDS[kind]).smallest_normal
    expected = {
        "finite": np.isfinite(x),
        "infinite": np.isinf(x),
        "number": x == x,
        "notanumber": x != x,
        "normal": np.isfinite(x) & (abs(x) >= tiny),
        "subnormal": (abs(x) < tiny) & (x != 0),
    }
    for how, value in expected.items():
        body = f"testp.{how}.{kind} %p0, %x0; selp.u32 %y, 1, 0, %p0;"
        same(compute(body, "u32", *columns), value.astype(np.uint32))


def test_subnormals_are_flushed_where_that_is_written():
    tiny = np.float32(1e-40)
    values = [("f32", np.array([tiny, -tiny, 1.0], np.float32)), ("f32", np.full(3, np.float32(2)))]
    same(compute("mul.ftz.f32 %y, %x0, %x1;", "f32", *values), np.array([0.0, -0.0, 2.0], np.float32))
    same(compute("mul.f32 %y, %x0, %x1;", "f32", *values), np.array([2 * tiny, -2 * tiny, 2.0], np.float32))
    body = "fma.rn{}.f32 %y, %x0, %x1, %x0;"
    same(compute(body.format(".ftz"), "f32", *values), np.array([0.0, -0.0, 3.0], np.float32))
    same(compute(body.format(""), "f32", *values), np.float32(3) * values[0][1])
    small = [("f32", np.full(1, np.float32(2e-38))), ("f32", np.full(1, np.float32(0.25)))]
    same(compute("mul.ftz.f32 %y, %x0, %x1;", "f32", *small), np.zeros(1, np.float32))
    body = "setp.eq{}.f32 %p0, %x0, 0f00000000; selp.u32 %y, 1, 0, %p0;"
    same(compute(body.format(".ftz"), "u32", *values), np.array([1, 1, 0], np.uint32))
    same(compute(body.format(""), "u32", *values), np.array([0, 0, 0], np.uint32))


@pytest.mark.parametrize(
    ("name", "function"),
    [("rcp", lambda x: 1 / x), ("rsqrt", lambda x: x**-0.5), ("ex2", np.exp2), ("lg2", np.log2),
     ("sin", np.sin),     ("cos", np.cos), ("sqrt", np.sqrt)],
    ids=["rcp", "rsqrt", "ex2", "lg2", "sin", "cos", "sqrt"],
)  # fmt: skip
def test_approximations_are_close(name, function):
    x = np.linspace(0.1, 6, 100).astype(np.float32)
    got = compute(f"{name}.approx.f32 %y, %x0;", "f32", ("f32", x))
    np.testing.assert_allclose(got, function(x.astype(np.float64)), rtol=2e-7, atol=1e-9)


def test_approximations_are_told_of():
    out = np.zeros(32, np.float32)
    body = (
        "cvt.rn.f32.u32 %f0, %r20; {} %f1, %f0; mad.wide.u32 %rd0, %r20, 4, %rd20; st.global.f32 [%rd0], %f1;"
    )
    assert run(kernel(body.format("ex2.approx.f32")), out).approximate == {"ex2.approx.f32"}
    np.testing.assert_array_equal(out, np.exp2(np.arange(32)).astype(np.float32))
    statistics = run(kernel(body.format("sqrt.rn.f32")), out)
    assert not statistics.approximate
    assert statistics.executed["sqrt.rn.f32"] == 1


def test_numbers_in_the_text():
    one = [("u32", np.zeros(1, np.uint32))]
    same(compute("mov.f32 %y, 0f3FC00000;", "f32", *one), np.array([1.5], np.float32))
    same(compute("mov.f64 %y, 0dBFF8000000000000;", "f64", *one), np.array([-1.5]))
    same(compute("mov.u32 %y, 0xFFFFFFFF;", "u32", *one), np.array([2**32 - 1], np.uint32))
    same(compute("mov.b64 %y, -5;", "s64", *one), np.array([-5]))
    x = extremes("f32")
    same(compute("add.f32 %y, %x0, 0f00000000;", "f32", ("f32", x)), x + np.float32(0))
