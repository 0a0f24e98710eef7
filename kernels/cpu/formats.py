"""How arrays are stored: as the numbers that rules compute with, or smaller.

A format is the type of an argument without contents. A run of an array that is stored smaller is
opened, which decodes it into a buffer, updated there, and closed, which encodes it again; one that is
stored as computed with is updated in place. Where rounding is stochastic, the random bits are a function
of a key and of the element's position alone, so they do not depend on who computes what when.

8-bit codes are piecewise linear logarithms, as those of ITU-T G.711: x, scaled by the largest of its block
of BLOCK, plus 2^-16 is a float32 whose exponent and first bits of fraction are the code. So 0 is exact,
numbers near the largest have a relative spacing of 1/8 at most (signed, seven bits and a sign) or of 1/16
(the root of one that is not negative), small ones an absolute spacing of 2^-19 or 2^-20 of the largest.
Numbers above 0 whose roots are below the first code get that one, never 0: divided by the root of a second
moment that had become 0, a first moment rounded up would be a step of hundreds of learning rates.
"""

import functools
import math
from collections import namedtuple
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, overload, register_jitable
from numba.np.numpy_support import as_dtype

from fastopt.kernels.cpu.memory import view
from fastopt.kernels.elements import define, update_element
from fastopt.kernels.jit import restricted_helper

BLOCK = 256  # elements that share a scale
RUN = 8 * BLOCK  # elements that are updated at a time, so that what is done to them next finds them in cache


class Format(Enum):
    """How an array is stored."""

    PLAIN = "as computed with"
    HALF = "float16"
    BFLOAT16 = "bfloat16, rounded to the nearest, ties to even"
    SINGLE = "float32, where float64 is computed with"
    HALF_OF = "float16 of a master, which is stored as computed with, at the second address"
    BFLOAT16_OF = "bfloat16 of such a master"
    STOCHASTIC = "bfloat16, rounded up with the probability of the fraction that is lost"
    SIGNED8 = "8-bit codes, with scales at the second address"
    ROOT8 = "8-bit codes of roots, for numbers that are not negative, with scales at the second address"


PLAIN, HALF, BFLOAT16, SINGLE, HALF_OF, BFLOAT16_OF, STOCHASTIC, SIGNED8, ROOT8 = Format


_namedtuple: Any = namedtuple  # of a name that is not written here, which its type does not allow


@functools.cache
def formats(*members: Format) -> Any:
    """An argument without contents whose type tells a kernel the formats of its arrays."""
    name = "Formats__" + "__".join(member.name for member in members)
    marker = _namedtuple(name, (), module=__name__)
    marker.members = members
    return marker()


def __getattr__(name: str) -> Any:
    """The class of such an argument, when a compiled kernel is loaded that has it in its signature."""
    if name.startswith("Formats__"):
        return type(formats(*(Format[member] for member in name.split("__")[1:])))
    raise AttributeError(name)


# Scalars; each intrinsic has a twin for plain Python


def _convert(name: str, source: Any, result: Any) -> Any:
    """A function of the intermediate representation from one number to another."""
    kinds = {
        types.uint16: ir.IntType(16),
        types.uint32: ir.IntType(32),
        types.float32: ir.FloatType(),
    }

    @intrinsic
    def convert(context: Any, x: Any) -> Any:
        def generate(context, builder, signature, arguments):
            (value,) = arguments
            if name == "bits":
                return builder.bitcast(value, kinds[result])
            if name == "extend":
                return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
            return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))

        return result(source), generate

    return convert


# C. Wellons, "Prospecting for Hash Functions" (2018), "lowbias32"
MULTIPLIERS = 0x7FEB352D, 0x846CA68B


@intrinsic
def _random_bits(context: Any, key: Any, position: Any, k: Any) -> Any:
    """In the intermediate representation because Numba computes with 64 bits, in half as many lanes."""

    def generate(context, builder, signature, arguments):
        i32 = ir.IntType(32)
        key, position, k = arguments
        start = builder.add(builder.trunc(position, i32), builder.trunc(key, i32))
        x = builder.add(builder.trunc(k, i32), start)
        x = builder.mul(builder.xor(x, builder.lshr(x, i32(16))), i32(MULTIPLIERS[0]))
        x = builder.add(x, builder.trunc(builder.lshr(key, ir.IntType(64)(32)), i32))
        x = builder.mul(builder.xor(x, builder.lshr(x, i32(15))), i32(MULTIPLIERS[1]))
        return builder.xor(x, builder.lshr(x, i32(16)))

    return types.uint32(types.uint64, types.int64, types.int64), generate


def _python_random_bits(key, position, k):
    """32 random bits of the position ``position + k``: two rounds of shift and multiplication, with the
    halves of a 64-bit key."""
    most = 0xFFFFFFFF
    key, x = int(key), int(position) + int(k) + int(key) & most
    x = (x ^ x >> 16) * MULTIPLIERS[0] + (key >> 32) & most
    x = (x ^ x >> 15) * MULTIPLIERS[1] & most
    return np.uint32(x ^ x >> 16)


_compiled: Any = not numba.config.DISABLE_JIT  # type: ignore[attr-defined]
random_bits: Any = _random_bits if _compiled else _python_random_bits
if _compiled:
    bits_of = _convert("bits", types.float32, types.uint32)
    float_of = _convert("bits", types.uint32, types.float32)
    float_of_half = _convert("extend", types.uint16, types.float32)
    half_of = _convert("truncate", types.float32, types.uint16)
else:

    def bits_of(x):
        return np.float32(x).view(np.uint32)

    def float_of(bits):
        return np.uint32(bits).view(np.float32)

    def float_of_half(bits):
        return np.float32(np.uint16(bits).view(np.float16))

    def half_of(x):
        return np.float32(x).astype(np.float16).view(np.uint16)


# Elements: what is stored to a number, and a number with random bits, of which the upper 16 count, to what
# is stored


@register_jitable
def same(x):
    return x


@register_jitable
def float_of_bfloat16(stored):
    return float_of(np.uint32(np.uint32(stored) << np.uint32(16)))


@register_jitable
def to_half(x, random):
    return half_of(np.float32(x))


@register_jitable
def to_single(x, random):
    return np.float32(x)


@register_jitable
def to_nearest_bfloat16(x, random):
    bits = bits_of(np.float32(x))
    rounded = np.uint32(bits + np.uint32(0x7FFF) + (np.uint32(bits >> np.uint32(16)) & np.uint32(1)))
    if x != x:
        rounded = np.uint32(bits | QUIET)
    return np.uint16(rounded >> np.uint32(16))


@register_jitable
def to_stochastic_bfloat16(x, random):
    bits = bits_of(np.float32(x))
    rounded = np.uint32(bits + np.uint32(random >> np.uint32(16)))
    if x != x:
        rounded = np.uint32(bits | QUIET)
    return np.uint16(rounded >> np.uint32(16))


QUIET = np.uint32(0x400000)  # the bit of a NaN that no rounding may take away
LOWEST = np.float32(2.0**-16)  # what stands for 0 in the logarithm
LOWEST_BITS = np.uint32((127 - 16) << 23)
# Signed codes are decoded to twice the logarithm, so that half of the scale over the span is at most a
# float32
TWICE_LOWEST, TWICE_LOWEST_BITS = np.float32(2.0**-15), np.uint32((127 - 15) << 23)
SIGNED_SHIFT, ROOT_SHIFT = np.uint32(20), np.uint32(19)  # bits of the fraction that are cut off
# What the largest is scaled to: below the last code, so that no rounding leads beyond it
SIGNED_SPAN = np.float32((1 - 2.0**-4 - 2.0**-16) * (1 - 2.0**-20))
TWICE_SIGNED_SPAN = np.float32(2 * SIGNED_SPAN)
ROOT_SPAN = np.float32((1 - 2.0**-5 - 2.0**-16) * (1 - 2.0**-20))
SMALLEST_SCALE = np.float32(2.0**-120)
INFINITY_BITS = np.uint32(0x7F800000)
MAGNITUDE, SIGN = np.uint32(0x7FFFFFFF), np.uint32(0x80000000)


@register_jitable
def larger(largest, x):
    """The larger of the bits of a magnitude and those of ``x``; NaN is larger than infinity."""
    bits = np.uint32(bits_of(np.float32(x)) & MAGNITUDE)
    return bits if bits > largest else largest


@register_jitable
def scale_from(largest):
    """A block's scale: the magnitude that has the bits ``largest``, NaN if it is not finite."""
    if largest >= INFINITY_BITS:
        return np.float32(np.nan)
    scale = float_of(largest)
    return scale if scale > SMALLEST_SCALE else SMALLEST_SCALE


@register_jitable
def signed_factor(scale):
    return scale / TWICE_SIGNED_SPAN


@register_jitable
def from_signed(code, factor):
    bits = np.uint32(code)
    magnitude = np.uint32(np.uint32(np.uint32(bits & np.uint32(127)) << SIGNED_SHIFT) + TWICE_LOWEST_BITS)
    sign = np.uint32(np.uint32(bits & np.uint32(128)) << np.uint32(24))
    return float_of(np.uint32(bits_of((float_of(magnitude) - TWICE_LOWEST) * factor) | sign))


@register_jitable
def to_signed(x, random, inverse):
    bits = bits_of(np.float32(x))
    z = float_of(np.uint32(bits & MAGNITUDE)) * inverse + LOWEST
    rounded = np.uint32(bits_of(z) + np.uint32(random >> np.uint32(12)) - LOWEST_BITS)
    code = np.uint32(rounded >> SIGNED_SHIFT)
    return np.uint8(code | np.uint32(np.uint32(bits & SIGN) >> np.uint32(24)))


@register_jitable
def signed_inverse(scale):
    return SIGNED_SPAN / scale


@register_jitable
def root_factor(scale):
    return math.sqrt(scale) / ROOT_SPAN


@register_jitable
def from_root(code, factor):
    magnitude = np.uint32(np.uint32(np.uint32(code) << ROOT_SHIFT) + LOWEST_BITS)
    root = (float_of(magnitude) - LOWEST) * factor
    return root * root


@register_jitable
def to_root(x, random, inverse):
    number = np.float32(x)
    z = math.sqrt(number * inverse) + LOWEST
    code = np.uint32(np.uint32(bits_of(z) + np.uint32(random >> np.uint32(13)) - LOWEST_BITS) >> ROOT_SHIFT)
    least = np.uint32(number > 0)
    return np.uint8(code if code > least else least)


@register_jitable
def root_inverse(scale):
    return ROOT_SPAN * ROOT_SPAN / scale


class Codec(NamedTuple):
    """How a format's elements are read and written: the type that is stored, and functions.

    With blocks, ``decode`` takes ``factor`` of the scale too, and ``encode`` ``inverse`` of it.
    """

    stored: type
    decode: Callable
    encode: Callable
    factor: Callable | None = None
    inverse: Callable | None = None


_BFLOAT16 = Codec(np.uint16, float_of_bfloat16, to_nearest_bfloat16)
_HALF = Codec(np.uint16, float_of_half, to_half)
CODECS = {
    HALF: _HALF,
    BFLOAT16: _BFLOAT16,
    SINGLE: Codec(np.float32, same, to_single),
    HALF_OF: _HALF,
    BFLOAT16_OF: _BFLOAT16,
    STOCHASTIC: Codec(np.uint16, float_of_bfloat16, to_stochastic_bfloat16),
    SIGNED8: Codec(np.uint8, from_signed, to_signed, signed_factor, signed_inverse),
    ROOT8: Codec(np.uint8, from_root, to_root, root_factor, root_inverse),
}
RANDOM = STOCHASTIC, SIGNED8, ROOT8  # what is rounded stochastically
MASTERED = HALF_OF, BFLOAT16_OF
CODED = SIGNED8, ROOT8


def itemsize(kind: Format, like: int) -> int:
    """Bytes of a stored element, where what is computed with has ``like``."""
    return np.dtype(CODECS[kind].stored).itemsize if kind in CODECS else like


def _half_of_random(slot: int) -> str:
    """Source of the random bits of a slot: two slots share 32."""
    return f"r{slot // 2}" if slot % 2 == 0 else f"np.uint32(r{slot // 2} << np.uint32(16))"


def _draws(slots: list[int]) -> list[str]:
    """Lines that draw the random bits of these slots for element ``k``."""
    return [
        f"r{n} = random_bits(np.uint64(key) + np.uint64({n * 0x9E3779B97F4A7C15 % 2**64}), position, k)"
        for n in sorted({slot // 2 for slot in slots})
    ]


class Opening(NamedTuple):
    """Source that opens the arrays of a run, and the parameters and arguments of a loop over its elements
    ``i``, which finds the numbers at ``loads``. All of it sees ``names``."""

    lines: list[str]
    parameters: list[str]
    arguments: list[str]
    loads: list[str]
    names: dict[str, Any]


def opened(members: tuple[Format, ...], like: np.dtype) -> Opening:
    """Of arrays at ``places``, from the element ``at`` on."""
    names: dict[str, Any] = {"np": np, "view": view, "like": like.type(0)}
    opening = Opening([], [], [], [], names)
    for k, kind in enumerate(members):
        name, place, size, zero = f"a{k}", f"places[{2 * k}]", itemsize(kind, like.itemsize), "like"
        load = f"a{k}[i]"
        if kind in MASTERED:
            place, size = f"places[{2 * k + 1}]", like.itemsize
        elif kind in CODECS:
            names |= {f"zero{k}": CODECS[kind].stored(0), f"decode{k}": CODECS[kind].decode}
            zero, load = f"zero{k}", f"decode{k}(a{k}[i])"
        opening.lines.append(f"{name} = view({place} + at * {size}, size, {zero})")
        opening.parameters.append(name)
        opening.arguments.append(name)
        if kind in CODED:
            names[f"factor{k}"] = CODECS[kind].factor
            opening.lines.append(f"s{k} = view(places[{2 * k + 1}] + at // {BLOCK} * 4, 1, np.float32(0))")
            opening.parameters.append(f"f{k}")
            opening.arguments.append(f"factor{k}(s{k}[0])")
            load = f"decode{k}(a{k}[i], f{k})"
        opening.loads.append(load)
    return opening


def run_update(members: tuple[Format, ...], like: np.dtype) -> Callable:
    """A function that updates a run of elements with the formats ``members`` of the parameter, the gradient
    and each slot of the state.

    Its arguments are ``(h, c, places, at, size, key, position, buffers)``: the hyperparameters; places:
    two addresses for each array; the first element and how many, with 8-bit codes those of one block;
    the key of the random bits and the position of the first element's; buffers: [slots with codes, BLOCK].
    """
    slots = members[2:]
    coded = [s for s, kind in enumerate(slots) if kind in CODED]
    opening, parameters, arguments, loads, names = opened(members, like)
    names |= {"random_bits": random_bits, "update_element": update_element}
    names |= {"larger": larger, "scale_from": scale_from}
    stores = []
    for k, kind in enumerate(members):
        if k == 1:
            continue
        new = f"new[{k - (k > 0)}]"
        if kind in CODECS:
            names |= {f"encode{k}": CODECS[kind].encode, f"inverse{k}": CODECS[kind].inverse}
        if kind in CODED:
            opening.append(f"b{k} = buffers[{coded.index(k - 2)}]")
            parameters.append(f"b{k}")
            arguments.append(f"b{k}")
            stores += [f"b{k}[i] = {new}", f"l{k} = larger(l{k}, {new})"]
            continue
        if kind in MASTERED:
            size, stored = itemsize(kind, like.itemsize), CODECS[kind].stored
            names[f"zero{k}"] = stored(0)
            opening.append(f"o{k} = view(places[{2 * k}] + at * {size}, size, zero{k})")
            parameters.append(f"o{k}")
            arguments.append(f"o{k}")
        if kind is PLAIN or kind in MASTERED:
            stores.append(f"a{k}[i] = {new}")
        if kind in CODECS:
            target = f"o{k}" if kind in MASTERED else f"a{k}"
            random = _half_of_random(k - 2) if kind in RANDOM else "np.uint32(0)"
            stores.append(f"{target}[i] = encode{k}({new}, {random})")
    draws = _draws([s for s, kind in enumerate(slots) if kind is STOCHASTIC])
    loop = define(
        "loop",
        f"h, c, size, key, position, {', '.join(parameters)}",
        *(f"l{s + 2} = np.uint32(0)" for s in coded),
        "for k in range(size):",
        "    i = np.uint64(k)",
        *(f"    {line}" for line in draws),
        f"    new = update_element(h, c, {', '.join(loads)})",
        *(f"    {line}" for line in stores),
        f"return ({''.join(f'l{s + 2}, ' for s in coded)})",
        **names,
    )
    names["loop"] = restricted_helper(loop)
    closing = [f"largest = loop(h, c, size, key, position, {', '.join(arguments)})"]
    if coded:
        encode = define(
            "encode",
            "size, key, position, " + ", ".join(f"a{s + 2}, b{s + 2}, v{s + 2}" for s in coded),
            "for k in range(size):",
            "    i = np.uint64(k)",
            *(f"    {line}" for line in _draws(coded)),
            *(f"    a{s + 2}[i] = encode{s + 2}(b{s + 2}[i], {_half_of_random(s)}, v{s + 2})" for s in coded),
            **names,
        )
        names["encode"] = restricted_helper(encode)
        closing += [f"s{s + 2}[0] = scale_from(largest[{n}])" for n, s in enumerate(coded)]
        given = ", ".join(f"a{s + 2}, b{s + 2}, inverse{s + 2}(s{s + 2}[0])" for s in coded)
        closing.append(f"encode(size, key, position, {given})")
    return define(
        "run", "h, c, places, at, size, key, position, buffers", *opening, *closing, "return None", **names
    )


def reader(kind: Format) -> Callable:
    """``(stored, scales, out)``: decode a row; scales are those of its blocks."""
    codec = CODECS[kind]
    names: dict[str, Any] = {"decode": codec.decode, "factor": codec.factor}
    if kind in CODED:
        lines: tuple[str, ...] = (
            f"for first in range(0, out.size, {BLOCK}):",
            f"    own = factor(scales[first // {BLOCK}])",
            f"    for i in range(first, min(first + {BLOCK}, out.size)):",
            "        out[i] = decode(stored[i], own)",
        )
    else:
        lines = ("for i in range(out.size):", "    out[i] = decode(stored[i])")
    return restricted_helper(define("read", "stored, scales, out", *lines, **names))


def writer(kind: Format, slot: int) -> Callable:
    """``(values, stored, scales, key, position)``: encode a row, of the state's slot ``slot``."""
    codec = CODECS[kind]
    names: dict[str, Any] = {"np": np, "random_bits": random_bits, "encode": codec.encode}
    names |= {"inverse": codec.inverse, "larger": larger, "scale_from": scale_from}
    draws = _draws([slot]) if kind in RANDOM else []
    random = _half_of_random(slot) if kind in RANDOM else "np.uint32(0)"
    if kind in CODED:
        lines = [
            f"for first in range(0, values.size, {BLOCK}):",
            f"    last = min(first + {BLOCK}, values.size)",
            "    largest = np.uint32(0)",
            "    for k in range(first, last):",
            "        largest = larger(largest, values[k])",
            "    scale = scale_from(largest)",
            f"    scales[first // {BLOCK}] = scale",
            "    own = inverse(scale)",
            "    for k in range(first, last):",
            *(f"        {line}" for line in draws),
            f"        stored[k] = encode(values[k], {random}, own)",
        ]
    else:
        lines = [
            "for k in range(values.size):",
            *(f"    {line}" for line in draws),
            f"    stored[k] = encode(values[k], {random})",
        ]
    return restricted_helper(define("write", "values, stored, scales, key, position", *lines, **names))


@register_jitable
def blocks_of(size):
    """How many blocks hold ``size`` elements."""
    return (size + BLOCK - 1) // BLOCK


@functools.cache
def _compiled_run(members: tuple[Format, ...], like: np.dtype) -> Callable:
    return register_jitable(run_update(members, like))


def update_run(h, c, like, kinds, places, at, size, key, position, buffers):
    """Update a run of elements, see :func:`run_update`."""
    run = run_update(kinds.members, np.dtype(type(like)))
    run(h, c, places, at, size, key, position, buffers)


@overload(update_run)
def _update_run(h, c, like, kinds, places, at, size, key, position, buffers):
    run = _compiled_run(kinds.instance_class.members, as_dtype(like))

    def implementation(h, c, like, kinds, places, at, size, key, position, buffers):
        run(h, c, places, at, size, key, position, buffers)

    return implementation


def run_length(kinds):
    """Elements of a run: those of a block where there are 8-bit codes."""
    return BLOCK if set(kinds.members) & set(CODED) else RUN


@overload(run_length)
def _run_length(kinds):
    length = run_length(kinds.instance_class)
    return lambda kinds: length


def gradient_itemsize(kinds, like):
    """Bytes of a stored element of the gradient."""
    return itemsize(kinds.members[1], np.dtype(type(like)).itemsize)


@overload(gradient_itemsize)
def _gradient_itemsize(kinds, like):
    size = itemsize(kinds.instance_class.members[1], like.bitwidth // 8)
    return lambda kinds, like: size


def new_buffers(kinds, like):
    """Memory for the blocks that are to be encoded."""
    return np.empty((sum(kind in CODED for kind in kinds.members), BLOCK), type(like))


@overload(new_buffers)
def _new_buffers(kinds, like):
    count = sum(kind in CODED for kind in kinds.instance_class.members)
    dtype = as_dtype(like)
    return lambda kinds, like: np.empty((count, BLOCK), dtype)
