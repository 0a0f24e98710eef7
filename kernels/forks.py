"""Forks in a process with threads: how a child's copies of locks are made usable.

A child gets the one thread that forked. A lock that another thread held stays held in the child for ever,
and what it guards may be half changed. So a fork waits for such locks, as it does for malloc's: a compilation
in another thread delays it by the seconds that are left of it, then both go on with free locks.
What has a lock holds it by :func:`hold`; those of Numba and llvmlite are held here, the one place that knows
their private names. A version of theirs that has other names goes without, which a test tells.
"""

import importlib
import os
import threading
from contextlib import nullcontext
from operator import attrgetter
from typing import Any

_RLock: Any = type(threading.RLock())
_importer = os.getpid()


def forked() -> bool:
    """Whether this process was forked from the one that imported fastopt."""
    return os.getpid() != _importer


def hold(lock: Any) -> None:
    """Have forks take the ``threading.RLock`` before, and release it after in both processes.

    Of locks that are taken one inside the other, the inner one must be held first. An exception in a hook
    is lost, so that the hooks are functions of C, between which no signal handler runs.
    """

    def release_in_child() -> None:
        try:
            lock.release()
        except RuntimeError:  # a signal handler's exception ended the wait
            lock._at_fork_reinit()

    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=release_in_child)


def hold_private(module: str, path: str) -> None:
    """:func:`hold` the lock at ``path`` in a module of another package, if it is there."""
    try:
        lock = attrgetter(path)(importlib.import_module(module))
    except (ImportError, AttributeError):
        return
    if isinstance(lock, _RLock):
        hold(lock)


def hold_numbas() -> None:
    """:func:`hold` the locks of compilations, and share none with other processes."""
    threads: Any = importlib.import_module("numba.np.ufunc.parallel")
    if hasattr(threads, "_backend_init_process_lock"):
        # A semaphore that forked processes share, which each takes when it asks for its threads: one that is
        # killed there leaves it taken, and all others wait for ever. Threads exclude each other by a lock of
        # their own, and processes have nothing in common there; of those that are spawned Numba shares none.
        threads._backend_init_process_lock = nullcontext()
    hold_private("llvmlite.binding.ffi", "lib._lock._lock")
    hold_private("numba.np.ufunc.parallel", "_backend_init_thread_lock")
    hold_private("numba.core.compiler_lock", "global_compiler_lock._lock")
