"""Loads, stores and atomics: what they do, and which are refused."""

import numpy as np
import pytest

from ptx.fault import Fault
from ptx.machine import Module, launch
from ptx.memory import Memory
from ptx.programs import HEAD, compute, kernel, memory_of, run, same

COPY = "mad.wide.u32 %rd0, %r20, {0}, %rd20; mad.wide.u32 %rd1, %r20, {0}, %rd21;"


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_numbers_are_copied(size):
    register = {1: "%rs0", 2: "%rs0", 4: "%r0", 8: "%rd5"}[size]
    source = np.random.default_rng(0).integers(0, 255, 64 * size, np.uint8, endpoint=True)
    target = np.zeros_like(source)
    body = (
        COPY.format(size)
        + f"ld.global.u{8 * size} {register}, [%rd1]; st.global.u{8 * size} [%rd0], {register};"
    )
    run(kernel(body, 2), target, source, block=64)
    np.testing.assert_array_equal(target, source)


def test_vectors_are_copied():
    source, target = np.arange(128, dtype=np.float32), np.zeros(128, np.float32)
    body = COPY.format(16) + (
        "ld.global.nc.L1::no_allocate.v4.f32 {%f0, %f1, %f2, %f3}, [%rd1];"
        "st.global.v2.f32 [%rd0+8], {%f2, %f3}; st.global.v2.f32 [%rd0], {%f0, %f1};"
    )
    run(kernel(body, 2), target, source)
    np.testing.assert_array_equal(target, source)


def test_small_numbers_are_extended():
    values = [("u8", np.array([0, 1, 127, 128, 255], np.uint8))]
    body = "mad.wide.u32 %rd1, %r2, 1, %rd21; ld.global.{}8 {}, [%rd1]; {}"
    signed = compute(body.format("s", "%y", ""), "s32", *values)
    same(signed, np.array([0, 1, 127, -128, -1], np.int32))
    same(compute(body.format("u", "%y", ""), "s32", *values), np.array([0, 1, 127, 128, 255], np.int32))


def test_addresses_are_moved():
    source, target = np.arange(34, dtype=np.int32), np.zeros(32, np.int32)
    body = COPY.format(4) + (
        "ld.global.u32 %r0, [%rd1+8]; add.s64 %rd1, %rd1, 4; ld.global.u32 %r1, [%rd1+-4];"
        "sub.s32 %r0, %r0, %r1; st.global.u32 [%rd0], %r0;"
    )
    run(kernel(body, 2), target, source)
    assert (target == 2).all()


def test_parameters_of_all_types():
    text = (
        f"{HEAD}.visible .entry kernel(.param .u64 out, .param .f32 x, .param .s32 n, .param .f64 y,"
        " .param .u8 small, .param .align 8 .b8 pair[16])\n{ .reg .f32 %f<3>;"
        ".reg .f64 %fd<6>; .reg .b32 %r<3>; .reg .b64 %rd<3>;"
        ".reg .b16 %rs<3>; ld.param.u64 %rd0, [out]; ld.param.f32 %f0, [x]; ld.param.s32 %r0, [n];"
        "ld.param.f64 %fd0, [y]; ld.param.u8 %rs0, [small]; ld.param.v2.f64 {%fd4, %fd5}, [pair];"
        "ld.param.f64 %fd5, [pair+8];"
        "cvt.f64.f32 %fd1, %f0; cvt.rn.f64.s32 %fd2, %r0; cvt.rn.f64.u16 %fd3, %rs0;"
        "st.global.f64 [%rd0], %fd0; st.global.f64 [%rd0+8], %fd1; st.global.f64 [%rd0+16], %fd2;"
        "st.global.f64 [%rd0+24], %fd3; st.global.f64 [%rd0+32], %fd4; st.global.f64 [%rd0+40], %fd5; ret; }"
    )
    out = np.zeros(6)
    pair = np.array([0.1, 0.7])
    launch(Module(text), memory_of(out), 1, 1, [out.ctypes.data, 0.1, -3, 0.3, 200, pair])
    np.testing.assert_array_equal(out, [0.3, np.float32(0.1), -3, 200, 0.1, 0.7])
    with pytest.raises(Fault, match="5 arguments for 6 parameters"):
        launch(Module(text), memory_of(out), 1, 1, [out.ctypes.data, 0.1, -3, 0.3, 200])


def test_local_memory_is_each_threads_own():
    body = (
        "mov.b64 %rd1, depot; cvta.local.u64 %rd2, %rd1; st.local.u32 [%rd1+4], %r20; st.u32 [%rd2], %r20;"
        "ld.u32 %r0, [%rd2+4]; ld.local.u32 %r1, [depot]; add.u32 %r0, %r0, %r1;"
        "mad.wide.u32 %rd0, %r20, 4, %rd20; st.global.u32 [%rd0], %r0;"
    )
    out = np.zeros(64, np.int32)
    text = kernel(body, variables=".local .align 8 .b8 depot[8];")
    run(text, out, block=64)
    np.testing.assert_array_equal(out, 2 * np.arange(64))
    with pytest.raises(Fault, match="there are 8 bytes of local memory"):
        run(text.replace("[depot]", "[depot+8]"), out, block=64)


def test_generic_addresses_of_all_spaces():
    body = (
        "mov.u64 %rd1, buffer; cvta.shared.u64 %rd2, %rd1; mul.wide.u32 %rd3, %r20, 4;"
        "add.s64 %rd2, %rd2, %rd3;"
        "cvta.to.global.u64 %rd4, %rd20; cvta.global.u64 %rd4, %rd4; add.s64 %rd4, %rd4, %rd3;"
        "st.u32 [%rd2], %r20; ld.u32 %r0, [%rd2]; st.u32 [%rd4], %r0; cvta.to.shared.u64 %rd5, %rd2;"
        "ld.shared.u32 %r1, [%rd5]; setp.ne.s32 %p0, %r0, %r1; @%p0 trap;"
    )
    out = np.zeros(32, np.int32)
    run(kernel(body, variables=".shared .align 4 .b8 buffer[128];"), out)
    np.testing.assert_array_equal(out, np.arange(32))


def test_tables_of_the_module():
    outside = ".global .align 4 .b32 table[4] = {5, 0x10, -1, 7};\n"
    outside += ".const .align 8 .f64 half = {0d3FE0000000000000};"
    body = (
        "mov.u64 %rd1, table; and.b32 %r0, %r20, 3; mad.wide.u32 %rd2, %r0, 4, %rd1;"
        "ld.global.u32 %r1, [%rd2];"
        "ld.const.f64 %fd0, [half]; cvt.rn.f64.s32 %fd1, %r1; mul.f64 %fd1, %fd1, %fd0;"
        "mad.wide.u32 %rd0, %r20, 8, %rd20; st.global.f64 [%rd0], %fd1;"
    )
    out = np.zeros(32)
    run(kernel(body, outside=outside), out)
    np.testing.assert_array_equal(out, np.tile([2.5, 8, -0.5, 3.5], 8))


def test_dynamic_shared_memory():
    body = (
        "mov.u64 %rd1, dynamic; mad.wide.u32 %rd1, %r20, 4, %rd1; st.shared.u32 [%rd1], %r20;"
        "mov.u32 %r0, 9; st.shared.u32 [fixed], %r0;"
        "ld.shared.u32 %r0, [%rd1]; mad.wide.u32 %rd0, %r20, 4, %rd20; st.global.u32 [%rd0], %r0;"
    ).replace("st.shared.u32 [fixed]", "@%p0 st.shared.u32 [fixed]")
    body = "setp.eq.u32 %p0, %r20, 0;" + body
    outside = ".extern .shared .align 16 .b8 dynamic[];\n.shared .align 4 .b8 fixed[4];"
    out = np.zeros(32, np.int32)
    run(kernel(body, outside=outside), out, dynamic_shared=128)
    np.testing.assert_array_equal(out, np.arange(32))
    with pytest.raises(Fault, match="out of bounds"):
        run(kernel(body, outside=outside), out, dynamic_shared=124)


# -- atomics

OPERATIONS = {
    "add": lambda old, x: old + x,
    "min": min,
    "max": max,
    "exch": lambda old, x: x,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
    "inc": lambda old, x: 0 if old >= x else old + 1,
    "dec": lambda old, x: x if old == 0 or old > x else old - 1,
}
ATOMIC_KINDS = [
    *[(name, kind) for name in ("add", "min", "max") for kind in ("u32", "s32", "u64", "s64")],
    *[(name, kind) for name in ("exch", "and", "or", "xor") for kind in ("b32", "b64")],
    ("inc", "u32"), ("dec", "u32"), ("add", "f32"), ("add", "f64"),
]  # fmt: skip


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("name", "kind"), ATOMIC_KINDS, ids=[f"{a}-{b}" for a, b in ATOMIC_KINDS])
def test_atomics_have_an_order(name, kind, space):
    """What each thread found is what another left, and what is left in the end is the last of them."""
    dtype = np.dtype({"b": "u", "u": "u", "s": "i", "f": "f"}[kind[0]] + str(int(kind[1:]) // 8))
    rng, size, function = np.random.default_rng(1), dtype.itemsize, OPERATIONS[name]
    values = (
        (rng.standard_normal(64) * 50).astype(dtype) if kind[0] != "u" else rng.integers(0, 99, 64, dtype)
    )
    start, old = values[:1].copy(), np.zeros(64, dtype)
    x, y = ("%r0", "%r1") if size == 4 else ("%rd5", "%rd6")
    bits = f"b{8 * size}"
    body = f"mad.wide.u32 %rd0, %r20, {size}, %rd21; ld.global.{bits} {x}, [%rd0];"
    body += f"mad.wide.u32 %rd1, %r20, {size}, %rd22;"
    if space == "shared":
        first = "setp.eq.u32 %p0, %r20, 0;"
        first += f"@%p0 ld.global.{bits} {y}, [%rd20]; @%p0 st.shared.{bits} [word], {y};"
        last = f"bar.sync 0; @%p0 ld.shared.{bits} {x}, [word]; @%p0 st.global.{bits} [%rd20], {x};"
        body += f"{first} bar.sync 0; atom.shared.{name}.{kind} {y}, [word], {x};"
        body += f"st.global.{bits} [%rd1], {y}; {last}"
    else:
        body += f"atom.relaxed.gpu.global.{name}.{kind} {y}, [%rd20], {x}; st.global.{bits} [%rd1], {y};"
    final = start.copy()
    run(kernel(body, 3, variables=f".shared .align 8 .b8 word[{size}];"), final, values, old, block=64)
    now, mask = start[0], (1 << 8 * size) - 1
    for found, value in zip(old, values, strict=True):  # the interpreter's order is that of the threads
        assert found == now
        if kind[0] == "f":
            now = dtype.type(function(now, value))
        else:
            now = np.array(function(int(now), int(value)) & mask, f"u{size}").view(dtype)[()]
    assert final[0] == now


def test_compare_and_swap_takes_turns():
    """A lock that each thread spins for."""
    body = """
AGAIN:
    atom.global.cas.b32 %r0, [%rd20], 0, 1;
    setp.ne.s32 %p0, %r0, 0;
    @%p0 bra AGAIN;
    ld.relaxed.gpu.global.u32 %r1, [%rd20+4];
    add.s32 %r1, %r1, 1;
    st.relaxed.gpu.global.u32 [%rd20+4], %r1;
    atom.global.exch.b32 %r0, [%rd20], 0;
"""
    state = np.zeros(2, np.int32)
    run(kernel(body), state, grid=2, block=8)
    np.testing.assert_array_equal(state, [0, 16])


def test_reductions_give_nothing_back():
    out = np.zeros(2, np.float64)
    body = "cvt.rn.f64.u32 %fd0, %r20; red.global.add.f64 [%rd20+8], %fd0;"
    run(kernel(body), out, grid=3, block=40)
    np.testing.assert_array_equal(out, [0, 3 * sum(range(40))])


# -- memcheck

STORE = "mad.wide.u32 %rd0, %r20, 4, %rd20; st.global.u32 [%rd0], %r20;"
LOAD = "mad.wide.u32 %rd0, %r20, 4, %rd20; ld.global.u32 %r0, [%rd0];"
ATOM = "mad.wide.u32 %rd0, %r20, 4, %rd20; red.global.add.u32 [%rd0], %r20;"
ACCESSES = pytest.mark.parametrize("body", [STORE, LOAD, ATOM], ids=["st", "ld", "red"])


@ACCESSES
def test_one_element_too_many(body):
    array = np.zeros(64, np.int32)
    run(kernel(body), array, block=64)
    memory = Memory()
    memory.add(array.ctypes.data, 63 * 4)
    text = (
        r"memcheck: out of bounds: thread 63 of block 0, 4 bytes at \S+; 1 bytes from the nearest allocation"
    )
    with pytest.raises(Fault, match=text):
        launch(Module(kernel(body)), memory, 1, 64, [array.ctypes.data])


@ACCESSES
def test_one_element_too_early(body):
    array = np.zeros(64, np.int32)
    memory = Memory()
    memory.add(array.ctypes.data + 4, 63 * 4)
    with pytest.raises(Fault, match="memcheck: out of bounds: thread 0 of block 0"):
        launch(Module(kernel(body)), memory, 1, 64, [array.ctypes.data])


@ACCESSES
def test_half_of_an_access_lies_outside(body):
    array = np.zeros(64, np.int32)
    memory = Memory()
    memory.add(array.ctypes.data, 63 * 4 + 2)
    with pytest.raises(Fault, match="memcheck: out of bounds: thread 63"):
        launch(Module(kernel(body)), memory, 1, 64, [array.ctypes.data])


@ACCESSES
def test_an_array_that_was_removed(body):
    array = np.zeros(64, np.int32)
    memory = memory_of(array, np.zeros(4))
    memory.remove(array.ctypes.data)
    with pytest.raises(Fault, match="memcheck: out of bounds: thread 0"):
        launch(Module(kernel(body)), memory, 1, 64, [array.ctypes.data])


@ACCESSES
def test_misaligned(body):
    array = np.zeros(300, np.uint8)
    with pytest.raises(Fault, match="memcheck: misaligned: thread 0 of block 0, 4 bytes"):
        launch(Module(kernel(body)), memory_of(array), 1, 64, [array.ctypes.data + 2])


def test_a_vector_is_aligned_to_all_of_it():
    array = np.zeros(100, np.float32)
    first = -(array.ctypes.data // 4) % 4 * 4
    body = "mul.wide.u32 %rd1, %r20, 16; add.s64 %rd0, %rd20, %rd1;"
    body += "ld.global.v4.f32 {%f0, %f1, %f2, %f3}, [%rd0];"
    module = Module(kernel(body))
    launch(module, memory_of(array), 1, 16, [array.ctypes.data + first])
    with pytest.raises(Fault, match="memcheck: misaligned"):
        launch(module, memory_of(array), 1, 16, [array.ctypes.data + first + 4])


@pytest.mark.parametrize("body", [STORE, ATOM], ids=["st", "red"])
def test_what_is_read_only(body):
    array = np.arange(64, dtype=np.int32)
    array.flags.writeable = False
    run(kernel(LOAD), array)
    with pytest.raises(Fault, match="memcheck: a write to what is read only: thread 0"):
        run(kernel(body), array)
    np.testing.assert_array_equal(array, np.arange(64))


def test_a_null_pointer():
    with pytest.raises(Fault, match="memcheck: out of bounds: thread 0"):
        launch(Module(kernel(LOAD)), memory_of(np.zeros(3)), 1, 1, [0])
    with pytest.raises(Fault, match="there are no allocations"):
        launch(Module(kernel(LOAD)), Memory(), 1, 1, [0])


def test_accesses_of_those_who_are_guarded_do_not_count():
    array = np.zeros(32, np.int32)
    body = "setp.lt.u32 %p0, %r20, 32; mad.wide.u32 %rd0, %r20, 4, %rd20; @%p0 st.global.u32 [%rd0], %r20;"
    run(kernel(body), array, block=128)
    np.testing.assert_array_equal(array, np.arange(32))
    with pytest.raises(Fault, match="out of bounds: thread 32"):
        run(kernel(body.replace("@%p0", "")), array, block=128)


def test_many_allocations():
    arrays = [np.full(8, k, np.int64) for k in range(2000)]
    table = np.array([array.ctypes.data for array in arrays])
    body = (
        "mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mad.lo.u32 %r0, %r1, %r2, %r20;"
        "mad.wide.u32 %rd0, %r0, 8, %rd20; ld.global.u64 %rd1, [%rd0];"
        "ld.global.u64 %rd2, [%rd1+56]; add.s64 %rd2, %rd2, 1; st.global.u64 [%rd1], %rd2;"
    )
    module, memory = Module(kernel(body)), memory_of(table, *arrays)
    launch(module, memory, 20, 100, [table.ctypes.data])
    assert all(array[0] == k + 1 for k, array in enumerate(arrays))
    memory.remove(arrays[1234].ctypes.data)
    with pytest.raises(Fault, match="thread 34 of block 12"):
        launch(module, memory, 20, 100, [table.ctypes.data])


def test_allocations_do_not_overlap():
    memory, array = Memory(), np.zeros(100)
    memory.add(array.ctypes.data, 800)
    memory.add(array.ctypes.data + 400, 100)
    with pytest.raises(ValueError, match="overlap"):
        memory.table()
