"""What lanes of a warp do together, and who misses it."""

import numpy as np
import pytest

from ptx.fault import Fault
from ptx.programs import compute, kernel, run, same

LANES = np.arange(64) % 32
FIRST = np.arange(64) - LANES
RESULT = "mad.wide.u32 %rd0, %r20, 4, %rd20; st.global.u32 [%rd0], %r0;"


def values(kind="u32", count=64, high=1 << 31):
    return kind, np.random.default_rng(3).integers(0, high, count).astype(
        {"u32": np.uint32, "s32": np.int32}[kind]
    )


@pytest.mark.parametrize("width", [32, 16, 8, 4, 2, 1])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("by", [0, 1, 3, 5, 16, 31])
def test_shuffles(mode, width, by):
    """As CUDA's __shfl_sync is described: within groups of ``width`` lanes."""
    x = values()
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    body = f"shfl.sync.{mode}.b32 %y|%p0, %x0, {by}, {clamp}, -1; @!%p0 add.u32 %y, %y, 1;"
    expected = []
    for k in range(64):
        lane, group = k % width, k - k % width
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": by % width}[mode]
        inside = 0 <= source < width
        if mode == "bfly" and k % 32 ^ by <= (k % 32 | width - 1):  # lower groups may be read
            source, inside = (k % 32 ^ by) - group % 32, True
        expected.append(int(x[1][group + source]) if inside else int(x[1][k]) + 1)
    same(compute(body, "u32", x), np.array(expected, np.uint32))


def test_a_shuffle_by_a_register():
    x, by = values(), ("u32", np.random.default_rng(4).integers(0, 32, 64).astype(np.uint32))
    got = compute("shfl.sync.idx.b32 %y, %x0, %x1, 31, 0xffffffff;", "u32", x, by)
    same(got, x[1][FIRST + by[1]])


def test_votes():
    x = values(high=3)
    p = (x[1] == 0).reshape(2, 32)
    ballot = (p * (1 << np.arange(32))).sum(1).astype(np.uint32)
    body = "setp.eq.u32 %p0, %x0, 0; vote.sync.{} {}, {}%p0, -1; {}"
    select = "selp.u32 %y, 1, 0, %p1;"
    same(compute(body.format("ballot.b32", "%y", "", ""), "u32", x), ballot.repeat(32))
    same(compute(body.format("ballot.b32", "%y", "!", ""), "u32", x), (~ballot).repeat(32))
    for data in (x, ("u32", np.zeros(64, np.uint32)), ("u32", np.ones(64, np.uint32))):
        p = (data[1] == 0).reshape(2, 32)
        for how, expected in (("any", p.any(1)), ("all", p.all(1)), ("uni", p.all(1) | ~p.any(1))):
            got = compute(body.format(f"{how}.pred", "%p1", "", select), "u32", data)
            same(got, expected.astype(np.uint32).repeat(32))


def test_votes_of_some_lanes():
    x = values(high=3)
    body = (
        "setp.eq.u32 %p0, %x0, 0; and.b32 %r1, %r20, 1; setp.eq.u32 %p1, %r1, 1; mov.u32 %y, 0; @%p1 bra ODD;"
        "vote.sync.ballot.b32 %y, %p0, 0x55555555; bra JOIN;"
        "\nODD:\n vote.sync.ballot.b32 %y, %p0, 0xaaaaaaaa;\nJOIN:"
    )
    bits = ((x[1] == 0).reshape(2, 32) * (1 << np.arange(32))).sum(1)
    masks = np.where(LANES % 2, 0xAAAAAAAA, 0x55555555)
    same(compute(body, "u32", x), (bits.repeat(32) & masks).astype(np.uint32))


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_matches(kind):
    x = values(high=5)
    equal = x[1].reshape(2, 32, 1) == x[1].reshape(2, 1, 32)
    masks = (equal * (1 << np.arange(32))).sum(2).ravel().astype(np.uint32)
    wide = "mov.b64 %rd5, {%r9, %x0};" if kind == "b64" else ""
    source = "%rd5" if wide else "%x0"
    same(compute(f"{wide} match.any.sync.{kind} %y, {source}, -1;", "u32", x), masks)
    body = f"{wide} match.all.sync.{kind} %y|%p0, {source}, -1; @%p0 sub.u32 %y, %y, 1;"
    same(compute(body, "u32", x), np.zeros(64, np.uint32))
    one = ("u32", np.full(64, 7, np.uint32))
    same(compute(body, "u32", one), np.full(64, 2**32 - 2, np.uint32))


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_reductions(kind):
    x = values(kind)
    x = kind, x[1] - x[1].dtype.type(1 << 30)
    rows = x[1].reshape(2, 32)
    for name, ufunc in (("add", np.add), ("min", np.minimum), ("max", np.maximum)):
        got = compute(f"redux.sync.{name}.{kind} %y, %x0, -1;", kind, x)
        same(got, ufunc.reduce(rows, 1, dtype=rows.dtype).repeat(32))
    if kind == "u32":
        for name, ufunc in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
            got = compute(f"redux.sync.{name}.b32 %y, %x0, -1;", kind, x)
            same(got, ufunc.reduce(rows, 1).repeat(32))


def test_the_lanes_that_are_active():
    body = "activemask.b32 %r0; setp.lt.u32 %p0, %r20, 40; @%p0 bra DONE; activemask.b32 %r0;\nDONE:" + RESULT
    out = np.zeros(50, np.uint32)
    run(kernel(body), out, block=50)
    np.testing.assert_array_equal(out, [2**32 - 1] * 32 + [2**18 - 1] * 8 + [2**18 - 2**8] * 10)


def test_special_registers():
    names = {
        "%laneid": lambda t: t % 32,
        "%warpid": lambda t: t // 32,
        "%tid.y": lambda t: 0 * t,
        "%ntid.x": lambda t: 0 * t + 70,
        "%ntid.z": lambda t: 0 * t + 1,
        "%nctaid.x": lambda t: 0 * t + 1,
        "%ctaid.x": lambda t: 0 * t,
        "%lanemask_eq": lambda t: 1 << t % 32,
        "%lanemask_lt": lambda t: (1 << t % 32) - 1,
        "%lanemask_le": lambda t: (2 << t % 32) - 1,
        "%lanemask_gt": lambda t: 2**32 - (2 << t % 32),
        "%lanemask_ge": lambda t: 2**32 - (1 << t % 32),
    }
    for name, function in names.items():
        out = np.zeros(70, np.uint32)
        run(kernel(f"mov.u32 %r0, {name};" + RESULT), out, block=70)
        np.testing.assert_array_equal(out, function(np.arange(70)), name)


def test_lanes_that_come_on_different_ways_wait_for_each_other():
    body = (
        "and.b32 %r1, %r20, 3; mov.u32 %r2, 0;\nLOOP:\n setp.ge.u32 %p0, %r2, %r1; @%p0 bra OUT;"
        "add.u32 %r2, %r2, 1; bra LOOP;\nOUT:\n shfl.sync.bfly.b32 %r0, %r2, 1, 31, -1;" + RESULT
    )
    out = np.zeros(32, np.uint32)
    run(kernel(body), out)
    np.testing.assert_array_equal(out, (np.arange(32) & 3) ^ 1)


# -- synccheck

QUIT = "setp.eq.u32 %p0, %r20, {0}; @%p0 exit;"


@pytest.mark.parametrize(
    "instruction",
    ["shfl.sync.idx.b32 %r0, %r20, 0, 31, -1;", "vote.sync.ballot.b32 %r0, %p0, -1;", "bar.warp.sync -1;",
     "match.any.sync.b32 %r0, %r20, -1;", "redux.sync.add.u32 %r0, %r20, -1;"],
    ids=["shfl", "vote", "bar", "match", "redux"],
)  # fmt: skip
class TestLanesThatAreMissing:
    def test_they_have_left(self, instruction):
        with pytest.raises(Fault, match=r"synccheck: thread \d+ of block 0 names lanes that have left"):
            run(kernel(QUIT.format(40) + instruction), np.zeros(1), block=64)
        run(kernel(QUIT.format(99) + instruction), np.zeros(1), block=64)

    def test_they_never_were(self, instruction):
        with pytest.raises(Fault, match="names lanes that have left or never were"):
            run(kernel(instruction), np.zeros(1), block=48)

    def test_they_leave_later(self, instruction):
        body = "setp.lt.u32 %p0, %r20, 3; @%p0 bra LATE;" + instruction + "ret;\nLATE:\n"
        with pytest.raises(Fault, match="synccheck: threads wait for others that never come"):
            run(kernel(body), np.zeros(1), block=32)

    def test_a_lane_does_not_name_itself(self, instruction):
        with pytest.raises(Fault, match="synccheck: thread 31 of block 0 is not in the mask"):
            run(kernel(instruction.replace("-1;", "0x7fffffff;")), np.zeros(1), block=32)

    def test_masks_differ(self, instruction):
        body = "setp.lt.u32 %p1, %r20, 8; selp.b32 %r5, -1, 0xffff, %p1;"
        body += "setp.lt.u32 %p2, %r20, 16; @!%p2 bra DONE;"
        with pytest.raises(Fault, match="synccheck"):
            run(kernel(body + instruction.replace("-1;", "%r5;") + "\nDONE:"), np.zeros(1), block=32)


def test_a_shuffle_from_a_lane_that_does_not_take_part():
    body = "setp.ge.u32 %p0, %r20, 16; @%p0 bra DONE; shfl.sync.bfly.b32 %r0, %r20, {}, 31, 0xffff;\nDONE:"
    run(kernel(body.format(8)), np.zeros(1))
    with pytest.raises(Fault, match="synccheck: thread 0 of block 0 reads a lane that does not take part"):
        run(kernel(body.format(16)), np.zeros(1))
