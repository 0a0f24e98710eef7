"""The cache of compiled kernels on disk, and its keys: all that a kernel's machine code depends on."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import FunctionCache, NullCache
from numba.core.types import NamedTuple, NamedUniTuple

from fastopt.kernels.digest import class_key, package_digest
from fastopt.kernels.keyed_files import KeyedFiles, warn_no_cache

# The code of these files and folders gets into no machine code for the CPU, which a test sees to.
HOST_ONLY = (
    "at_once.py",
    "cpu/backend",
    "cpu/cache.py",
    "cpu/memory.py",
    "cpu/threads.py",
    "cuda",
    "digest.py",
    "forks.py",
    "keyed_files.py",
    "lazy.py",
    "signals.py",
    "work.py",
)


def cache_for(function: Callable) -> FunctionCache | NullCache:
    try:
        return KernelCache(function)
    except RuntimeError:
        warn_no_cache("no folder for compiled kernels can be written")
        return NullCache()


class KernelCache(FunctionCache):
    """Numba's on-disk cache, keyed on everything a kernel's machine code depends on.

    Numba's own key covers the file of the kernel but not the rules it calls, so an edited rule
    would go on running the old code. This key adds the sources of ``fastopt.kernels``
    and the code of rules and formats from outside. Each key has a file of its own: Numba's shared index
    can, when two processes compile at once, name one process's code for the other's signature.
    """

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        self._name = f"{function.__module__}.{function.__qualname__}"
        self._cache_file = KeyedFiles(Path(self._cache_path), self._impl.filename_base)

    def _index_key(self, signature: Any, codegen: Any) -> str:
        types = [str(t) for t in signature]
        classes = [class_key(cls) for cls in _tuple_classes(signature)]
        versions = sys.version, numba.__version__, llvmlite.__version__
        key = self._name, types, codegen.magic_tuple(), versions, package_digest(HOST_ONLY), classes
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
            warn_no_cache(f"{self.cache_path} can't be written ({error.strerror})")


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
