"""Runs a kernel: the threads of many blocks at once, a NumPy operation an instruction.

Threads advance together. Where they part, those with the lowest place in the code go on, so that they meet
again where the code does.
"""

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from . import checked as m
from . import frames, records
from .fault import Fault
from .frames import Frame
from .memory import Memory
from .program import Control, Program
from .records import Records
from .warps import DIFFERENT, LEFT, STRANGER, meet

__all__ = ["Fault", "Module", "Statistics", "launch"]

Module = Program
MOST_THREADS = 8192  # at once
MOST_STRETCHES = 3_000_000  # of code, some twenty seconds: a launch that takes more is taken for endless
PATIENCE = 1024  # so many stretches later, those who are furthest go on, for whom others may wait
SAID = {
    m.OUTSIDE: "memcheck: out of bounds",
    m.MISALIGNED: "memcheck: misaligned",
    m.READ_ONLY: "memcheck: a write to what is read only",
    m.RACE: "racecheck: a race",
    m.UNINITIALISED: "initcheck: shared memory is read before it is written",
}
MET = {
    LEFT: "names lanes that have left or never were",
    STRANGER: "is not in the mask that it names",
    DIFFERENT: "names other lanes than those it meets",
}


@dataclass
class Statistics:
    """What a launch did: how often each instruction was executed, by threads that were together."""

    executed: Counter[str] = field(default_factory=Counter)
    approximate: set[str] = field(default_factory=set)


def launch(
    module: Program,
    memory: Memory,
    grid: int,
    block: int,
    arguments: Sequence[int | float],
    dynamic_shared: int = 0,
) -> Statistics:
    """Run ``grid`` blocks of ``block`` threads; ``arguments`` in the order of the parameters."""
    if not (0 < grid < 1 << 31 and 0 < block <= 1024):
        raise Fault(f"a launch of {grid} blocks of {block} threads")
    params = _pack(module, arguments)
    runs: Counter[int] = Counter()
    kept, at_once = records.take(), max(1, MOST_THREADS // block)
    try:
        machine = Machine(module, memory, grid, block, params, dynamic_shared, runs, kept)
        with np.errstate(all="ignore"):
            for first in range(0, grid, at_once):
                count = min(at_once, grid - first)
                frame = frames.take(module, block, count)
                try:
                    machine.run(frame, first, count)
                finally:
                    frames.give_back(module, block, count, frame)
    finally:
        records.give_back(kept)
    out = Statistics()
    for pc, count in runs.items():
        stretch = module.stretches[pc]
        for name in stretch.names:
            out.executed[name] += count
        out.approximate |= stretch.approximate
    return out


def _pack(module: Program, arguments: Sequence[int | float]) -> np.ndarray:
    """The bytes of the parameters."""
    if len(arguments) != len(module.params):
        raise Fault(f"{len(arguments)} arguments for {len(module.params)} parameters of {module.name}")
    out = bytearray(module.param_bytes)
    for (name, (first, variable)), value in zip(module.params.items(), arguments, strict=True):
        size = variable.size
        if isinstance(value, bytes | np.ndarray):  # a parameter of several numbers
            data = bytes(value)
        elif variable.floating:
            data = struct.pack("f" if size == 4 else "d", value)
        else:
            data = (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")
        if len(data) != size:
            raise Fault(f"{name} has {size} bytes; {len(data)} were given")
        out[first : first + size] = data
    return np.frombuffer(out, np.uint8)


class Machine:
    """The state of a launch."""

    def __init__(
        self,
        program: Program,
        memory: Memory,
        grid: int,
        block: int,
        params: np.ndarray,
        dynamic_shared: int,
        runs: Counter[int],
        records: Records,
    ):
        self._program, self._allocations, self._grid, self._block = program, memory, grid, block
        self._params, self._runs = params, runs
        self._table = memory.table(tuple(program.own))
        self._shared_size = (
            program.shared_size if program.dynamic is None else program.dynamic + dynamic_shared
        )
        self._layout, self._records = np.zeros(m.LAYOUT, np.int64), records
        records.start(self._layout)

    # -- what instructions use

    def reserve(self, space: int, size: int) -> None:
        """Room in the table of global units for an access of every thread."""
        if space in (m.GLOBAL, m.GENERIC):
            units = self.frame.threads * max(1, size // self._program.global_unit)
            if self._records.reserve(self._layout, units):
                self._gather()

    def who(self, i: int) -> str:
        thread = int(self.frame.of_threads[m.NUMBER, i])
        return f"thread {thread % self._block} of block {thread // self._block}"

    def fault(self, fault: tuple, text: str, size: int) -> Fault:
        """What went wrong with an access, as ``memory`` tells it."""
        code, i, address, detail = (int(x) for x in fault)
        more = ""
        if code == m.RACE:
            more = f"; with thread {detail % self._block} of block {detail // self._block}"
        elif code == m.OUTSIDE and detail == m.GLOBAL:
            more = f"; {self._allocations.nearest(address)}"
        elif code == m.OUTSIDE:
            held, name = (
                (self._shared_size, "shared") if detail == m.SHARED else (self._program.local_size, "local")
            )
            more = f"; there are {held} bytes of {name} memory"
        elif code == m.READ_ONLY:
            more = f"; {self._allocations.nearest(address)}"
        return Fault(f"{SAID[code]}: {self.who(i)}, {size} bytes at {address:#x}{more}\n  in {text}")

    # -- running

    def _gather(self) -> None:
        known, of_threads = self._records, self.frame.of_threads
        self.memory = (self._table, self._layout, of_threads, known.keys, known.records, known.shared)

    def run(self, frame: Frame, first: int, count: int) -> None:
        """Run ``count`` blocks from ``first``."""
        self._set_up(frame, first, count)
        stretches, c, pending, runs = self._program.stretches, self._c, self._pending, self._runs
        turn = 0
        while True:
            if not pending:
                if not self._release():
                    return
                continue
            turn += 1
            if turn > MOST_STRETCHES:
                raise self._stuck("the launch does not end", pending)
            pc = min(pending) if turn % PATIENCE else max(pending)
            active = pending.pop(pc)
            stretch = stretches[pc]
            runs[pc] += 1
            alone = not pending and not self._waits
            where = True if alone or np.count_nonzero(active) == self._alive else active
            for step, exact in stretch.steps:
                step(c, active if exact else where)
            self._go_on(stretch.control, pc, active)

    def _set_up(self, frame: Frame, first: int, count: int) -> None:
        program, layout, threads = self._program, self._layout, frame.threads
        frame.start(first, self._grid, self._params)
        self.frame = frame
        self._threads, self._blocks = threads, frame.blocks
        stride = -(-self._shared_size // 16) * 16
        local_stride = -(-program.local_size // 16) * 16
        self._shared = np.zeros(stride * count + 16, np.uint8)
        self._local = np.zeros(local_stride * threads + 16, np.uint8)
        self._records.start_blocks(layout, stride * count // program.shared_unit)
        layout[m.SHARED_BASE] = self._shared.ctypes.data
        layout[m.SHARED_SIZE], layout[m.SHARED_STRIDE] = self._shared_size, stride
        layout[m.LOCAL_BASE], layout[m.LOCAL_SIZE] = self._local.ctypes.data, program.local_size
        layout[m.LOCAL_STRIDE], layout[m.PER_BLOCK] = local_stride, self._block
        layout[m.SHARED_UNIT], layout[m.GLOBAL_UNIT] = program.shared_unit, program.global_unit
        self._gather()
        self._c = frame.columns
        self._c[0] = self
        self._pending = {0: np.ones(threads, np.bool_)}
        self._parked: dict[int, np.ndarray] = {}  # at exchanges
        self._at_barrier: dict[int, tuple[Control, np.ndarray]] = {}
        self._gone, self._alive, self._waits = np.zeros(threads, np.bool_), threads, False

    def _add(self, pc: int, mask: np.ndarray) -> None:
        known = self._pending.get(pc)
        self._pending[pc] = mask if known is None else known | mask

    def _go_on(self, control: Control, pc: int, active: np.ndarray) -> None:
        what = control.what
        if what == "go":
            self._add(control.next, active)
            return
        chosen = active
        if control.guard is not None:
            p = self._c[control.guard]
            chosen = active & ~p if control.negated else active & p
            if what in ("barrier", "exchange") and (chosen != active).any():
                self._add(control.next, active & ~chosen)
            elif what not in ("barrier", "exchange"):
                count = np.count_nonzero(chosen)
                if count != np.count_nonzero(active):
                    self._add(control.next, active & ~chosen if count else active)
                if not count:
                    return
        if what == "bra":
            self._add(control.targets[0], chosen)
        elif what == "exchange":
            self._exchange(control, pc, chosen)
        elif what == "barrier":
            _, known = self._at_barrier.get(pc, (control, None))
            self._at_barrier[pc] = control, chosen if known is None else known | chosen
            self._waits = True
        elif what == "exit":
            self._gone = self._gone | chosen
            self._alive = self._threads - np.count_nonzero(self._gone)
        elif what == "brx":
            self._table_branch(control, chosen)
        else:
            raise Fault(f"{what}: {self.who(np.flatnonzero(chosen)[0])}\n  in {control.text}")

    def _table_branch(self, control: Control, chosen: np.ndarray) -> None:
        index = np.broadcast_to(self._c[control.place], self._threads)
        for k in np.unique(index[chosen]):
            if k >= len(control.targets):
                raise Fault(f"a branch to place {k} of {len(control.targets)}\n  in {control.text}")
            self._add(control.targets[k], chosen & (index == k))

    def _exchange(self, control: Control, pc: int, arrived: np.ndarray) -> None:
        """Let those warps exchange whose named lanes are all here; the others wait."""
        waiting = self._parked.pop(pc, None)
        if waiting is not None:
            arrived = arrived | waiting
        masks = self._c[control.place]
        if not masks.ndim:
            masks = np.full(self._threads, masks)
        go = np.empty(self._threads, np.bool_)
        count, i = meet(arrived, self._gone, masks, self.frame.lanes, go)
        if count < 0:
            raise Fault(f"synccheck: {self.who(i)} {MET[count]}: {int(masks[i]):#x}\n  in {control.text}")
        if count:
            control.meet(self._c, go, masks)
            self._add(control.next, go)
        if count != np.count_nonzero(arrived):
            self._parked[pc] = arrived & ~go
        self._waits = bool(self._parked) or bool(self._at_barrier)

    def _release(self) -> bool:
        """All wait or have left: let blocks go on that are whole at a barrier. Whether more is to be done."""
        if not self._at_barrier and not self._parked:
            return False
        count = int(self._blocks[-1]) + 1
        alive = np.bincount(self._blocks[~self._gone], minlength=count)
        by_number: dict[int, list[int]] = {}
        for pc, (control, _) in self._at_barrier.items():
            by_number.setdefault(control.barrier, []).append(pc)
        free = np.zeros(self._threads, np.bool_)
        for pcs in by_number.values():
            free |= self._whole(pcs, alive)
        if not free.any():
            raise self._stuck("synccheck: threads wait for others that never come", {})
        for pc, (control, mask) in [*self._at_barrier.items()]:
            go, stay = mask & free, mask & ~free
            del self._at_barrier[pc]
            if go.any():
                self._add(control.next, go)
            if stay.any():
                self._at_barrier[pc] = control, stay
        self._waits = bool(self._parked) or bool(self._at_barrier)
        return True

    def _whole(self, pcs: list[int], alive: np.ndarray) -> np.ndarray:
        """The threads that wait at one barrier, in those blocks of which nobody is missing."""
        masks = [self._at_barrier[pc][1] for pc in pcs]
        counts = [np.bincount(self._blocks[mask], minlength=len(alive)) for mask in masks]
        waiting = sum(counts)
        control = self._at_barrier[pcs[0]][0]
        place = control.place
        wanted = np.full(len(alive), self._block)
        if place:
            wanted[self._blocks] = np.broadcast_to(self._c[place], self._threads)
        whole = (waiting == wanted) & (waiting > 0)
        left = (waiting == alive) & (waiting > 0) & ~whole
        if left.any():
            raise Fault(
                f"synccheck: threads have left before a barrier that others wait at\n  in {control.text}"
            )
        if (whole & (np.max(counts, axis=0) != waiting)).any():
            texts = "\n  and ".join(self._at_barrier[pc][0].text for pc in pcs)
            raise Fault(f"synccheck: threads of a block wait at different barriers\n  in {texts}")
        free = whole[self._blocks] & np.logical_or.reduce(masks)
        everyone = whole[self._blocks] & bool(not place)
        self.frame.of_threads[m.EPOCH] += everyone
        self.frame.of_threads[m.WARP_EPOCH] += everyone
        return free

    def _stuck(self, what: str, running: dict[int, np.ndarray]) -> Fault:
        """What threads do that do not come to an end."""
        out = [what]
        at_barrier = {pc: mask for pc, (_, mask) in self._at_barrier.items()}
        for pc, mask in (*running.items(), *self._parked.items(), *at_barrier.items()):
            text = self._program.stretches[pc].control.text
            out.append(f"{self.who(np.flatnonzero(mask)[0])} in {text}")
        return Fault("\n  ".join(out))
