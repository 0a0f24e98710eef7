"""What identifies the code of kernels: digests of their sources, and of rules and formats from outside."""

import functools
import hashlib
import types as python_types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastopt.kernels.formats import Format
from fastopt.kernels.rule import RULES

OWN = "fastopt.kernels."  # begins the names of modules whose code the package's digest covers
FOLDER = Path(__file__).parent


@functools.cache
def package_digest(left_out: tuple[str, ...]) -> str:
    """Digest of every source file of ``fastopt.kernels`` but for these files and folders."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.rglob("*.py")):
        name = path.relative_to(FOLDER).as_posix()
        if not any(name == own or name.startswith(f"{own}/") for own in left_out):
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def class_key(cls: type) -> str:
    """What identifies the code that a class among a launch's types selects: that of a rule, or of formats."""
    seen = [f"{cls.__module__}.{cls.__qualname__}"]
    rule = RULES.get(cls)
    if rule is not None and not cls.__module__.startswith(OWN):
        # The types of a signature have no field names.
        seen.append(repr((rule.hyper._fields, rule.slots, rule.row_slots)))  # type: ignore[attr-defined]
        for function in (rule.update, rule.update_row, rule.trust_ratio):
            seen.extend(_fingerprint(function, set()))
    for member in getattr(cls, "members", ()):
        if isinstance(member, Format):
            seen.extend(_format_key(member))
    return hashlib.sha256("\0".join(seen).encode()).hexdigest()


def _format_key(member: Format) -> Iterator[str]:
    functions = [f for f in (member.decode, member.encode, member.factor, member.inverse) if f is not None]
    if not all(getattr(f, "py_func", f).__module__.startswith(OWN) for f in functions):
        yield repr((member.name, member.stored, member.master, member.random))
        for function in functions:
            yield from _fingerprint(function, set())


# Kinds of members of a module that compiled code can hold.
_MEMBERS = (
    python_types.FunctionType,
    python_types.ModuleType,
    int,
    float,
    complex,
    tuple,
    np.generic,
    np.ndarray,
)


def _fingerprint(value: Any, visited: set[int]) -> Iterator[str]:
    """The code and constants of a function and of all that it reaches by name."""
    value = getattr(value, "py_func", value)
    if isinstance(value, tuple | list | dict):
        yield type(value).__qualname__
        for item in value.items() if isinstance(value, dict) else value:
            yield from _fingerprint(item, visited)
        return
    if isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape} {value.tobytes().hex()}"  # its repr leaves digits out
        return
    if not isinstance(value, python_types.FunctionType):
        yield repr(value)
        return
    if id(value) in visited:
        return
    visited.add(id(value))
    yield from _code_fingerprint(value.__code__)
    yield _source_digest(value.__code__.co_filename)  # which holds the overloads of the rule's own
    yield from _fingerprint((value.__defaults__, value.__kwdefaults__), visited)
    for cell in value.__closure__ or ():
        yield from _fingerprint(cell.cell_contents, visited)
    for found in _reached(value):
        yield from _fingerprint(found, visited)


@functools.cache
def _source_digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:  # typed in, not read from a file
        return ""


def _reached(function: python_types.FunctionType) -> Iterator[Any]:
    """The globals that a function names, and what it names in the modules among them."""
    names = sorted(_names(function.__code__))
    found = [function.__globals__[name] for name in names if name in function.__globals__]
    modules: list[python_types.ModuleType] = []
    for value in found:  # which grows
        if not isinstance(value, python_types.ModuleType):
            yield value
        elif value not in modules:
            modules.append(value)
            members = (getattr(value, name, None) for name in names)
            found += [m for m in members if isinstance(getattr(m, "py_func", m), _MEMBERS)]


def _code_fingerprint(code: python_types.CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield repr(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, python_types.CodeType):
            yield from _code_fingerprint(constant)
        else:
            yield repr(constant)


def _names(code: python_types.CodeType) -> set[str]:
    nested = (c for c in code.co_consts if isinstance(c, python_types.CodeType))
    return set(code.co_names).union(*(_names(c) for c in nested))
