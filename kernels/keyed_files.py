"""Files by key, each written whole: where compiled kernels are kept between processes."""

import contextlib
import functools
import hashlib
import os
import pickle
import threading
import time
import warnings
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp"
STALE = 3600  # seconds, after which nobody is still writing a file


@functools.cache
def warn_no_cache(reason: str) -> None:
    """Say, once for a reason, that compiled kernels can't be kept."""
    warnings.warn(
        f"fastopt: {reason}: kernels are compiled again in every process; "
        "set NUMBA_CACHE_DIR to a folder that can be written",
        RuntimeWarning,
        stacklevel=2,
    )


class KeyedFiles:
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
