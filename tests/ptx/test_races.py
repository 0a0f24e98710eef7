"""racecheck and initcheck: planted races are found, and programs without any pass."""

import numpy as np
import pytest

from ptx.fault import Fault
from ptx.programs import kernel, run

WORDS = ".shared .align 16 .b8 words[4096];"
OWN = "mov.u64 %rd1, words; mad.wide.u32 %rd1, %r20, 4, %rd1;"  # the thread's own word
LEFT = "xor.b32 %r5, %r20, {0}; mov.u64 %rd2, words; mad.wide.u32 %rd2, %r5, 4, %rd2;"  # another's
RESULT = "mad.wide.u32 %rd0, %r20, 4, %rd20; st.global.u32 [%rd0], %r0;"


def shared(body, block=64, grid=1):
    out = np.zeros(1024, np.int32)
    run(kernel(body, variables=WORDS), out, block=block, grid=grid)
    return out


def races(body, block=64, space="shared"):
    with pytest.raises(Fault, match=f"racecheck: a race: thread .*\n  in .*{space}"):
        shared(body, block)


# A tree of sums over 256 threads with a barrier after each level.
TREE = OWN + "st.shared.u32 [%rd1], %r20; bar.sync 0;" + "".join(
    f"setp.lt.u32 %p0, %r20, {half}; @%p0 ld.shared.u32 %r0, [%rd1];"
    f"@%p0 ld.shared.u32 %r1, [%rd1+{4 * half}];"
    "@%p0 add.s32 %r0, %r0, %r1; @%p0 st.shared.u32 [%rd1], %r0; bar.sync 0;"
    for half in (128, 64, 32, 16, 8, 4, 2, 1)
)  # fmt: skip
TREE += "ld.shared.u32 %r0, [words];" + RESULT
BARRIERS = TREE.count("bar.sync 0;")


def test_a_tree_of_sums():
    assert (shared(TREE, 256)[:256] == sum(range(256))).all()


@pytest.mark.parametrize("gone", range(BARRIERS))
def test_a_tree_of_sums_without_one_of_its_barriers(gone):
    parts = TREE.split("bar.sync 0;")
    text = "bar.sync 0;".join(parts[: gone + 1]) + "bar.sync 0;".join(parts[gone + 1 :])
    assert text.count("bar.sync 0;") == BARRIERS - 1
    races(text, 256)


def test_within_a_warp_a_barrier_of_the_warp_is_enough():
    body = OWN + LEFT.format(1) + "st.shared.u32 [%rd1], %r20; {} ld.shared.u32 %r0, [%rd2];" + RESULT
    out = shared(body.format("bar.warp.sync -1;"))
    np.testing.assert_array_equal(out[:64], np.arange(64) ^ 1)
    races(body.format(""))
    races(body.format("shfl.sync.bfly.b32 %r9, %r9, 1, 31, -1;"))  # which orders no memory


def test_between_warps_a_barrier_of_the_warp_is_not_enough():
    body = OWN + LEFT.format(32) + "st.shared.u32 [%rd1], %r20; {} ld.shared.u32 %r0, [%rd2];" + RESULT
    out = shared(body.format("bar.sync 0;"))
    np.testing.assert_array_equal(out[:64], np.arange(64) ^ 32)
    races(body.format("bar.warp.sync -1;"))


def test_a_write_after_others_have_read():
    body = OWN + LEFT.format(32) + (
        "st.shared.u32 [%rd1], %r20; bar.sync 0; ld.shared.u32 %r0, [%rd2]; {} st.shared.u32 [%rd1], %r0;"
    )  # fmt: skip
    shared(body.format("bar.sync 0;"))
    races(body.format(""))


def test_a_write_after_several_have_read():
    """The reader that is not ordered is neither the first nor the last, and the last is the writer."""
    body = (
        "setp.eq.u32 %p0, %r20, 0; @%p0 st.shared.u32 [words], %r20; bar.sync 0;"
        "setp.eq.u32 %p1, %r20, 33; setp.eq.u32 %p2, %r20, 40;"
        "{} @%p1 ld.shared.u32 %r0, [words]; @%p2 ld.shared.u32 %r0, [words];"
        "bar.warp.sync -1; @%p2 st.shared.u32 [words], %r20;"
    )
    shared(body.format(""))
    races(body.format("@%p0 ld.shared.u32 %r0, [words];"))


@pytest.mark.parametrize("block", [2, 64])
def test_two_writers_of_a_word(block):
    last = block - 1
    body = f"setp.eq.u32 %p0, %r20, 0; setp.eq.u32 %p1, %r20, {last}; or.pred %p0, %p0, %p1;"
    races(body + "@%p0 st.shared.u32 [words], %r20;", block)
    races(body + "@%p0 st.shared.u8 [words], %rs0;", block)
    shared(
        "setp.eq.u32 %p0, %r20, 1; @%p0 st.shared.u32 [words], %r20; @%p0 st.shared.u8 [words], %rs0;", block
    )


def test_neighbours_write_bytes_of_one_word():
    shared(
        "mov.u64 %rd1, words; cvt.u64.u32 %rd2, %r20; add.s64 %rd1, %rd1, %rd2; st.shared.u8 [%rd1], %rs0;"
    )


def test_parts_of_a_word_overlap():
    body = (
        OWN + "setp.eq.u32 %p0, %r20, 8; setp.eq.u32 %p1, %r20, 9; @%p0 st.shared.v2.u32 [%rd1], {%r0, %r1};"
    )
    races(body + "@%p1 st.shared.u8 [%rd1+1], %rs0;")


def test_atomics_do_not_race_with_each_other():
    body = "setp.eq.u32 %p0, %r20, 0; @%p0 st.shared.u32 [words], 0; {} red.shared.add.u32 [words], 1; {}"
    body += "ld.shared.u32 %r0, [words];" + RESULT
    assert (shared(body.format("bar.sync 0;", "bar.sync 0;"))[:64] == 64).all()
    races(body.format("", "bar.sync 0;"))
    races(body.format("bar.sync 0;", ""))


def test_blocks_have_shared_memory_of_their_own():
    body = (
        OWN
        + "mov.u32 %r1, %ctaid.x; st.shared.u32 [%rd1], %r1; ld.shared.u32 %r0, [%rd1];"
        + "setp.ne.s32 %p0, %r0, %r1;"
    )
    shared(body + "@%p0 trap;", grid=70, block=512)


# -- global memory


def on_global(body, block=64, grid=2, size=1024):
    out = np.zeros(size, np.int32)
    run(kernel("mov.u32 %r21, %ctaid.x;" + body), out, block=block, grid=grid)
    return out


def races_in_global(body, block=64, grid=2):
    with pytest.raises(Fault, match=r"racecheck: a race: thread .*; with thread .*\n  in .*global"):
        on_global(body, block, grid)


GLOBAL = "mad.lo.u32 %r3, %r21, 64, %r20; mad.wide.u32 %rd0, %r3, 4, %rd20;"


def test_threads_write_words_of_their_own():
    out = on_global(
        GLOBAL + "ld.global.u32 %r0, [%rd0]; add.s32 %r0, %r0, %r3; st.global.u32 [%rd0], %r0;", grid=16
    )
    np.testing.assert_array_equal(out, np.arange(1024))


def test_two_writers_of_a_global_word():
    races_in_global("st.global.u32 [%rd20], %r20;", 2, 1)
    races_in_global("st.global.u32 [%rd20], %r20;", 1, 2)
    races_in_global("st.global.u32 [%rd20], %r20;", 1, 10_000)
    races_in_global(GLOBAL + "and.b64 %rd0, %rd0, -8; st.global.u32 [%rd0], %r20;")


@pytest.mark.parametrize("grid", [2, 10_000])
def test_a_reader_and_a_writer_of_a_global_word(grid):
    """Also when both blocks do not run at once."""
    writer = f"setp.eq.u32 %p0, %r21, {grid - 1};"
    races_in_global(writer + "ld.global.u32 %r0, [%rd20]; @%p0 st.global.u32 [%rd20], %r0;", 1, grid)
    races_in_global(writer + "@%p0 st.global.u32 [%rd20], %r0; ld.global.u32 %r0, [%rd20];", 1, grid)
    on_global(writer + "@%p0 ld.global.u32 %r0, [%rd20]; @%p0 st.global.u32 [%rd20], %r0;", 1, grid)


def test_a_barrier_orders_the_global_memory_of_a_block():
    body = GLOBAL + (
        "st.global.u32 [%rd0], %r20; {} xor.b32 %r4, %r3, 63; mad.wide.u32 %rd1, %r4, 4, %rd20;"
        "ld.global.u32 %r0, [%rd1];"
    )
    on_global(body.format("bar.sync 0;"))
    races_in_global(body.format(""))
    races_in_global(body.format("bar.warp.sync -1;"))
    races_in_global(body.format("bar.sync 0;").replace("63", "127"))  # what the other block writes


def test_global_atomics():
    out = on_global("mov.u32 %r0, 1; red.global.add.u32 [%rd20], %r0;", 256, 40)
    assert out[0] == 256 * 40
    races_in_global("mov.u32 %r0, 1; red.global.add.u32 [%rd20], %r0; ld.global.u32 %r1, [%rd20];", 2, 1)
    on_global(
        "mov.u32 %r0, 1; red.global.add.u32 [%rd20], %r0; ld.relaxed.gpu.global.u32 %r1, [%rd20];", 2, 1
    )


# -- initcheck


def test_shared_memory_that_nothing_has_written():
    body = OWN + LEFT.format(1) + "{} st.shared.u32 [%rd1], %r20; bar.sync 0; ld.shared.u32 %r0, [%rd2];"
    shared(body.format(""))
    with pytest.raises(Fault, match="initcheck: shared memory is read before it is written: thread 5 "):
        shared(body.format("setp.ne.u32 %p0, %r20, 4; @%p0"))
    with pytest.raises(Fault, match="initcheck"):
        shared("red.shared.add.u32 [words], %r20;")
    with pytest.raises(Fault, match="initcheck"):  # half of it
        shared(
            "setp.eq.u32 %p0, %r20, 0; @%p0 st.shared.u32 [words], %r20; @%p0 ld.shared.u64 %rd1, [words];"
        )
