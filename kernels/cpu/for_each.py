"""Loops whose turns any thread may take.

Of a ``prange`` Numba makes functions at four levels, each of which holds the loop's body and is compiled by
itself, and a kernel would need a second variant for one thread. Here a loop's body is a function that is
called through its address, by the kernel itself or by :func:`turns`, which is compiled once for all kernels
and hands the loop to the threads as Numba's code for a ``prange`` does.
"""

from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_NUMBERS = types.int64, types.int64  # what a turn gets: the address of the loop's arguments, and its number


def _python_for_each(team, function, count, arguments):
    """Call the helper ``function`` with ``k`` and the members of the tuple ``arguments`` for each k below
    ``count``: one after another if ``team`` is 0; else ``team`` is the address of :func:`turns`, and each
    thread takes one stretch of them, in order."""
    for k in range(count):
        function(k, *arguments)


@intrinsic
def _for_each(typing: Any, team: Any, function: Any, count: Any, arguments: Any) -> Any:
    called = function.get_call_type(typing, (types.int64, *arguments.types), {})

    def generate(context, builder, signature, values):
        i64 = ir.IntType(64)
        team, _, count, packed = values
        record = builder.ptrtoint(cgutils.alloca_once_value(builder, packed), i64)
        turn = _turn_function(context, builder, function, called, arguments, packed.type)
        with builder.if_else(builder.icmp_signed("==", team, i64(0))) as (alone, together):
            with alone, cgutils.for_range(builder, count) as loop:
                status = _call_turn(context, builder, turn, record, loop.index)
                with cgutils.if_unlikely(builder, status.is_error):
                    context.call_conv.return_status_propagate(builder, status)
            with together:
                kind = ir.FunctionType(i64, [i64] * 3).as_pointer()
                address = builder.ptrtoint(turn, i64)
                failed = builder.call(builder.inttoptr(team, kind), [address, record, count])
                with cgutils.if_unlikely(builder, builder.icmp_signed("!=", failed, i64(0))):
                    context.call_conv.return_user_exc(builder, MemoryError, ("too little for a kernel",))
        return context.get_dummy_value()

    return types.void(types.int64, function, types.int64, arguments), generate


def _turn_function(
    context: Any, builder: Any, function: Any, called: Any, arguments: Any, packed: Any
) -> Any:
    """The function ``(address of arguments, k)`` of a loop, which is called as Numba's functions are."""
    kind = context.call_conv.get_function_type(types.none, _NUMBERS)
    name = builder.module.get_unique_name("fastopt_turn")
    turn = ir.Function(builder.module, kind, name)
    turn.linkage = "internal"
    turn.attributes.add("noinline")  # else the kernel holds the loop's body twice
    own = ir.IRBuilder(turn.append_basic_block())
    record, k = context.call_conv.get_arguments(turn)
    loaded = _without_owner(context, own, arguments, own.load(own.inttoptr(record, packed.as_pointer())))
    values = cgutils.unpack_tuple(own, loaded)
    context.get_function(function, called)(own, [k, *values])
    context.call_conv.return_value(own, context.get_dummy_value())
    return turn


def _without_owner(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """``value``, arrays in it without owners: threads that count references to one owner wait for each other,
    which took half of the time of sparse steps. The kernel's caller keeps the owners."""
    if isinstance(kind, types.BaseTuple):
        for k, member in enumerate(kind.types):  # type: ignore[attr-defined]
            own = _without_owner(context, builder, member, builder.extract_value(value, k))
            value = builder.insert_value(value, own, k)
    elif isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo, array.parent = (ir.Constant(x.type, None) for x in (array.meminfo, array.parent))
        value = array._getvalue()
    return value


def _call_turn(context: Any, builder: Any, turn: Any, record: Any, k: Any) -> Any:
    status, _ = context.call_conv.call_function(builder, turn, types.none, _NUMBERS, [record, k])
    return status


@intrinsic
def _share_turns(typing: Any, turn: Any, record: Any, count: Any) -> Any:
    def generate(context, builder, signature, values):
        i64, pointer = ir.IntType(64), ir.IntType(8).as_pointer()
        turn, record, count = values
        shared = cgutils.alloca_once(builder, i64, size=3)
        for k, value in enumerate((turn, record, i64(0))):
            builder.store(value, builder.gep(shared, [i64(k)]))
        # The threads get the number of their first turn as a place in an array at 0, with elements of a byte.
        places = pointer(None), count, i64(1)
        start, sizes, steps = (cgutils.alloca_once_value(builder, value) for value in places)
        given = _stretch_function(context, builder.module), start, sizes, steps, shared
        kind = ir.FunctionType(ir.VoidType(), [pointer] * 5 + [i64] * 3)
        share = cgutils.get_or_insert_function(builder.module, kind, "numba_parallel_for")
        threads = cgutils.get_or_insert_function(builder.module, ir.FunctionType(i64, []), "get_num_threads")
        given = [builder.bitcast(value, pointer) for value in given]
        builder.call(share, [*given, i64(0), i64(1), builder.call(threads, [])])
        return builder.load(builder.gep(shared, [i64(2)]))

    return types.int64(types.int64, types.int64, types.int64), generate


def _stretch_function(context: Any, module: Any) -> Any:
    """The function by which a thread takes its turns: ``void (arrays, sizes, steps, data)``, of one array."""
    i64, pointer = ir.IntType(64), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer.as_pointer(), i64.as_pointer(), i64.as_pointer(), pointer])
    stretch = ir.Function(module, kind, "fastopt_stretch")
    stretch.linkage = "internal"
    builder = ir.IRBuilder(stretch.append_basic_block())
    arrays, sizes, _, data = stretch.args
    data = builder.bitcast(data, i64.as_pointer())
    turn, record, failed = (builder.gep(data, [i64(k)]) for k in range(3))
    first = builder.ptrtoint(builder.load(arrays), i64)
    kind = context.call_conv.get_function_type(types.none, _NUMBERS)
    function, record = builder.inttoptr(builder.load(turn), kind.as_pointer()), builder.load(record)
    with cgutils.for_range(builder, builder.load(sizes)) as loop:
        status = _call_turn(context, builder, function, record, builder.add(first, loop.index))
        with cgutils.if_unlikely(builder, status.is_error):
            builder.store(i64(1), failed)
    builder.ret_void()
    return stretch


def turns(turn, record, count):
    """Have the threads take the turns of a loop, ``turn`` and ``record`` being the addresses of its function
    and of its arguments. Returns 1 if one has failed, else 0: kernels raise nothing but that there is no
    memory, and a thread has nobody to raise it to."""
    return _share_turns(turn, record, count)


for_each: Any = _python_for_each if numba.config.DISABLE_JIT else _for_each  # type: ignore[attr-defined]
