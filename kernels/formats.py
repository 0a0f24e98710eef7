"""How arrays are stored: as the numbers that rules compute with, or smaller.

Each way is a :class:`Format`, one object with all that kernels and optimizers need to know of it; one that
is defined elsewhere, and registered, is used as those here are. A kernel gets the formats of its arrays as an
argument without contents, whose type names them.

A run of an array that is stored smaller is opened, which decodes it into a buffer, updated there, and closed,
which encodes it again; one that is stored as computed with is updated in place. Where rounding is stochastic,
the random bits are a function of a key and of the element's position alone, so they do not depend on who
computes what when.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fastopt.kernels.intrinsics import bits_of, float_of, float_of_half, half_of
from fastopt.kernels.linked import register_jitable

BLOCK = 256  # elements that share a scale
NEAREST = np.uint32(0x80000000)  # random bits with which rounding at random is rounding to the nearest


@register_jitable
def blocks_of(size):
    """How many blocks hold ``size`` elements."""
    return (size + BLOCK - 1) // BLOCK


# Scalar functions: what is stored to a number, and a number with random bits, of which the upper 16 count,
# to what is stored


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


# Source of random bits, for functions that are made from text


def half_of_random(slot: int) -> str:
    """Source of the random bits of a slot: two slots share 32."""
    return f"r{slot // 2}" if slot % 2 == 0 else f"np.uint32(r{slot // 2} << np.uint32(16))"


def random_draws(slots: Sequence[int]) -> list[str]:
    """Lines that draw the random bits of these slots for the element ``k``, counted from ``position``."""
    return [
        f"r{n} = random_bits(np.uint64(key) + np.uint64({n * 0x9E3779B97F4A7C15 % 2**64}), position, k)"
        for n in sorted({slot // 2 for slot in slots})
    ]


@dataclass(frozen=True, eq=False)
class Format:
    """How an array is stored.

    name: an identifier, which the types of kernels' arguments hold.
    dtype: of the array that users see; None: the one that is computed with.
    stored: the machine type of an element; None: the one that is computed with, and there are no functions.
    decode, encode: scalar functions, ``decode(stored)`` and ``encode(x, random bits)``.
    factor, inverse: where elements are codes in blocks with a float32 scale each, at a second address,
        functions of the scale: ``decode`` takes the factor too, and ``encode`` the inverse.
    largest_code: the code of a block's scale itself.
    master: whether a copy as computed with, which is what counts, is at a second address.
    random: whether ``encode`` uses its random bits.
    """

    name: str
    dtype: np.dtype | None = None
    stored: type | None = None
    decode: Callable[..., Any] = same
    encode: Callable[..., Any] = to_single
    factor: Callable[..., Any] | None = None
    inverse: Callable[..., Any] | None = None
    largest_code: int = 0
    master: bool = False
    random: bool = False

    @property
    def coded(self) -> bool:
        """Whether elements are codes in blocks."""
        return self.factor is not None

    def zero(self, like: np.dtype) -> Any:
        """0 of the type of a stored element, where ``like`` is computed with."""
        return like.type(0) if self.stored is None else self.stored(0)

    def itemsize(self, like: np.dtype) -> int:
        """Bytes of a stored element, where ``like`` is computed with."""
        return self.zero(like).itemsize


FORMATS: dict[str, Format] = {}


def register_format(own: Format) -> Format:
    """Make kernels find a format by its name.

    Raises:
        ValueError: another format has its name, or the name can't be a part of a type's name.
    """
    if not own.name.isidentifier() or "__" in own.name or FORMATS.get(own.name, own) is not own:
        raise ValueError(
            f"name is {own.name!r}: expected an identifier without '__' that no other format has, these are "
            + ", ".join(FORMATS)
        )
    FORMATS[own.name] = own
    return own


_FLOAT16, _BFLOAT16, _CODE = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.uint8)
_AS_HALF = _FLOAT16, np.uint16, float_of_half, to_half
_AS_BFLOAT16 = _BFLOAT16, np.uint16, float_of_bfloat16, to_nearest_bfloat16

PLAIN = register_format(Format("PLAIN"))
HALF = register_format(Format("HALF", *_AS_HALF))
BFLOAT16 = register_format(Format("BFLOAT16", *_AS_BFLOAT16))
SINGLE = register_format(Format("SINGLE", np.dtype(np.float32), np.float32, same, to_single))
HALF_OF = register_format(Format("HALF_OF", *_AS_HALF, master=True))
BFLOAT16_OF = register_format(Format("BFLOAT16_OF", *_AS_BFLOAT16, master=True))
STOCHASTIC = register_format(
    Format("STOCHASTIC", _BFLOAT16, np.uint16, float_of_bfloat16, to_stochastic_bfloat16, random=True)
)
_SIGNED = np.uint8, from_signed, to_signed, signed_factor, signed_inverse
_ROOT = np.uint8, from_root, to_root, root_factor, root_inverse
SIGNED8 = register_format(Format("SIGNED8", _CODE, *_SIGNED, largest_code=127, random=True))
ROOT8 = register_format(Format("ROOT8", _CODE, *_ROOT, largest_code=255, random=True))


class StateFormats(NamedTuple):
    """What a name of ``state_dtype=`` stands for: the format of slots whose elements may be negative and that
    of the others, and the names of dtypes that may be given in its place."""

    signed: Format
    not_negative: Format
    dtypes: tuple[str, ...] = ()


STATE_DTYPES: dict[str, StateFormats] = {}


def register_state_dtype(name: str, meaning: StateFormats) -> None:
    """Make ``state_dtype=name`` stand for these formats."""
    STATE_DTYPES[name] = meaning


register_state_dtype("float32", StateFormats(SINGLE, SINGLE, ("float32",)))
register_state_dtype("bfloat16", StateFormats(STOCHASTIC, STOCHASTIC, ("bfloat16",)))
register_state_dtype("8bit", StateFormats(SIGNED8, ROOT8, ("int8", "uint8")))


def state_format(state_dtype: str | None, not_negative: bool, like: np.dtype) -> Format:
    """That of a slot whose elements are, or are not, never negative, where ``like`` is computed with."""
    if state_dtype is None:
        return PLAIN
    chosen = STATE_DTYPES[state_dtype]
    found = chosen.not_negative if not_negative else chosen.signed
    return PLAIN if found is SINGLE and found.dtype == like else found


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
        return type(formats(*(FORMATS[member] for member in name.split("__")[1:])))
    raise AttributeError(name)
