"""Operands as columns: arrays over the threads of a launch, or numbers that all of them share.

What an instruction needs of its operands is settled once, while it is decoded: each pair of a register and a
type is given a place in one list of columns, which a launch fills with views of its register file. Registers
hold bits; a type narrower than its register sees the low part.
"""

import re
from collections.abc import Callable

import numpy as np

from .fault import Fault
from .kinds import KINDS, is_float, widened
from .parse import Function, Variable

SHARED, LOCAL = 1 << 60, 1 << 61  # where generic addresses of these spaces begin
_SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid|%warpid|%nwarpid|%lanemask_(eq|lt|le|gt|ge)")
_INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?")

Fill = Callable[["RegisterFile"], np.ndarray | np.generic]


class RegisterFile:
    """The registers of ``threads`` threads, a matrix for each width, and what a launch gives to them."""

    special: Callable[[str], np.ndarray]
    params: np.ndarray

    def __init__(self, counts: dict[int, int], threads: int):
        self.threads = threads
        self._matrices = {
            width: np.zeros((count, threads), f"u{width}" if width else np.bool_)
            for width, count in counts.items()
        }

    def view(self, width: int, row: int, dtype: np.dtype) -> np.ndarray:
        column = self._matrices[width][row]
        return column if not width else column.view(dtype)[:: width // dtype.itemsize]

    def clear(self) -> None:
        for matrix in self._matrices.values():
            matrix.fill(0)


class Columns:
    """Hands out places in the list of columns while a function is decoded; ``fill`` makes the list."""

    def __init__(
        self, function: Function, addresses: dict[str, int], params: dict[str, tuple[int, Variable]]
    ):
        self.addresses, self.params = addresses, params
        self._counts: dict[int, int] = {}
        self._registers: dict[str, tuple[int, int]] = {}
        for name, kind in function.registers.items():
            width = 0 if kind == "pred" else KINDS[kind].itemsize
            row = self._counts.get(width, 0)
            self._registers[name] = width, row
            self._counts[width] = row + 1
        self._fills: list[Fill] = [lambda file: np.bool_(False)]  # place 0 is the launch's own
        self._places: dict[object, int] = {}
        self._varying: list[int] = []  # from launch to launch

    def file(self, threads: int) -> RegisterFile:
        return RegisterFile(self._counts, threads)

    def fill(self, file: RegisterFile) -> list:
        return [fill(file) for fill in self._fills]

    def refill(self, file: RegisterFile, columns: list) -> None:
        """Columns of another launch, whose registers stay where they are."""
        for place in self._varying:
            columns[place] = self._fills[place](file)

    def read(self, text: str, kind: str) -> int:
        """The place of an operand that is read as a type."""
        dtype = KINDS[kind]
        if text in self._registers:
            width, row = self._registers[text]
            if (width < dtype.itemsize and kind != "pred") or (width == 0) != (kind == "pred"):
                raise Fault(f"{text} cannot be read as {kind}")
            return self._place((width, row, dtype), lambda file: file.view(width, row, dtype))
        if _SPECIAL.fullmatch(text):
            return self._place(
                (text, dtype), lambda file: file.special(text).astype(f"u{dtype.itemsize}").view(dtype), True
            )
        number = self.constant(text, kind)
        return self._place((number.tobytes(), dtype), lambda file: number)

    def predicate(self, text: str) -> tuple[int, bool]:
        """The place of a predicate, and whether its opposite is meant."""
        return self.read(text.lstrip("!"), "pred"), text.startswith("!")

    def constant(self, text: str, kind: str) -> np.generic:
        dtype = KINDS[kind]
        if text in self.addresses:
            return np.uint64(self.addresses[text]).astype(f"u{dtype.itemsize}").view(dtype)
        if text[:2].lower() == "0f" and len(text) == 10:
            return np.uint32(int(text[2:], 16)).view(dtype)
        if text[:2].lower() == "0d" and len(text) == 18:
            return np.uint64(int(text[2:], 16)).view(dtype)
        if not _INTEGER.fullmatch(text):
            raise Fault(f"an operand that is not understood: {text}")
        number = int(text.rstrip("U"), 0)
        if kind == "pred":
            return np.bool_(number != 0)
        if is_float(kind) and kind not in ("f16", "bf16", "f16x2", "bf16x2"):
            return dtype.type(number)
        return np.uint64(number & (1 << 8 * dtype.itemsize) - 1).astype(f"u{dtype.itemsize}").view(dtype)

    def write(self, text: str, kind: str) -> int:
        """The place of a register that is written with a type, as wide as the register is."""
        if text == "_":
            dtype = KINDS[kind]
            return self._place(("_", dtype), lambda file: np.empty(file.threads, dtype))
        if text not in self._registers:
            raise Fault(f"no such register: {text}")
        width, row = self._registers[text]
        if (width == 0) != (kind == "pred") or (width < KINDS[kind].itemsize and kind != "pred"):
            raise Fault(f"{kind} does not fit {text}")
        dtype = widened(kind, width) if width else KINDS[kind]
        return self._place((width, row, dtype), lambda file: file.view(width, row, dtype))

    def width(self, text: str) -> int | None:
        """The bytes of a register, 0 for a predicate; None of what is no register."""
        return self._registers[text][0] if text in self._registers else None

    def param(self, first: int, kind: str) -> int:
        """The place of a number in the launch's parameters."""
        dtype = KINDS[kind]

        def fill(file: RegisterFile) -> np.generic:
            return file.params[first : first + dtype.itemsize].view(dtype)[0]

        return self._place(("param", first, dtype), fill, True)

    def _place(self, key: object, fill: Fill, varies: bool = False) -> int:
        if key not in self._places:
            self._places[key] = len(self._fills)
            self._fills.append(fill)
            if varies:
                self._varying.append(self._places[key])
        return self._places[key]
