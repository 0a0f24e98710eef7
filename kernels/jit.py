"""The one place where JIT options, the compilation cache and thread safety are decided.

Options, each for a reason:

- strict IEEE arithmetic, no ``fastmath``: a loop's vector body, its tail, the serial and the
  parallel variant then give the same bits, and NaN and infinity survive. The element-wise
  kernels vectorise without it and are bound by memory.
- ``error_model="numpy"``: a division that checks for zero stops a loop from vectorising.
- ``nogil=True``: other Python threads go on while a kernel runs.
- lazy signatures: ``import fastopt`` compiles nothing.
"""

import functools
import hashlib
import multiprocessing
import os
import pickle
import sys
import threading
import types as python_types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core.caching import FunctionCache, NullCache
from numba.core.types import NamedTuple, NamedUniTuple

_config: Any = numba.config  # its attributes are set at run time
_njit: Any = numba.njit  # its type leaves out some options

OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True}


def helper(function: Callable, **options: Any) -> Any:
    """Decorate a function that only CPU kernels call: compiled once, shared by both variants."""
    return _njit(function, no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS, **options)


def restricted_helper(function: Callable) -> Any:
    """A :data:`helper` whose array arguments never overlap, compiled into its callers.

    Else the compiler checks that before each loop, a row of 8 elements then costing 8 times as much.
    """
    dispatcher = helper(function, forceinline=True)
    compiler = getattr(dispatcher, "_compiler", None)  # none without JIT
    if compiler is not None:
        customize = compiler._customize_flags

        def without_overlap(flags: Any) -> Any:
            flags = customize(flags)
            flags.noalias = True
            return flags

        compiler._customize_flags = without_overlap
    return dispatcher


SPIN_COUNT = "GOMP_SPINCOUNT"

PARALLEL_FROM = (
    131_072  # elements, 50 microseconds of Adam; below, waking the other threads costs more than it saves
)


def _is_forked_worker() -> bool:
    """Whether this is a child of ``multiprocessing`` that was forked before this module was imported."""
    command = " ".join(sys.orig_argv)
    others = "--multiprocessing-fork", "multiprocessing.forkserver"  # how spawned children are started
    return multiprocessing.parent_process() is not None and not any(other in command for other in others)


class _Threads:
    """Launches parallel kernels so that forks and Python threads are safe.

    OpenMP kills or hangs a forked child that starts a parallel region after its parent did, be it
    through Numba or through a library that shares OpenMP, as torch can: forked children run serial
    kernels. The workqueue layer aborts the process when two Python threads
    launch at once, so there launches take turns.
    """

    def __init__(self) -> None:
        self.layer: str | None = None
        self.forked = _is_forked_worker()
        self.lock = threading.RLock()

    def launch(self, function: Callable, args: tuple) -> None:
        if self.layer is None or self.layer == "workqueue":
            with self.lock, _short_spins() if self.layer is None else nullcontext():
                function(*args)
                if not _config.DISABLE_JIT:
                    self.layer = numba.threading_layer()
        else:
            function(*args)

    def after_fork(self) -> None:
        self.forked = True
        self.lock = threading.RLock()


@contextmanager
def _short_spins() -> Iterator[None]:
    """Have OpenMP's idle threads sleep soon, if nobody has said how they wait.

    By default they wait busily for milliseconds, against the threads of NumPy's matrix products:
    a trainer that alternates the two ran 10 times slower. OpenMP reads the variable when it is
    loaded, by the first launch if nothing else has loaded it before.
    """
    if os.environ.keys() & {SPIN_COUNT, "OMP_WAIT_POLICY"}:
        yield
        return
    os.environ[SPIN_COUNT] = "1000"
    try:
        yield
    finally:
        del os.environ[SPIN_COUNT]


_threads = _Threads()
os.register_at_fork(after_in_child=_threads.after_fork)


def thread_count() -> int:
    """How many threads a parallel kernel gets; asking Numba starts them, which is left to a launch."""
    return _config.NUMBA_NUM_THREADS if _threads.layer is None else numba.get_num_threads()


class Kernel:
    """A function in two compiled variants, ``parallel``, for its ``prange`` loops, and ``serial``.

    ``kernel(work, *args)`` runs the one that suits ``work``, the number of elements touched.
    """

    def __init__(self, function: Callable) -> None:
        functools.update_wrapper(self, function)
        self._function = function

    def __call__(self, work: int, *args: Any) -> None:
        if self.runs_serial(work):
            self.serial(*args)
        else:
            _threads.launch(self.parallel, args)

    def runs_serial(self, work: int) -> bool:
        """Which variant ``work`` elements get."""
        return work < PARALLEL_FROM or _threads.forked or _config.NUMBA_NUM_THREADS == 1

    def entry(self, serial: bool, args: tuple) -> Callable:
        """What runs arguments of the types of ``args``, compiled, without finding out their types again,
        which takes ten times as long as a call; to be called with such arguments alone, by :meth:`run`."""
        return _entry(self.serial if serial else self.parallel, args)

    @staticmethod
    def run(entry: Callable, serial: bool, args: tuple) -> None:
        if serial:
            entry(*args)
        else:
            _threads.launch(entry, args)

    @functools.cached_property
    def serial(self) -> Callable:
        return _compile(self._function, parallel=False)

    @functools.cached_property
    def parallel(self) -> Callable:
        return _compile(self._function, parallel=True)


def _entry(dispatcher: Any, args: tuple) -> Callable:
    if _config.DISABLE_JIT:
        return dispatcher
    return dispatcher.compile(tuple(map(numba.typeof, args)))


class Direct:
    """A small function that is called often: compiled for the types of its first call, and not to be called
    with others. It holds the global interpreter lock."""

    def __init__(self, function: Callable) -> None:
        self.__doc__ = function.__doc__
        self._function = function
        self.call: Callable = self._first_call

    def _first_call(self, *args: Any) -> Any:
        self.call = _entry(_compile(self._function, parallel=False, nogil=False), args)
        return self.call(*args)


def _compile(function: Callable, parallel: bool, **options: Any) -> Callable:
    dispatcher = _njit(parallel=parallel, no_cfunc_wrapper=True, **{**OPTIONS, **options})(function)
    if not _config.DISABLE_JIT:
        dispatcher._cache = _cache_for(function, parallel)
    return dispatcher


def _cache_for(function: Callable, parallel: bool) -> FunctionCache | NullCache:
    try:
        return _KernelCache(function, parallel)
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


class _KernelCache(FunctionCache):
    """Numba's on-disk cache, keyed on everything a kernel's machine code depends on.

    Numba's own key covers the file of the kernel but not the rules it calls, so an edited rule
    would go on running the old code. This key adds the sources of all of ``fastopt.kernels``
    and the code of a rule from outside. Each key has a file of its own: Numba's shared index
    can, when two processes compile at once, name one process's code for the other's signature.
    """

    def __init__(self, function: Callable, parallel: bool) -> None:
        super().__init__(function)
        self._parallel = parallel
        self._cache_file = _KeyedFiles(Path(self._cache_path), self._impl.filename_base)

    def _index_key(self, signature: Any, codegen: Any) -> str:
        types = [str(t) for t in signature]
        rules = [_rule_key(cls) for cls in _tuple_classes(signature)]
        versions = sys.version, numba.__version__, llvmlite.__version__
        key = types, codegen.magic_tuple(), self._parallel, versions, package_digest(), rules
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

    It begins with its digest: damaged machine code would kill the process that loads it.
    """

    def __init__(self, folder: Path, base: str) -> None:
        self._folder = folder
        self._base = base

    def _path(self, key: str) -> Path:
        return self._folder / f"{self._base}.{key[:32]}.nbc"

    def load(self, key: str) -> Any:
        try:
            content = self._path(key).read_bytes()
        except FileNotFoundError:
            return None
        size = hashlib.sha256().digest_size
        if hashlib.sha256(content[size:]).digest() != content[:size]:
            return None
        return pickle.loads(content[size:])

    def save(self, key: str, data: Any) -> None:
        path = self._path(key)
        temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            content = pickle.dumps(data)
            temporary.write_bytes(hashlib.sha256(content).digest() + content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@functools.cache
def package_digest() -> str:
    """Digest of every source file of ``fastopt.kernels`` that holds code to be compiled."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        if "backend" in path.parts:  # what launches kernels
            continue
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _tuple_classes(signature: Any) -> list[type]:
    """The hyperparameter classes among the argument types of a launch."""
    return [t.instance_class for t in signature if isinstance(t, NamedTuple | NamedUniTuple)]


def _cachable(signature: Any) -> bool:
    """Whether a later process can find the hyperparameter classes by name."""
    return all(
        cls.__module__ not in ("__main__", "__mp_main__")
        and getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is cls
        for cls in _tuple_classes(signature)
    )


def _rule_key(cls: type) -> str:
    """What identifies the code behind a hyperparameter class."""
    from fastopt.kernels.rules import RULES

    name = f"{cls.__module__}.{cls.__qualname__}"
    rule = RULES.get(cls)
    if rule is None or cls.__module__.startswith("fastopt.kernels."):
        return name  # the package's digest covers it
    # the types of a signature have no field names
    seen = [name, repr((rule.hyper._fields, rule.slots, rule.row_slots))]  # type: ignore[attr-defined]
    for function in (rule.update, rule.update_row, rule.layer):
        seen.extend(_fingerprint(function, set()))
    return hashlib.sha256("\0".join(seen).encode()).hexdigest()


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
