"""What touches numba-cuda's internals: compiling for a GPU that need not be there."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from numba import cuda, typeof, types
from numba.cuda import dispatcher

from fastopt.kernels.forks import hold, hold_private

_lock = threading.RLock()
hold_private("numba.cuda.core.compiler_lock", "global_compiler_lock._lock")
hold(_lock)


def ptx(kernel: Callable, *args: Any, cc: tuple[int, int]) -> str:
    """PTX of ``kernel``, for arguments as in a launch and a GPU of compute capability ``cc``."""
    signature = types.void(*map(typeof, args))
    with _lock:
        # the functions a kernel calls are compiled for the current device, and without a driver
        # there is none
        current_device = dispatcher.get_current_device
        dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=cc)
        try:
            return cuda.compile_ptx(kernel, signature, cc=cc)[0]
        finally:
            dispatcher.get_current_device = current_device
