"""Arrays at addresses, so that one launch can work on any number of tables, and fetching ahead.

An address is an int64. Whoever passes one keeps the memory alive and large enough. Each function is
an intrinsic, which compiles in no time, with a twin for plain Python.
"""

import ctypes
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

CACHE_LINE = 64  # bytes
AHEAD = 12  # rows that are fetched before their turn: memory answers in the time of a few
ON_STACK = 64  # elements
MOST_BYTES = 16 * CACHE_LINE  # of a row: the processor itself fetches on from there


def _array_at(context: Any, builder: Any, kind: Any, address: Any, shape: list[Any]) -> Any:
    """A C-contiguous array without an owner."""
    from numba.np.arrayobj import make_array, populate_array  # slow to import, and there when compiling

    array = make_array(kind)(context, builder)
    item = context.get_abi_sizeof(context.get_data_type(kind.dtype))
    size = ir.IntType(64)(item)
    strides: list[Any] = []
    for extent in reversed(shape):
        strides.insert(0, size)
        size = builder.mul(size, extent)
    data = builder.inttoptr(address, context.get_data_type(kind.dtype).as_pointer())
    populate_array(array, data, shape, strides, ir.IntType(64)(item), None)
    return array._getvalue()


@intrinsic
def _view(context: Any, address: Any, size: Any, like: Any) -> Any:
    def generate(context, builder, signature, arguments):
        return _array_at(context, builder, signature.return_type, arguments[0], [arguments[1]])

    return types.Array(like, 1, "C")(types.int64, types.int64, like), generate


@intrinsic
def _view_2d(context: Any, address: Any, rows: Any, columns: Any, like: Any) -> Any:
    def generate(context, builder, signature, arguments):
        return _array_at(context, builder, signature.return_type, arguments[0], list(arguments[1:3]))

    return types.Array(like, 2, "C")(types.int64, types.int64, types.int64, like), generate


@intrinsic
def _on_stack(context: Any, like: Any) -> Any:
    def generate(context, builder, signature, arguments):
        kind = signature.return_type
        i64 = ir.IntType(64)
        data = cgutils.alloca_once(builder, context.get_data_type(kind.dtype), size=i64(ON_STACK))
        return _array_at(context, builder, kind, builder.ptrtoint(data, i64), [i64(ON_STACK)])

    return types.Array(like, 1, "C")(like), generate


def _prefetch_function(module: ir.Module) -> ir.Function:
    """``void (start, bytes)``, which prefetches each cache line of a row.

    Not inlined: the compiler would unroll its loop at every call, at the price of a second.
    """
    i8, i32, i64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
    pointer = i8.as_pointer()
    function = cgutils.get_or_insert_function(
        module, ir.FunctionType(ir.VoidType(), [i64, i64]), "fastopt_prefetch"
    )
    if function.blocks:
        return function
    function.linkage = "internal"
    function.attributes.add("noinline")
    instruction = cgutils.get_or_insert_function(
        module, ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32]), "llvm.prefetch.p0"
    )
    builder = ir.IRBuilder(function.append_basic_block())
    start, size = function.args
    start = builder.inttoptr(start, pointer)
    most = i64(MOST_BYTES)
    size = builder.select(builder.icmp_signed("<", size, most), size, most)
    with cgutils.for_range_slice(builder, i64(0), size, i64(CACHE_LINE)) as (offset, _):
        # to be read, kept in all levels, data
        builder.call(instruction, [builder.gep(start, [offset]), i32(0), i32(3), i32(1)])
    builder.ret_void()
    return function


@intrinsic
def _prefetch(context: Any, address: Any, size: Any) -> Any:
    def generate(context, builder, signature, arguments):
        builder.call(_prefetch_function(builder.module), arguments)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _python_view(address, size, like):
    """The 1-D array of ``size`` elements, of the type of the number ``like``, at ``address``."""
    if not size or not address:
        return np.empty(0, type(like))
    memory = (ctypes.c_char * (int(size) * np.dtype(type(like)).itemsize)).from_address(int(address))
    return np.frombuffer(memory, type(like))


def _python_view_2d(address, rows, columns, like):
    """The same with two dimensions, C-contiguous."""
    return _python_view(address, rows * columns, like).reshape(rows, columns)


def _python_on_stack(like):
    """An array of ON_STACK elements, of the type of ``like``, for the time of a call: one from NumPy costs as
    much as a row of 64 elements."""
    return np.empty(ON_STACK, type(like))


def _python_prefetch(address, size):
    """Have the first of ``size`` bytes at ``address`` loaded; does nothing without JIT."""


_compiled: Any = not numba.config.DISABLE_JIT  # type: ignore[attr-defined]
view: Any = _view if _compiled else _python_view
view_2d: Any = _view_2d if _compiled else _python_view_2d
on_stack: Any = _on_stack if _compiled else _python_on_stack
prefetch: Any = _prefetch if _compiled else _python_prefetch
