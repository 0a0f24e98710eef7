"""Branches, barriers, calls, and texts that are not understood."""

import numpy as np
import pytest

from ptx import machine
from ptx.fault import Fault
from ptx.machine import Module, launch
from ptx.memory import Memory
from ptx.programs import HEAD, compute, kernel, run, same

RESULT = "mad.wide.u32 %rd0, %r20, 4, %rd20; st.global.u32 [%rd0], %r0;"


def test_threads_go_round_a_loop_as_often_as_each_wants():
    n = ("u32", np.random.default_rng(0).integers(0, 50, 200).astype(np.uint32))
    body = (
        "mov.u32 %y, 0; mov.u32 %r3, 0;\nLOOP:\n setp.ge.u32 %p0, %r3, %x0; @%p0 bra OUT;"
        "add.u32 %y, %y, %r3; add.u32 %r3, %r3, 1; bra.uni LOOP;\nOUT:\n add.u32 %y, %y, 1;"
    )
    same(compute(body, "u32", n), n[1] * (n[1] - np.uint32(1)) // np.uint32(2) + np.uint32(1))


def test_tables_of_branches():
    x = ("u32", np.arange(40, dtype=np.uint32) % 4)
    body = """
    and.b32 %r5, %x0, 3;
TABLE: .branchtargets ZERO, ONE, TWO, ONE;
    brx.idx %r5, TABLE;
ZERO:
    mov.u32 %y, 10;
    bra OUT;
ONE:
    mov.u32 %y, 11;
    bra OUT;
TWO:
    mov.u32 %y, 12;
OUT:
"""
    same(compute(body, "u32", x), np.array([10, 11, 12, 11], np.uint32)[x[1]])


def test_what_does_not_end(monkeypatch):
    monkeypatch.setattr(machine, "MOST_STRETCHES", 10_000)
    with pytest.raises(Fault, match=r"the launch does not end\n  thread 0 of block 0 in bra AGAIN"):
        run(kernel("\nAGAIN:\n add.u32 %r0, %r0, 1; bra AGAIN;"), np.zeros(1))


def test_a_trap():
    run(kernel("setp.eq.u32 %p0, %r20, 64; @%p0 trap;"), np.zeros(1), block=64)
    with pytest.raises(Fault, match="trap: thread 63 of block 0"):
        run(kernel("setp.eq.u32 %p0, %r20, 63; @%p0 trap;"), np.zeros(1), block=64)


# -- barriers

TURN = """
    setp.lt.u32 %p0, %r20, 10;
    {}
    bar.sync 0;
    {}
"""


def test_a_barrier_that_some_do_not_reach():
    run(kernel(TURN.format("", "")), np.zeros(1), block=64)
    with pytest.raises(Fault, match="synccheck: threads have left before a barrier"):
        run(kernel(TURN.format("@%p0 ret;", "")), np.zeros(1), block=64)
    with pytest.raises(Fault, match="synccheck: threads have left before a barrier"):
        run(kernel(TURN.format("@%p0 bra DONE;", "\nDONE:\n")), np.zeros(1), block=64)
    with pytest.raises(Fault, match="synccheck"):
        run(kernel("setp.lt.u32 %p0, %r20, 10; @%p0 bar.sync 0;"), np.zeros(1), block=64)


def test_threads_at_different_barriers():
    body = "setp.lt.u32 %p0, %r20, 32; @%p0 bra FEW; bar.sync 0; bra DONE;\nFEW:\n bar.sync 0;\nDONE:\n"
    with pytest.raises(Fault, match="synccheck: threads of a block wait at different barriers"):
        run(kernel(body), np.zeros(1), block=64)
    with pytest.raises(Fault, match="synccheck"):
        run(kernel(body.replace("bar.sync 0", "bar.sync 1", 1)), np.zeros(1), block=64)


def test_a_barrier_and_a_shuffle_wait_for_each_other():
    body = "setp.lt.u32 %p0, %r20, 16; @%p0 bra FEW; bar.sync 0; bra DONE;\nFEW:\n bar.warp.sync -1;\nDONE:\n"
    with pytest.raises(Fault, match="never come"):
        run(kernel(body), np.zeros(1), block=32)


def test_barriers_of_some_warps():
    """The first two warps meet at a barrier of their own, that the others do not know of."""
    body = (
        "mov.u64 %rd1, words; mad.wide.u32 %rd1, %r20, 4, %rd1; st.shared.u32 [%rd1], %r20;"
        "setp.ge.u32 %p0, %r20, 64; @%p0 bra DONE; bar.sync 1, 64;\nDONE:\n bar.sync 0; mov.u32 %r0, 7;"
        + RESULT
    )
    out = np.zeros(128, np.int32)
    run(kernel(body, variables=".shared .align 4 .b8 words[512];"), out, block=128)
    assert (out == 7).all()


def test_blocks_go_on_apart():
    """Each block passes as many barriers as its number says."""
    body = (
        "mov.u32 %r1, %ctaid.x; mov.u32 %r2, 0;\nLOOP:\n setp.ge.u32 %p0, %r2, %r1; @%p0 bra OUT;"
        "barrier.sync.aligned 0; add.u32 %r2, %r2, 1; bra LOOP;\nOUT:\n setp.eq.u32 %p1, %r20, 0;"
        "mad.wide.u32 %rd0, %r1, 4, %rd20; @%p1 st.global.u32 [%rd0], %r2;"
    )
    out = np.zeros(9, np.int32)
    run(kernel(body), out, block=40, grid=9)
    np.testing.assert_array_equal(out, np.arange(9))


# -- calls

TWICE = """
.visible .func (.param .b32 twice_result) twice(.param .b32 twice_x, .param .b64 twice_to)
{
    .reg .b32 %r<4>;
    .reg .b64 %rd<2>;
    .reg .pred %p<2>;
    ld.param.u32 %r0, [twice_x];
    ld.param.u64 %rd0, [twice_to];
    setp.lt.u32 %p0, %r0, 10;
    @%p0 bra SMALL;
    st.param.b32 [twice_result+0], 0;
    ret;
SMALL:
    add.u32 %r1, %r0, %r0;
    st.global.u32 [%rd0], %r1;
    st.param.b32 [twice_result+0], %r1;
    ret;
}
"""
CALL = """
    {{
    .param .b32 param0;
    st.param.b32 [param0+0], {0};
    .param .b64 param1;
    st.param.b64 [param1+0], %rd1;
    .param .b32 retval0;
    call.uni (retval0), twice, (param0, param1);
    ld.param.b32 {0}, [retval0+0];
    }}
"""


def test_calls():
    body = (
        "mad.wide.u32 %rd1, %r20, 4, %rd21; mov.u32 %r0, %r20;"
        + CALL.format("%r0")
        + CALL.format("%r0")
        + RESULT
    )
    out, seen = np.zeros(32, np.int32), np.zeros(32, np.int32)
    outside = TWICE.replace(
        "st.param.b32 [twice_result+0], 0;", "mov.u32 %r2, 0; st.param.b32 [twice_result+0], %r2;"
    )
    run(kernel(body, 2, outside), out, seen)
    once = np.where(np.arange(32) < 10, 2 * np.arange(32), 0)
    twice = np.where(once < 10, 2 * once, 0)
    np.testing.assert_array_equal(out, twice)
    np.testing.assert_array_equal(seen, np.where(once < 10, twice, once))


def test_calls_that_cannot_be():
    with pytest.raises(Fault, match=r"not understood: call\.uni"):
        Module(kernel(CALL.format("%r0"), 2))
    forever = ".func again()\n{ call.uni again; ret; }"
    with pytest.raises(Fault, match="again calls itself"):
        Module(kernel("call.uni again;", outside=forever))


# -- what is not understood


@pytest.mark.parametrize(
    "body",
    [
        "add.s33 %r0, %r1, %r2;",
        "add.rz.f32 %f0, %f1, %f2;",
        "frobnicate.b32 %r0, %r1;",
        "tex.2d.v4.f32 %f0, %f1;",
        "ld.global.future.u32 %r0, [%rd20];",
        "ld.moon.u32 %r0, [%rd20];",
        "mov.u32 %r0, %clock;",
        "mov.u32 %r0, nothing;",
        "mov.u32 %q0, 1;",
        "bra NOWHERE;",
        "add.u32 %r0, %r1;",
        "add.u64 %r0, %r1, %r2;",
        "setp.xx.u32 %p0, %r0, %r1;",
        "shfl.sync.left.b32 %r0, %r1, 1, 31, -1;",
        "shfl.up.b32 %r0, %r1, 1, 31;",
        "vote.sync.most.pred %p0, %p1, -1;",
        "bar.arrive 0, 64;",
        "bar.red.popc.u32 %r0, 0, %p0;",
        "atom.global.mul.u32 %r0, [%rd20], %r1;",
        "red.global.add.noftz.f16x2 [%rd20], %r0;",
        "cvt.rs.f16x2.f32 %r0, %f0, %f1, %r1;",
        "cvt.s32.f32 %r0, %f0;",
        "cp.async.ca.shared.global [%r0], [%rd20], 4;",
        "selp.u32 %r0, 1, 0, %r1;",
        "dp4a.u32.u32 %r0, %r1, %r2, %r3;",
    ],
)
def test_what_is_not_understood_is_told(body):
    with pytest.raises(Fault):
        Module(kernel(body))


@pytest.mark.parametrize("body", ["membar.gl;", "fence.acq_rel.gpu;", "prefetch.global.L2 [%rd20];",
                                  "griddepcontrol.wait;", ".pragma \"nounroll\";"])  # fmt: skip
def test_what_has_no_effect_here(body):
    run(kernel(body), np.zeros(1))


def test_one_entry_is_expected():
    with pytest.raises(Fault, match="0 entries"):
        Module(HEAD)


def test_launches_of_nothing():
    module = Module(kernel(""))
    for grid, block in ((0, 32), (1, 0), (1, 1025)):
        with pytest.raises(Fault, match="a launch of"):
            launch(module, Memory(), grid, block, [0])
