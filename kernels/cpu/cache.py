"""The cache of compiled kernels on disk, and its keys: all that a kernel's machine code depends on."""

import contextlib
import functools
import hashlib
import os
import pickle
import sys
import threading
import time
import types as python_types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core.caching import FunctionCache, NullCache
from numba.core.types import NamedTuple, NamedUniTuple

from fastopt.kernels.formats import Format
from fastopt.kernels.rule import RULES

OWN = "fastopt.kernels."  # begins the names of modules whose code the package's digest covers
FOLDER = Path(__file__).parents[1]
# The code of these files and folders gets into no machine code for the CPU, which a test sees to.
HOST_ONLY = (
    "at_once.py",
    "cpu/backend",
    "cpu/cache.py",
    "cpu/memory.py",
    "cpu/threads.py",
    "cuda",
    "forks.py",
    "lazy.py",
    "signals.py",
    "work.py",
)

TEMPORARY = ".tmp"
STALE = 3600  # seconds, after which nobody is still writing a file


def cache_for(function: Callable, parallel: bool) -> FunctionCache | NullCache:
    try:
        return KernelCache(function, parallel)
    except RuntimeError:
        _warn_no_cache("no folder for compiled kernels can be written")
        return NullCache()


@functools.cache
def _warn_no_cache(reason: str) -> None:
    warnings.warn(
        f"fastopt: {reason}: kernels are compiled again in every process; "
        "set NUMBA_CACHE_DIR to a folder that can be written",
        RuntimeWarning,
        stacklevel=2,
    )


class KernelCache(FunctionCache):
    """Numba's on-disk cache, keyed on everything a kernel's machine code depends on.

    Numba's own key covers the file of the kernel but not the rules it calls, so an edited rule
    would go on running the old code. This key adds the sources of ``fastopt.kernels``
    and the code of rules and formats from outside. Each key has a file of its own: Numba's shared index
    can, when two processes compile at once, name one process's code for the other's signature.
    """

    def __init__(self, function: Callable, parallel: bool) -> None:
        super().__init__(function)
        self._variant = f"{function.__module__}.{function.__qualname__}", parallel
        self._cache_file = _KeyedFiles(Path(self._cache_path), self._impl.filename_base)

    def _index_key(self, signature: Any, codegen: Any) -> str:
        types = [str(t) for t in signature]
        classes = [_class_key(cls) for cls in _tuple_classes(signature)]
        versions = sys.version, numba.__version__, llvmlite.__version__
        key = self._variant, types, codegen.magic_tuple(), versions, package_digest(), classes
        return hashlib.sha256(repr(key).encode()).hexdigest()

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        if not _cachable(signature):
            return None
        try:
            return super().load_overload(signature, target_context)
        except Exception:  # a damaged or foreign file is no reason to fail: compile again
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        if not _cachable(signature):
            return
        try:
            super().save_overload(signature, data)
        except OSError as error:
            _warn_no_cache(f"{self.cache_path} can't be written ({error.strerror})")


class _KeyedFiles:
    """One file a key, written to a temporary name and renamed, so that readers see it whole.

    It holds a digest of its key and contents: damaged machine code, or that of another kernel, would kill
    the process that loads it. That guards against accidents. Whoever can write to the folder can have code
    run by those who load from it, as with ``__pycache__``.
    """

    def __init__(self, folder: Path, base: str) -> None:
        self._folder = folder
        self._base = base

    def _path(self, key: str) -> Path:
        return self._folder / f"{self._base}.{key[:32]}.nbc"

    def load(self, key: str) -> Any:
        try:
            file = self._path(key).read_bytes()
        except FileNotFoundError:
            return None
        size = hashlib.sha256().digest_size
        digest, content = file[:size], memoryview(file)[size:]
        return pickle.loads(content) if digest == _digest(key, content) else None

    def save(self, key: str, data: Any) -> None:
        self._remove_stale()
        path = self._path(key)
        temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}{TEMPORARY}")
        try:
            content = pickle.dumps(data)
            temporary.write_bytes(_digest(key, content) + content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _remove_stale(self) -> None:
        """Remove what processes left that were killed while they wrote, on this machine or another."""
        for path in self._folder.glob(f"*{TEMPORARY}"):
            with contextlib.suppress(OSError):  # another process was faster, or may not
                if time.time() - path.stat().st_mtime > STALE:
                    path.unlink()


def _digest(key: str, content: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(key.encode())
    digest.update(content)
    return digest.digest()


@functools.cache
def package_digest() -> str:
    """Digest of every source file of ``fastopt.kernels`` whose code gets into machine code."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.rglob("*.py")):
        name = path.relative_to(FOLDER).as_posix()
        if not any(name == own or name.startswith(f"{own}/") for own in HOST_ONLY):
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _tuple_classes(signature: Any) -> list[type]:
    """The classes of hyperparameters, and of arguments without contents, among the types of a launch."""
    return [t.instance_class for t in signature if isinstance(t, NamedTuple | NamedUniTuple)]


def _cachable(signature: Any) -> bool:
    """Whether a later process can find these classes by name."""
    return all(
        cls.__module__ not in ("__main__", "__mp_main__")
        and getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is cls
        for cls in _tuple_classes(signature)
    )


def _class_key(cls: type) -> str:
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
