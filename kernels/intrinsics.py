"""What kernels need and Numba lacks: arrays at addresses, so that one launch can work on any number of them,
fetching ahead, bits of numbers, and random bits.

An address is an int64. Whoever passes one keeps the memory alive and large enough. Each function is an
intrinsic, which compiles in no time, with a twin for plain Python, which runs without JIT.
"""

import ctypes
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

CACHE_LINE = 64  # bytes
AHEAD = 16  # rows that are fetched before their turn: memory answers in the time of a few
ON_STACK = 64  # elements
MOST_BYTES = 64 * CACHE_LINE  # of a row: the processor itself fetches on from there


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
        data.align = CACHE_LINE  # loads have to wait for a store across two
        return _array_at(context, builder, kind, builder.ptrtoint(data, i64), [i64(ON_STACK)])

    return types.Array(like, 1, "C")(like), generate


def prefetch_instruction(module: ir.Module) -> Any:
    """``emit(builder, pointer)``, which has the cache line at ``pointer`` loaded."""
    i8, i32 = ir.IntType(8), ir.IntType(32)
    instruction = cgutils.get_or_insert_function(
        module, ir.FunctionType(ir.VoidType(), [i8.as_pointer(), i32, i32, i32]), "llvm.prefetch.p0"
    )
    # The row is going to be read, as data, into the second-level cache: a core waits for two dozen lines that
    # are to come into the first, and for more that are to come into the second, whose few cycles it hides.
    return lambda builder, pointer: builder.call(instruction, [pointer, i32(0), i32(2), i32(1)])


def _emit_prefetch(builder: ir.IRBuilder, start: Any, size: Any) -> None:
    """Prefetch each cache line of a row."""
    i64 = ir.IntType(64)
    emit = prefetch_instruction(builder.module)
    most = i64(MOST_BYTES)
    size = builder.select(builder.icmp_signed("<", size, most), size, most)
    line = builder.and_(start, i64(-CACHE_LINE))  # a row may begin within a line, and then has one more
    end = builder.add(start, size)
    lines = builder.add(builder.sub(end, line), i64(CACHE_LINE - 1))
    middle = builder.add(line, builder.and_(lines, i64(-4 * CACHE_LINE)))
    for first, last, at_once in ((line, middle, 4), (middle, end, 1)):
        with cgutils.for_range_slice(builder, first, last, i64(at_once * CACHE_LINE)) as (place, _):
            for k in range(at_once):
                own = builder.add(place, i64(k * CACHE_LINE))
                emit(builder, builder.inttoptr(own, ir.IntType(8).as_pointer()))


def _prefetch_function(module: ir.Module) -> ir.Function:
    """``void (start, bytes)``, which prefetches a row."""
    function = outlined(module, "fastopt_prefetch", *[ir.IntType(64)] * 2)
    if not function.blocks:
        builder = ir.IRBuilder(function.append_basic_block())
        _emit_prefetch(builder, *function.args)
        builder.ret_void()
    return function


def _prefetch_rows_function(module: ir.Module, index: ir.Type) -> ir.Function:
    """``void (address, stride, rows, base, first, last)``, which prefetches rows."""
    i64 = ir.IntType(64)
    function = outlined(module, f"fastopt_prefetch_rows_{index}", *[i64] * 6)
    if not function.blocks:
        address, stride, rows, base, first, last = function.args
        builder = ir.IRBuilder(function.append_basic_block())
        rows = builder.inttoptr(rows, index.as_pointer())
        with cgutils.for_range_slice(builder, first, last, i64(1)) as (k, _):
            row = builder.load(builder.gep(rows, [k]))
            row = builder.sub(row if index == i64 else builder.sext(row, i64), base)
            _emit_prefetch(builder, builder.add(address, builder.mul(row, stride)), stride)
        builder.ret_void()
    return function


def itemsize_of(number: ir.Type) -> int:
    """Bytes of a float or a double."""
    return 4 if number == ir.FloatType() else 8


def lanes_of(builder: ir.IRBuilder, number: ir.Value, lanes: int) -> Any:
    """A vector of so many times the one number."""
    vector = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
    first = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(builder.insert_element(vector, number, ir.IntType(32)(0)), vector, first)


def address_of(context: Any, builder: ir.IRBuilder, kind: Any, array: Any) -> Any:
    """The address of the first element of an array."""
    return builder.ptrtoint(context.make_array(kind)(context, builder, array).data, ir.IntType(64))


def outlined(module: ir.Module, name: str, *arguments: ir.Type) -> ir.Function:
    """A function of arguments of these types, which is not inlined: the compiler would unroll its loop at
    every call, at the price of a second."""
    function = cgutils.get_or_insert_function(module, ir.FunctionType(ir.VoidType(), arguments), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    function.attributes.add("optsize")
    return function


@intrinsic
def _prefetch(context: Any, address: Any, size: Any) -> Any:
    def generate(context, builder, signature, arguments):
        builder.call(_prefetch_function(builder.module), arguments)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _prefetch_rows(context: Any, address: Any, stride: Any, rows: Any, base: Any, first: Any,
                   last: Any) -> Any:  # fmt: skip
    def generate(context, builder, signature, arguments):
        address, stride, array, *others = arguments
        start = address_of(context, builder, rows, array)
        function = _prefetch_rows_function(builder.module, context.get_data_type(rows.dtype))
        builder.call(function, [address, stride, start, *others])
        return context.get_dummy_value()

    count = types.int64
    return types.void(count, count, rows, count, count, count), generate


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


def _python_prefetch_rows(address, stride, rows, base, first, last):
    """Have the rows ``rows[k] - base`` loaded, for k from ``first`` to ``last``, of an array at ``address``
    with ``stride`` bytes a row, or the first of each; ``rows`` is C-contiguous. Does nothing without JIT."""


def _convert(name: str, source: Any, result: Any) -> Any:
    """A conversion: ``name`` is "bits" (which stay), "extend" (from half) or "truncate" (to half)."""
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
    """Written as instructions because Numba would compute with 64 bits, in half as many lanes."""

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
view: Any = _view if _compiled else _python_view
view_2d: Any = _view_2d if _compiled else _python_view_2d
on_stack: Any = _on_stack if _compiled else _python_on_stack
prefetch: Any = _prefetch if _compiled else _python_prefetch
prefetch_rows: Any = _prefetch_rows if _compiled else _python_prefetch_rows
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
