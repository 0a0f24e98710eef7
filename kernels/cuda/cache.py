"""Compiled kernels kept on disk, and their keys: all that their machine code depends on."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numba_cuda
from numba.core.caching import FunctionCache

from fastopt.kernels.digest import class_key, package_digest
from fastopt.kernels.formats import Format, formats
from fastopt.kernels.keyed_files import KeyedFiles, warn_no_cache

# The code of these files and folders gets into no machine code for a GPU.
HOST_ONLY = (
    "at_once.py",
    "cpu",
    "cuda/array.py",
    "cuda/assign.py",
    "cuda/backend",
    "cuda/cache.py",
    "cuda/driver.py",
    "cuda/errors.py",
    "cuda/machine.py",
    "cuda/producers.py",
    "cuda/streams.py",
    "digest.py",
    "forks.py",
    "keyed_files.py",
    "lazy.py",
    "signals.py",
    "work.py",
)


class KernelFiles:
    """What is kept of the kernels that a function makes: (machine code, name of the kernel in it).

    It is in the folder that Numba has for the file that holds the function.
    """

    def __init__(self, make: Callable) -> None:
        self._make = f"{make.__module__}.{make.__qualname__}"
        self._files: KeyedFiles | None = None
        try:
            folder = FunctionCache(make).cache_path
        except RuntimeError:
            warn_no_cache("no folder for compiled kernels can be written")
        else:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._files = KeyedFiles(Path(folder), self._make)

    def load(self, key: str) -> Any:
        """What was kept for a key, None if there is nothing that is whole."""
        try:
            return None if self._files is None else self._files.load(key)
        except Exception:  # a damaged or foreign file is no reason to fail: compile again
            return None

    def save(self, key: str, code: tuple[Any, str]) -> None:
        """Keep it."""
        if self._files is None:
            return
        try:
            self._files.save(key, code)
        except OSError as error:
            warn_no_cache(f"compiled kernels can't be written ({error.strerror})")

    def key(self, what: tuple, *others: Any) -> str:
        """The key of the kernel that is made for the arguments ``what``, and for what else differs."""
        versions = numba.__version__, numba_cuda.__version__, llvmlite.__version__
        key = self._make, _told(what), others, versions, package_digest(HOST_ONLY)
        return hashlib.sha256(repr(key).encode()).hexdigest()


def _told(what: Any) -> Any:
    """What an argument is, so that another process knows it again."""
    if isinstance(what, Format):
        return class_key(type(formats(what)))
    if isinstance(what, type):
        return class_key(what)
    if isinstance(what, tuple):
        own = class_key(type(what)) if hasattr(what, "_fields") else ""
        return own, *(_told(item) for item in what)
    return repr(what)
