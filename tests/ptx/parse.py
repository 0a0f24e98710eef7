"""From the text of PTX to one list of instructions, functions being put in place of calls of them."""

import re
from dataclasses import dataclass, field

import numpy as np

from .fault import Fault
from .kinds import KINDS

_FUNCTION = re.compile(r"\.(entry|func)\s*(?:\(([^)]*)\))?\s*([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*?)([{;])")
_VARIABLE = re.compile(
    r"\.(shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[(\d*)\])?"
    r"\s*(?:=\s*([^;]*))?;"
)
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr[^,\w]*(?:\.\w+\s*|\d+\s*)*\s)?"
    r"([\w$]+)(?:\[(\d+)\])?"
)
_INSTRUCTION = re.compile(r"(?:@(!?)(%[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+([^;]*);")


@dataclass
class Instruction:
    """``@guard base.mods operands``; ``guard`` is a register, or None; ``negated`` as in ``@!%p``."""

    guard: str | None
    negated: bool
    base: str
    mods: tuple[str, ...]
    operands: list[str]
    text: str


@dataclass
class Variable:
    """Bytes that a name stands for: in shared or local memory, or of the module itself."""

    space: str
    align: int
    size: int
    values: bytes | None = None
    floating: bool = False


@dataclass
class Function:
    name: str
    results: list[tuple[str, Variable]]
    params: list[tuple[str, Variable]]
    registers: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    code: list[Instruction | str] = field(default_factory=list)  # a label is its name


@dataclass
class Text:
    """What a text holds: its one entry, the functions and the variables beside it."""

    entry: Function
    functions: dict[str, Function]
    variables: dict[str, Variable]


def parse(text: str) -> Text:
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    functions, outside, at, entries = {}, [], 0, []
    while match := _FUNCTION.search(text, at):
        outside.append(text[at : match.start()])
        at = match.end()
        if match[6] == ";":
            continue
        end = _closing(text, at)
        function = Function(match[3], _params(match[2]), _params(match[4]))
        _body(function, text[at:end])
        at = end + 1
        functions[function.name] = function
        if match[1] == "entry":
            entries.append(function)
    outside.append(text[at:])
    if len(entries) != 1:
        raise Fault(f"a module of {len(entries)} entries; one is expected")
    return Text(entries[0], functions, _variables("".join(outside)))


def split(text: str) -> list[str]:
    """Operands, which commas part outside braces."""
    out, depth, last = [], 0, 0
    for at, letter in enumerate(text):
        if letter in "{[(":
            depth += 1
        elif letter in "}])":
            depth -= 1
        elif letter == "," and not depth:
            out.append(text[last:at].strip())
            last = at + 1
    rest = text[last:].strip()
    return [*out, rest] if rest else out


def _closing(text: str, at: int) -> int:
    depth = 1
    while True:
        match = re.compile(r"[{}]").search(text, at)
        depth += 1 if match[0] == "{" else -1
        if not depth:
            return match.start()
        at = match.end()


def _params(text: str | None) -> list[tuple[str, Variable]]:
    out = []
    for align, kind, name, count in _PARAM.findall(text or ""):
        size = KINDS[kind].itemsize
        out.append(
            (
                name,
                Variable(
                    "param", int(align or size), size * int(count or 1), floating=kind in ("f32", "f64")
                ),
            )
        )
    if text and text.count(".param") != len(out):
        raise Fault(f"parameters that are not understood: {text}")
    return out


def _variables(text: str) -> dict[str, Variable]:
    out = {}
    for space, align, kind, name, count, values in _VARIABLE.findall(text):
        dtype = KINDS[kind]
        size = dtype.itemsize * (int(count) if count else 0 if f"{name}[]" in text.replace(" ", "") else 1)
        data = _values(values, dtype, size) if values else None
        out[name] = Variable(
            space, int(align or dtype.itemsize), len(data) if data and not size else size, data
        )
    return out


def _values(text: str, dtype: np.dtype, size: int) -> bytes:
    numbers = [word.strip() for word in text.strip(" {}\n\t").split(",")]
    if not all(re.fullmatch(r"-?(0[xX])?[0-9a-fA-F]+U?|0[fFdD][0-9a-fA-F]+", number) for number in numbers):
        raise Fault(f"values that are not understood: {text[:80]}")
    mask = (1 << 8 * dtype.itemsize) - 1
    whole = [
        int(n[2:], 16) if n[:2].lower() in ("0f", "0d") else int(n.rstrip("U"), 0) & mask for n in numbers
    ]
    data = b"".join(number.to_bytes(dtype.itemsize, "little") for number in whole)
    return data.ljust(size, b"\0")


def _body(function: Function, text: str) -> None:
    function.variables = _variables(text)
    text = _VARIABLE.sub("", text)
    for kind, names in _REGISTERS.findall(text):
        for name in names.split(","):
            stem, _, count = name.strip().partition("<")
            for number in range(int(count[:-1])) if count else [""]:
                function.registers[f"{stem}{number}"] = kind
    text = _REGISTERS.sub("", text)
    text = re.sub(r"\.(?:loc|file)\b[^\n]*\n|\.pragma[^;]*;", "", text)
    for align, kind, name, count in re.findall(
        r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?\s*;", text
    ):
        size = KINDS[kind].itemsize
        variable = Variable("param", max(int(align or size), 8), size * int(count or 1))
        known = function.variables.get(name)  # each call has a scope of its own, where names come again
        if known is None or known.size < variable.size:
            function.variables[name] = variable
    text = re.sub(r"\.param\s[^;]*;", "", text)
    tables: dict[str, list[str]] = {}
    for name, labels in re.findall(r"([\w$]+):\s*\.branchtargets\s+([^;]*);", text):
        tables[name] = split(labels)
    text = re.sub(r"[\w$]+:\s*\.branchtargets\s+[^;]*;", "", text)
    for piece in re.split(r";", text):
        _statement(function, piece.strip(), tables)


def _statement(function: Function, piece: str, tables: dict[str, list[str]]) -> None:
    while True:
        if piece[:1] in ("{", "}"):
            piece = piece[1:].strip()
        elif match := re.match(r"([\w$]+):", piece):
            function.code.append(match[1])
            piece = piece[match.end() :].strip()
        else:
            break
    if not piece:
        return
    match = _INSTRUCTION.fullmatch(piece)
    if not match:
        raise Fault(f"not understood: {piece}")
    base, *mods = match[3].split(".")
    operands = split(match[4])
    if base == "brx":
        operands += tables[operands.pop()]
    function.code.append(
        Instruction(match[2], match[1] == "!", base, tuple(mods), operands, re.sub(r"\s+", " ", piece))
    )


def flatten(text: Text) -> Function:
    """The entry with all that it calls in place."""
    out = Function(text.entry.name, [], text.entry.params)
    _place(text, text.entry, out, "", {}, [])
    return out


def _place(
    text: Text, function: Function, out: Function, prefix: str, actual: dict[str, str], callers: list[str]
) -> None:
    if function.name in callers:
        raise Fault(f"{function.name} calls itself")
    names = {**{name: prefix + name for name in function.registers}, **actual}
    for name, kind in function.registers.items():
        out.registers[names[name]] = kind
    for name, variable in function.variables.items():
        names[name] = prefix + name
        out.variables[names[name]] = variable
    labels = {item: prefix + item for item in function.code if isinstance(item, str)}
    rename = {**names, **labels}
    for item in function.code:
        if isinstance(item, str):
            out.code.append(labels[item])
            continue
        if item.base == "call":
            _call(text, item, out, rename, prefix, [*callers, function.name])
            continue
        if prefix and item.base == "ret":
            item = Instruction(item.guard, item.negated, "bra", (), [prefix + "$return"], item.text)
        if rename:
            operands = [
                re.sub(r"[%\w$]+", lambda match: rename.get(match[0], match[0]), o) for o in item.operands
            ]
            guard = rename.get(item.guard, item.guard) if item.guard else None
            item = Instruction(guard, item.negated, item.base, item.mods, operands, item.text)
        out.code.append(item)
    if prefix:
        out.code.append(prefix + "$return")


def _call(
    text: Text, item: Instruction, out: Function, rename: dict[str, str], prefix: str, callers: list[str]
) -> None:
    operands = list(item.operands)
    results = split(operands.pop(0).strip("()")) if operands[0].startswith("(") else []
    name = operands.pop(0)
    given = split(operands[0].strip("()")) if operands and operands[0].startswith("(") else []
    function = text.functions.get(name)
    if function is None or item.guard:
        raise Fault(f"not understood: {item.text}")
    if len(results) != len(function.results) or len(given) != len(function.params):
        raise Fault(f"arguments of {item.text} do not fit")
    formal = [*function.results, *function.params]
    actual = {f: rename[a] for (f, _), a in zip(formal, [*results, *given], strict=True)}
    _place(text, function, out, f"{prefix}${len(out.code)}$", actual, callers)
