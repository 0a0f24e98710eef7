"""cvt, against exact fractions and Python's integers."""

from fractions import Fraction
from math import ceil, floor, trunc

import numpy as np
import pytest

from ptx.kinds import KINDS, bits_of
from ptx.programs import combinations, compute, extremes, same

WHOLE = ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"]
REAL = ["f16", "f32", "f64"]


@pytest.mark.parametrize("source", WHOLE)
@pytest.mark.parametrize("to", WHOLE)
def test_whole_numbers(to, source):
    columns = combinations(source)
    values, bits = columns[0][1].tolist(), bits_of(to)
    plain = np.array([value & (1 << bits) - 1 for value in values], np.uint64).astype(f"u{bits // 8}")
    same(compute(f"cvt.{to}.{source} %y, %x0;", to, *columns), plain.view(KINDS[to]))
    info = np.iinfo(KINDS[to])
    clamped = np.array([min(max(value, info.min), info.max) for value in values], KINDS[to])
    same(compute(f"cvt.sat.{to}.{source} %y, %x0;", to, *columns), clamped)


@pytest.mark.parametrize("how", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("source", REAL)
@pytest.mark.parametrize("to", WHOLE)
def test_floats_become_whole(to, source, how):
    (_, x), *_ = columns = combinations(source)
    info, function = np.iinfo(KINDS[to]), {"rni": round, "rzi": trunc, "rmi": floor, "rpi": ceil}[how]
    nan = 0 if source != "f64" and bits_of(to) < 64 else info.min or 1 << (bits_of(to) - 1)
    expected = []
    for value in x.tolist():
        if value != value:
            expected.append(nan)
        elif np.isinf(value):
            expected.append(info.max if value > 0 else info.min)
        else:
            expected.append(min(max(function(Fraction(value)), info.min), info.max))
    same(compute(f"cvt.{how}.{to}.{source} %y, %x0;", to, *columns), np.array(expected, KINDS[to]))


def around(exact, dtype):
    """The numbers of a type next to a fraction: below or at it, and above or at it."""
    largest = np.finfo(dtype).max
    if abs(exact) > Fraction(float(largest)):
        return (largest, dtype(np.inf)) if exact > 0 else (dtype(-np.inf), -largest)
    with np.errstate(over="ignore"):
        guess = dtype(float(exact))
    guess = np.clip(guess, -largest, largest)
    low = guess if Fraction(float(guess)) <= exact else np.nextafter(guess, dtype(-np.inf))
    high = guess if Fraction(float(guess)) >= exact else np.nextafter(guess, dtype(np.inf))
    return low, high


def rounded(exact, how, dtype):
    low, high = around(exact, dtype)
    if how == "rn":
        word = f"u{np.dtype(dtype).itemsize}"
        if np.isinf(low) or np.isinf(high):
            step = Fraction(float(np.finfo(dtype).max)) - Fraction(
                float(np.nextafter(np.finfo(dtype).max, dtype(0)))
            )
            over = abs(exact) >= Fraction(float(np.finfo(dtype).max)) + step / 2
            return (high if exact > 0 else low) if over else (low if exact > 0 else high)
        return min(
            (low, high),
            key=lambda x: (abs(Fraction(float(x)) - exact), int(np.array(x).view(word)) & 1),
        )
    towards_zero = low if exact > 0 else high
    return {"rm": low, "rp": high, "rz": towards_zero}[how]


@pytest.mark.parametrize("how", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("source", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("to", REAL)
def test_whole_numbers_become_floats(to, source, how):
    (_, x), *_ = columns = combinations(source)
    expected = [rounded(Fraction(value), how, KINDS[to].type) for value in x.tolist()]
    same(compute(f"cvt.{how}.{to}.{source} %y, %x0;", to, *columns), np.array(expected, KINDS[to]))


@pytest.mark.parametrize("how", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize(("to", "source"), [("f32", "f64"), ("f16", "f32"), ("f16", "f64")])
def test_floats_become_narrower(to, source, how):
    near = extremes(to).astype(KINDS[source])
    x = np.concatenate([extremes(source), near, np.nextafter(near, KINDS[source].type(9))])
    with np.errstate(over="ignore"):
        middles = (near + np.nextafter(extremes(to), KINDS[to].type(9)).astype(KINDS[source])) / 2
    x = np.concatenate([x, middles])
    expected = []
    for value in x.tolist():
        if value != value or np.isinf(value) or value == 0:
            expected.append(value)
        else:
            size = abs(rounded(Fraction(value), how, KINDS[to].type))
            expected.append(-size if value < 0 else size)
    got = compute(f"cvt.{how}.{to}.{source} %y, %x0;", to, (source, x))
    same(got, np.array(expected, KINDS[to]))


@pytest.mark.parametrize(("to", "source"), [("f64", "f32"), ("f32", "f16"), ("f64", "f16")])
def test_floats_become_wider(to, source):
    (_, x), *_ = columns = combinations(source)
    same(compute(f"cvt.{to}.{source} %y, %x0;", to, *columns), np.array(x.tolist(), KINDS[to]))


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("how", ["rni", "rzi", "rmi", "rpi"])
def test_floats_are_rounded_to_whole_floats(how, kind):
    (_, x), *_ = columns = combinations(kind)
    function = {"rni": round, "rzi": trunc, "rmi": floor, "rpi": ceil}[how]
    expected = [np.copysign(float(function(v)), v) if np.isfinite(v) else v for v in x.tolist()]
    same(compute(f"cvt.{how}.{kind}.{kind} %y, %x0;", kind, *columns), np.array(expected, KINDS[kind]))


def test_floats_are_clamped():
    x = np.array([-1, -0.0, 0.25, 1, 7, np.nan, np.inf], np.float32)
    got = compute("cvt.sat.f32.f32 %y, %x0;", "f32", ("f32", x))
    same(abs(got), np.array([0, 0, 0.25, 1, 1, 0, 1], np.float32))


def bfloat16(x, how):
    """The bits of the bfloat16 that a float32 is rounded to, found among its two neighbours."""
    if np.isnan(x):
        return 0x7FFF
    bits = int(np.array(x).view(np.uint32))
    low = bits >> 16
    exact = Fraction(float(x)) if np.isfinite(x) else None
    if exact is None or bits & 0xFFFF == 0 or how == "rz":
        return low
    value, after = (np.array(v << 16, np.uint32).view(np.float32) for v in (low, low + 1))
    if np.isinf(after):
        after = 2.0**128
    distances = [abs(Fraction(float(value)) - exact), abs(Fraction(float(abs(after))) - abs(exact))]
    if distances[0] == distances[1]:
        return low + (low & 1)
    return low + (distances[1] < distances[0])


@pytest.mark.parametrize("how", ["rn", "rz"])
def test_bfloat16(how):
    x = extremes("f32")
    ties = (np.arange(40, dtype=np.uint32) * np.uint32(0x8000) + np.uint32(0x3F800000)).view(np.float32)
    x = np.concatenate([x, ties, np.nextafter(ties, np.float32(9))])
    expected = np.array([bfloat16(v, how) for v in x], np.uint16)
    same(compute(f"cvt.{how}.bf16.f32 %y, %x0;", "u16", ("f32", x)), expected)
    back = compute("cvt.f32.bf16 %y, %x0;", "f32", ("u16", expected))
    same(back, (expected.astype(np.uint32) << np.uint32(16)).view(np.float32))


@pytest.mark.parametrize("to", ["f16x2", "bf16x2"])
def test_pairs(to):
    columns = combinations("f32", "f32")
    halves = [compute(f"cvt.rn.{to[:-2]}.f32 %y, %x{k};", "u16", *columns).astype(np.uint32) for k in (0, 1)]
    expected = halves[0] << np.uint32(16) | halves[1]
    same(compute(f"cvt.rn.{to}.f32 %y, %x0, %x1;", "u32", *columns), expected)
