"""How parallel kernels are launched so that forks and Python threads are safe, and when they are."""

import importlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import numba
from threadpoolctl import ThreadpoolController

from fastopt.kernels.at_once import at_once
from fastopt.kernels.forks import forked

_config: Any = numba.config  # its attributes are set at run time

SPIN_COUNT = "GOMP_SPINCOUNT"
PROCESSES_HERE = "LOCAL_WORLD_SIZE"  # how many processes share this machine, set by torchrun
# So many elements take 50 microseconds of Adam; for fewer, waking the other threads costs more than it
# saves.
PARALLEL_FROM = 131_072


def _is_forked_worker() -> bool:
    """Whether this is a child of ``multiprocessing`` that was forked before fastopt was imported."""
    command = " ".join(sys.orig_argv)
    others = "--multiprocessing-fork", "multiprocessing.forkserver"  # how spawned children are started
    return multiprocessing.parent_process() is not None and not any(other in command for other in others)


class Launcher:
    """Launches parallel kernels.

    OpenMP kills or hangs a forked child that starts a parallel region after its parent did, be it
    through Numba or through a library that shares OpenMP, as torch can: forked children run kernels on
    one thread. The workqueue layer aborts the process when two Python threads launch at once, so there
    launches take turns.
    """

    def __init__(self) -> None:
        self.layer: str | None = None
        self.forked = forked() or _is_forked_worker()
        self.lock = threading.RLock()

    def start(self) -> None:
        """Have the threads of parallel kernels started, this process's share of those of the machine."""
        if self.layer is None and not _config.DISABLE_JIT:
            with self.lock, _short_spins(), _kept_thread_counts():
                started = numba.get_num_threads()
                if started == _config.NUMBA_NUM_THREADS and "NUMBA_NUM_THREADS" not in os.environ:
                    numba.set_num_threads(max(1, started // int(os.environ.get(PROCESSES_HERE, "1"))))
                self.layer = numba.threading_layer()

    def launch(self, function: Callable, args: tuple) -> None:
        self.start()
        with self.lock if self.layer == "workqueue" else nullcontext():
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


@contextmanager
def _kept_thread_counts() -> Iterator[None]:
    """Leave the number of threads as it is with which other libraries use OpenMP.

    Numba sets it when it starts threads, for all that share OpenMP with it. torch does: told to use one
    thread, as torchrun tells it, it would use all.
    """
    with suppress(ImportError):
        importlib.import_module("numba.np.ufunc.omppool")  # loads OpenMP, if nothing else has
    libraries = ThreadpoolController().select(user_api="openmp").lib_controllers
    before = [library.num_threads for library in libraries]
    yield
    for library, count in zip(libraries, before, strict=True):
        library.set_num_threads(count)


launcher = Launcher()


def run(calls: Iterable[Callable[[], object]]) -> None:
    """Make calls of kernels and others in turn, with no signal handler run between them (see at_once.py)."""
    if launcher.layer == "workqueue":
        with launcher.lock:
            at_once(calls)
    else:
        at_once(calls)


os.register_at_fork(after_in_child=launcher.after_fork)


def thread_count() -> int:
    """How many threads a parallel kernel gets; asking Numba starts them, which is left to a launch."""
    return _config.NUMBA_NUM_THREADS if launcher.layer is None else numba.get_num_threads()


def runs_serial(work: int) -> bool:
    """Whether a kernel runs serial that touches ``work`` elements."""
    return work < PARALLEL_FROM or launcher.forked or _config.NUMBA_NUM_THREADS == 1
