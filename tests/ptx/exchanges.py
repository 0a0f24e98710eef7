"""Instructions that lanes of a warp execute together, as functions of columns and of those who take part."""

from collections.abc import Callable

import numpy as np

from . import checked as m
from . import warps
from .arithmetic import not_understood
from .columns import Columns
from .fault import Fault
from .kinds import KINDS
from .parse import Instruction

Meet = Callable[[list, np.ndarray, np.ndarray], None]  # columns, those who go on, the masks they name
MODES = {"up": warps.UP, "down": warps.DOWN, "bfly": warps.BFLY, "idx": warps.IDX}
VOTES = {"all": warps.ALL, "any": warps.ANY, "uni": warps.UNI, "ballot": warps.BALLOT}
REDUCTIONS = {"add": warps.R_ADD, "min": warps.R_MIN, "max": warps.R_MAX, "and": warps.R_AND,
              "or": warps.R_OR, "xor": warps.R_XOR}  # fmt: skip


def full(c: list, place: int) -> np.ndarray:
    """A column as an array even if all threads share it."""
    column = c[place]
    return column if column.ndim else np.full(c[0].frame.threads, column)


def is_exchange(i: Instruction) -> bool:
    if i.base == "bar":
        return i.mods[:1] == ("warp",)
    return i.base in ("shfl", "vote", "match", "redux")


def members(i: Instruction, columns: Columns) -> int:
    """The place of the mask of lanes."""
    if "sync" not in i.mods:
        raise not_understood(i)
    return columns.read(i.operands[-1], "u32")


def exchange(i: Instruction, columns: Columns) -> Meet:
    return {"bar": _bar, "shfl": _shfl, "vote": _vote, "match": _match, "redux": _redux}[i.base](i, columns)


def _bar(i: Instruction, columns: Columns) -> Meet:
    def run(c: list, go: np.ndarray, masks: np.ndarray) -> None:
        launch = c[0]
        warps.pass_barrier(go, launch.frame.lanes, launch.frame.of_threads[m.WARP_EPOCH])

    return run


def _shfl(i: Instruction, columns: Columns) -> Meet:
    target, _, second = i.operands[0].partition("|")
    if i.mods[-1] != "b32" or i.mods[1] not in MODES:
        raise not_understood(i)
    mode, text = MODES[i.mods[1]], i.text
    value, by, clamp = (columns.read(operand, "u32") for operand in i.operands[1:4])
    out = columns.write(target, "u32")
    flag = columns.write(second, "pred") if second else None

    def run(c: list, go: np.ndarray, masks: np.ndarray) -> None:
        launch = c[0]
        got, inside = np.empty(launch.frame.threads, np.uint32), np.empty(launch.frame.threads, np.bool_)
        wrong = warps.shuffle(
            go, full(c, value), full(c, by), full(c, clamp), masks, launch.frame.lanes, mode, got, inside
        )
        if wrong >= 0:
            raise Fault(f"synccheck: {launch.who(wrong)} reads a lane that does not take part\n  in {text}")
        np.copyto(c[out], got, where=go)
        if flag is not None:
            np.copyto(c[flag], inside, where=go)

    return run


def _vote(i: Instruction, columns: Columns) -> Meet:
    if i.mods[1] not in VOTES:
        raise not_understood(i)
    mode = VOTES[i.mods[1]]
    p, opposite = columns.predicate(i.operands[1])
    kind = "u32" if mode == warps.BALLOT else "pred"
    out, dtype = columns.write(i.operands[0], kind), KINDS[kind]

    def run(c: list, go: np.ndarray, masks: np.ndarray) -> None:
        launch = c[0]
        got = np.empty(launch.frame.threads, np.uint32)
        warps.vote(go, full(c, p) != opposite, masks, launch.frame.lanes, mode, got)
        np.copyto(c[out], got.astype(dtype), where=go)

    return run


def _match(i: Instruction, columns: Columns) -> Meet:
    if i.mods[0] not in ("any", "all") or i.mods[-1] not in ("b32", "b64"):
        raise not_understood(i)
    target, _, second = i.operands[0].partition("|")
    value, everybody = columns.read(i.operands[1], i.mods[-1]), i.mods[0] == "all"
    out = columns.write(target, "u32")
    flag = columns.write(second, "pred") if second else None

    def run(c: list, go: np.ndarray, masks: np.ndarray) -> None:
        launch = c[0]
        got, same = np.empty(launch.frame.threads, np.uint32), np.empty(launch.frame.threads, np.bool_)
        warps.match(go, full(c, value).astype(np.uint64), masks, launch.frame.lanes, everybody, got, same)
        np.copyto(c[out], got, where=go)
        if flag is not None:
            np.copyto(c[flag], same, where=go)

    return run


def _redux(i: Instruction, columns: Columns) -> Meet:
    kind = i.mods[-1]
    if i.mods[1] not in REDUCTIONS or kind not in ("u32", "s32", "b32"):
        raise not_understood(i)
    what, value, out = (
        REDUCTIONS[i.mods[1]],
        columns.read(i.operands[1], kind),
        columns.write(i.operands[0], kind),
    )

    def run(c: list, go: np.ndarray, masks: np.ndarray) -> None:
        launch = c[0]
        got = np.empty(launch.frame.threads, KINDS[kind])
        warps.redux(go, full(c, value), masks, launch.frame.lanes, what, got)
        np.copyto(c[out], got, where=go)

    return run


def activemask(i: Instruction, columns: Columns) -> Callable[[list, np.ndarray], None]:
    out = columns.write(i.operands[0], "u32")

    def run(c: list, active: np.ndarray) -> None:
        launch = c[0]
        got = np.empty(launch.frame.threads, np.uint32)
        warps.active_lanes(active, launch.frame.lanes, got)
        np.copyto(c[out], got, where=active)

    return run
