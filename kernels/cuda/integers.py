"""Arithmetic of whole numbers that Numba would do with 64 bits, where devices have 32."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def divided(context: Any, x: Any, y: Any) -> Any:
    """Quotient and remainder of two int64 from 0 to below 2**32: a division of 64 bits takes a hundred
    instructions."""

    def generate(context, builder, signature, arguments):
        narrow, wide = ir.IntType(32), ir.IntType(64)
        a, b = (builder.trunc(argument, narrow) for argument in arguments)
        quotient = builder.udiv(a, b)
        remainder = builder.sub(a, builder.mul(quotient, b))
        parts = [builder.zext(part, wide) for part in (quotient, remainder)]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(types.int64, 2)(types.int64, types.int64), generate


@intrinsic
def unchanged(context: Any, x: Any) -> Any:
    """An int64 as it is, of which the compiler can't know that it is the same each time. It finds how often a
    loop is run that goes on by the same each time, to unroll it, by a division of 64 bits."""

    def generate(context, builder, signature, arguments):
        wide = ir.IntType(64)
        kind = ir.FunctionType(wide, [wide])
        return builder.asm(kind, "mov.b64 $0, $1;", "=l,l", arguments, side_effect=True)

    return types.int64(types.int64), generate
