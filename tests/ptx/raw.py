"""Numbers read and written at addresses, for compiled code."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def peek(context, address, like):
    """The number of the type of ``like`` at an address."""

    def generate(context, builder, signature, arguments):
        kind = context.get_data_type(like)
        return builder.load(builder.inttoptr(arguments[0], ir.PointerType(kind)), align=1)

    return like(types.uint64, like), generate


@intrinsic
def poke(context, address, value):
    def generate(context, builder, signature, arguments):
        kind = context.get_data_type(value)
        builder.store(arguments[1], builder.inttoptr(arguments[0], ir.PointerType(kind)), align=1)
        return context.get_dummy_value()

    return types.void(types.uint64, value), generate
