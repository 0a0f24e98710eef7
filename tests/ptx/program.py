"""A kernel that has been decoded: straight stretches of functions of columns, and what follows each."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import bits, choices, convert, moves  # noqa: F401  which put what they know into MAKE
from . import checked as m
from .access import atom, ld, smallest, st
from .arithmetic import MAKE, not_understood
from .columns import Columns
from .exchanges import activemask, exchange, is_exchange, members
from .fault import Fault
from .parse import Function, Instruction, Variable, flatten, parse

IGNORED = {
    "membar",
    "fence",
    "prefetch",
    "prefetchu",
    "griddepcontrol",
    "nanosleep",
    "applypriority",
    "discard",
}
ACCESS = {"ld": ld, "ldu": ld, "st": st, "atom": atom, "red": atom}


@dataclass
class Control:
    """How a stretch ends: ``what`` is go, bra, brx, exit, trap, barrier or exchange."""

    what: str
    next: int
    guard: int | None = None
    negated: bool = False
    targets: tuple[int, ...] = ()
    place: int = 0  # of the mask of lanes, of the index of a table of targets, or of a barrier's count
    meet: Callable | None = None
    barrier: int = 0
    text: str = ""


@dataclass
class Stretch:
    """``steps``: functions, and whether each has to know exactly which threads are active."""

    steps: list[tuple[Callable[[list, Any], None], bool]]
    control: Control
    names: list[str]
    approximate: set[str]


class Program:
    """The one entry of a text of PTX."""

    def __init__(self, text: str):
        parsed = parse(text)
        function = flatten(parsed)
        self.name = function.name
        self.params, self.param_bytes = _places(function.params)
        self._own: list[np.ndarray] = []
        self.own: list[tuple[int, int, bool]] = []
        self.shared_size = self.local_size = 0
        self.dynamic: int | None = None
        words = {word for i in function.code if isinstance(i, Instruction) for word in _words(i)}
        addresses = self._variables({**parsed.variables, **function.variables}, words)
        function.registers.update({"%cc": "pred", "%productu32": "b32", "%productu64": "b64"})
        self.columns = Columns(function, addresses, self.params)
        self.shared_unit = smallest(function.code, (m.SHARED,))
        self.global_unit = smallest(function.code, (m.GLOBAL,))
        self.stretches: dict[int, Stretch] = {}
        self.frames: dict[tuple[int, int], list[Any]] = {}  # of frames.py, that no launch uses
        self._decode(function)

    def _variables(self, variables: dict[str, Variable], words: set[str]) -> dict[str, int]:
        """Where the variables that are named in the code lie in their spaces."""
        out, dynamic = {}, []
        for name, variable in variables.items():
            if name not in words:
                continue
            if variable.space == "shared" and variable.size == 0:
                dynamic.append(name)
            elif variable.space == "shared":
                out[name] = self.shared_size = -(-self.shared_size // variable.align) * variable.align
                self.shared_size += variable.size
            elif variable.space in ("local", "param"):
                out[name] = self.local_size = -(-self.local_size // variable.align) * variable.align
                self.local_size += variable.size
            else:
                data = np.zeros(variable.size + variable.align, np.uint8)
                first = -data.ctypes.data % variable.align
                data[first : first + variable.size] = np.frombuffer(
                    variable.values or bytes(variable.size), np.uint8
                )
                self._own.append(data)
                self.own.append((data.ctypes.data + first, variable.size, variable.space == "global"))
                out[name] = data.ctypes.data + first
        if dynamic:
            self.dynamic = -(-self.shared_size // 16) * 16
            out |= dict.fromkeys(dynamic, self.dynamic)
        return out

    def _decode(self, function: Function) -> None:
        code, labels = [], {}
        for item in function.code:
            if isinstance(item, str):
                labels[item] = len(code)
            else:
                code.append(item)
        joins, first = {*labels.values()}, 0
        stretch: list[Instruction] = []
        for at, i in enumerate(code):
            if at in joins and stretch:
                self._finish(first, stretch, Control("go", at))
                first, stretch = at, []
            if not stretch:
                first = at
            try:
                control = self._control(i, at, labels)
            except (KeyError, ValueError, IndexError, TypeError) as error:
                raise Fault(f"not understood: {i.text} ({error!r})") from error
            if control:
                self._finish(first, stretch, control)
                stretch = []
                self.stretches[first].names.append(_name(i))
            else:
                stretch.append(i)
        end = Control("exit", len(code))
        if stretch:
            self._finish(first, stretch, end)
        self._finish(len(code), [], end)

    def _finish(self, first: int, code: Sequence[Instruction], control: Control) -> None:
        steps, names, approximate = [], [], set()
        for i in code:
            names.append(_name(i))
            if "approx" in i.mods or "full" in i.mods:
                approximate.add(_name(i))
            if i.base not in IGNORED:
                steps.append(self._step(i))
        self.stretches[first] = Stretch(steps, control, names, approximate)

    def _step(self, i: Instruction) -> tuple[Callable, bool]:
        try:
            if i.base == "activemask":
                run, exact = activemask(i, self.columns), True
            elif i.base in ACCESS:
                run, exact = ACCESS[i.base](i, self.columns)
            elif i.base in MAKE:
                run, exact = MAKE[i.base](i, self.columns), False
            else:
                raise not_understood(i)
            if i.guard:
                run = _guarded(run, self.columns.read(i.guard, "pred"), i.negated)
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise Fault(f"not understood: {i.text} ({error!r})") from error
        return run, exact

    def _control(self, i: Instruction, at: int, labels: dict[str, int]) -> Control | None:
        columns = self.columns
        guard = columns.read(i.guard, "pred") if i.guard else None
        control = Control("", at + 1, guard, i.negated, text=i.text)
        if i.base == "bra":
            control.what, control.targets = "bra", (labels[i.operands[0]],)
        elif i.base == "brx":
            control.what, control.place = "brx", columns.read(i.operands[0], "u32")
            control.targets = tuple(labels[name] for name in i.operands[1:])
        elif i.base in ("ret", "exit"):
            control.what = "exit"
        elif i.base == "trap":
            control.what = "trap"
        elif is_exchange(i):
            control.what, control.place, control.meet = "exchange", members(i, columns), exchange(i, columns)
        elif i.base in ("bar", "barrier"):
            if any(mod not in ("sync", "cta", "aligned") for mod in i.mods) or "sync" not in i.mods:
                raise not_understood(i)
            control.what, control.barrier = "barrier", int(columns.constant(i.operands[0], "u32"))
            control.place = columns.read(i.operands[1], "u32") if len(i.operands) > 1 else 0
        else:
            return None
        return control


def _guarded(run: Callable, p: int, negated: bool) -> Callable:
    def guarded(c: list, where: Any) -> None:
        chosen = ~c[p] if negated else c[p]
        run(c, chosen if where is True else chosen & where)

    return guarded


def _name(i: Instruction) -> str:
    return ".".join((i.base, *i.mods))


def _words(i: Instruction) -> set[str]:
    return {word for operand in i.operands for word in re.findall(r"[%\w$.]+", operand)}


def _places(params: list[tuple[str, Variable]]) -> tuple[dict[str, tuple[int, Variable]], int]:
    out, size = {}, 0
    for name, variable in params:
        size = -(-size // variable.align) * variable.align
        out[name] = size, variable
        size += variable.size
    return out, size
