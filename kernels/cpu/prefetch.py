"""Asking memory for rows before they are needed; does nothing without JIT."""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload

from fastopt.kernels.elements import define

CACHE_LINE = 64  # bytes
MOST_LINES = 16  # of a row: the processor itself fetches on from there


def _prefetch_function(module: ir.Module) -> ir.Function:
    """``void (start, bytes)``, which prefetches each cache line of a row.

    Not inlined: the compiler would unroll its loop at every call, at the price of a second.
    """
    i8, i32, i64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
    pointer = i8.as_pointer()
    function = cgutils.get_or_insert_function(
        module, ir.FunctionType(ir.VoidType(), [pointer, i64]), "fastopt_prefetch_row"
    )
    if function.blocks:
        return function
    function.linkage = "internal"
    function.attributes.add("noinline")
    instruction = cgutils.get_or_insert_function(
        module, ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32]), "llvm.prefetch.p0"
    )
    start, size = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    with cgutils.for_range_slice(builder, i64(0), size, i64(CACHE_LINE)) as (offset, _):
        # to be read, kept in all levels, data
        builder.call(instruction, [builder.gep(start, [offset]), i32(0), i32(3), i32(1)])
    builder.ret_void()
    return function


@intrinsic
def _prefetch_from(context: Any, array: Any, offset: Any, size: Any) -> Any:
    """Have ``size`` bytes from element ``offset`` of a C-contiguous array loaded."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        start = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        builder.call(_prefetch_function(builder.module), [start, arguments[2]])
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), generate


def prefetch(array, row):
    """Have row ``row`` of a C-contiguous 2-D array loaded."""


@overload(prefetch)
def _prefetch(array, row):
    def implementation(array, row):
        dim = array.shape[1]
        _prefetch_from(array, row * dim, min(dim * array.itemsize, MOST_LINES * CACHE_LINE))

    return implementation


def prefetch_each(arrays, row):
    """Have row ``row`` of each array of a tuple loaded."""


@overload(prefetch_each)
def _prefetch_each(arrays, row):
    lines = [f"prefetch(arrays[{k}], row)" for k in range(len(arrays))]
    return define("prefetch_each", "arrays, row", *lines, "return None", prefetch=prefetch)
