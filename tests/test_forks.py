"""Forks: no lock that a child copies or shares makes it, or its parent, wait for ever."""

import os

import pytest
from processes import COMMON, SHARED, run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")

# A process that is still waiting after 60 seconds ends, and the test fails.
FORKS = (
    COMMON
    + """
import signal, time, traceback, warnings
import numba
from numba.core import compiler_lock, event
from numba.np.ufunc import parallel
from llvmlite.binding import ffi
from fastopt.kernels import rule
from fastopt.kernels.cpu import jit, memory, threads

warnings.simplefilter("ignore", DeprecationWarning)
signal.alarm(60)

def fresh():
    # A step that compiles: numba.njit's functions have no cache.
    @numba.njit
    def add(x):
        return x + 1
    assert add(2) == 3
    dense(5)

def child_of(work):
    # The id of a child that works and ends with 7.
    pid = os.fork()
    if not pid:
        signal.alarm(60)
        try:
            work()
            os._exit(7)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid

def ends(pid):
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 7, status

dense(5)
"""
)


def test_children_work_that_are_forked_while_another_thread_holds_a_lock(tmp_path):
    script = (
        FORKS
        + """
def lock_of(descriptor):
    return getattr(descriptor, "lock", None)  # functools.cached_property's, in Python 3.11

locks = {
    "of compilations": lambda: compiler_lock.global_compiler_lock,
    "of LLVM": lambda: ffi.lib._lock,
    "of Numba's threads": lambda: parallel._backend_init_thread_lock,
    "of launches": lambda: threads.launcher.lock,
    "of memory": lambda: memory._lock,
    "of compiled kernels": lambda: lock_of(vars(jit.Kernel)["compiled"]),
    "of what rules compute once": lambda: lock_of(vars(rule.Rule)["state_slots"]),
}

def hold(lock):
    with lock:
        held.set()
        time.sleep(0.1)

def work():
    fresh()
    numba.get_num_threads()
    memory.empty(1 << 20, np.uint8)
    forget()
    dense(5)
    assert rule.Rule(tuple, max).state_slots == ()

for name, lock in locks.items():
    if lock() is None:
        continue
    held = threading.Event()
    thread = threading.Thread(target=hold, args=[lock()])
    thread.start()
    held.wait()
    child = child_of(work)
    thread.join()
    print(name)
    ends(child)
work()
"""
    )
    run(script, tmp_path, **SHARED)


def test_children_work_that_are_forked_while_another_thread_compiles(tmp_path):
    script = (
        FORKS
        + """
def compiles():
    for rule in (fastopt.SGD, fastopt.Adam):
        p = np.zeros(3, np.float64)
        rule(p, lr=0.5).step(np.ones(3))

def grandparent():
    ends(child_of(fresh))
    fresh()

thread = threading.Thread(target=compiles)
thread.start()
forks = 0
while thread.is_alive():
    time.sleep(0.1)
    ends(child_of(grandparent))
    forks += 1
assert forks
compiles()
"""
    )
    run(script, tmp_path, NUMBA_CACHE_DIR=tmp_path / "cache")


def test_a_child_forked_while_another_thread_compiles_collects_garbage(tmp_path):
    script = (
        FORKS
        + """
import gc
enable, found = gc.enable, threading.Event()

def slow_enable():
    found.set()
    time.sleep(0.5)
    enable()

gc.enable = slow_enable
forget()
thread = threading.Thread(target=dense, args=[5])
thread.start()
assert found.wait(60)
ends(child_of(lambda: gc.isenabled() or os._exit(1)))
thread.join()
assert gc.isenabled()
"""
    )
    run(script, tmp_path, **SHARED)


WHERE = {
    "while it compiles": ("numba:compile", "fresh()"),
    "in a pass": ("numba:run_pass", "fresh()"),
    "in LLVM": ("numba:llvm_lock", "fresh()"),
    "while it loads": (
        "numba:llvm_lock",
        "del vars(update_arrays)['compiled']; update_arrays._entries.clear(); dense(5)",
    ),
}


@pytest.mark.parametrize(("where", "call"), WHERE.values(), ids=WHERE)
def test_a_child_forked_by_the_compiling_thread_goes_on_as_its_parent_does(tmp_path, where, call):
    script = (
        FORKS
        + f"""
children = []

class Forks(event.Listener):
    def on_start(self, what):
        if not children:
            children.append(os.fork())
    def on_end(self, what):
        pass

with event.install_listener({where!r}, Forks()):
    {call}
assert children
{call}
fresh()
if not children[0]:
    os._exit(7)
ends(children[0])
"""
    )
    run(script, tmp_path, **SHARED)


@pytest.mark.parametrize(
    ("first", "generations"), [("", 1), ("numba.get_num_threads()", 2), ("dense(300_000)", 1)]
)
def test_a_child_killed_while_it_asks_for_threads_leaves_nobody_waiting(tmp_path, first, generations):
    """Numba has a semaphore there that processes share."""
    script = (
        FORKS
        + f"""
{first}
ready, done = os.pipe()

def held():
    # The lock as Numba makes it, taken as Numba takes it.
    if not parallel._backend_init_process_lock:
        parallel._set_init_process_lock()
    with parallel._backend_init_process_lock:
        os.write(done, b".")
        time.sleep(60)

def kill_one():
    child = child_of(held)
    os.read(ready, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    numba.get_num_threads()
    fresh()

def descend(generations):
    if generations == 1:
        kill_one()
    else:
        ends(child_of(lambda: descend(generations - 1)))

if {bool(first)}:
    assert parallel._backend_init_process_lock
descend({generations})
numba.get_num_threads()
dense(300_000)
ends(child_of(numba.get_num_threads))
"""
    )
    run(script, tmp_path, NUMBA_NUM_THREADS=2, **SHARED)


def test_children_work_that_are_forked_while_another_thread_runs_a_parallel_kernel(tmp_path):
    script = (
        FORKS
        + """
going = True

def steps():
    p = np.zeros(1_000_000, np.float32)
    opt, g = fastopt.SGD(p, lr=0.5), np.ones_like(p)
    while going:
        opt.step(g)

def works():
    dense(300_000)
    sparse(20_000)
    ends(child_of(fresh))

dense(300_000)
thread = threading.Thread(target=steps)
thread.start()
for _ in range(4):
    ends(child_of(works))
going = False
thread.join()
"""
    )
    run(script, tmp_path, NUMBA_NUM_THREADS=2, **SHARED)


def test_workers_of_a_data_loader_look_up_and_step(tmp_path):
    pytest.importorskip("torch")
    script = (
        FORKS
        + """
import torch

table = torch.arange(64.0).reshape(16, 4)
dense(300_000)

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 12
    def __getitem__(self, index):
        dense(300_000)
        fresh()
        return fastopt.embedding(table, torch.tensor([index, 0]))

loader = torch.utils.data.DataLoader(Rows(), batch_size=4, num_workers=2, multiprocessing_context="fork")
for _ in range(2):
    batches = torch.cat(list(loader))
    assert torch.equal(batches[:, 0], table[:12]) and torch.equal(batches[:, 1], table[:1].expand(12, 4))
    dense(300_000)
"""
    )
    run(script, tmp_path, NUMBA_NUM_THREADS=2, **SHARED)


def test_a_signal_handler_that_raises_while_a_fork_waits_harms_neither_process(tmp_path):
    script = (
        FORKS
        + """
class Interrupt(Exception):
    pass

def interrupt(*_):
    raise Interrupt

held = threading.Event()

def hold():
    with compiler_lock.global_compiler_lock:
        held.set()
        time.sleep(0.6)

thread = threading.Thread(target=hold)
thread.start()
held.wait()
signal.signal(signal.SIGPROF, interrupt)
main = threading.get_ident()
threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGPROF)).start()
child = child_of(fresh)  # what a hook of a fork raises, Python prints and forgets
ends(child)
thread.join()
fresh()
ends(child_of(fresh))
"""
    )
    run(script, tmp_path, **SHARED)


def test_memory_that_waits_is_counted_anew_in_a_child(tmp_path):
    script = (
        FORKS
        + """
array = memory.empty(1 << 20, np.uint8)
del array
assert memory._waiting_bytes
memory._waiting_bytes -= 1 << 40  # as half a change in another thread

def work():
    array = memory.empty(1 << 20, np.uint8)
    array[:] = 1
    del array
    assert memory._waiting_bytes == sum(m.size for kept in memory._waiting.values() for m in kept) > 0

ends(child_of(work))
"""
    )
    run(script, tmp_path, **SHARED)


PRIVATE = {
    "numba.core.compiler_lock": ("global_compiler_lock._lock", "RLock"),
    "llvmlite.binding.ffi": ("lib._lock._lock", "RLock"),
    "numba.np.ufunc.parallel": ("_backend_init_thread_lock", "RLock"),
    "numba.np.ufunc.parallel ": ("_backend_init_process_lock", "NoneType"),
}


@pytest.mark.parametrize("module", PRIVATE)
def test_private_names_are_there_and_not_needed(tmp_path, module):
    """Where the first fails, this version hides its lock elsewhere: see fastopt.kernels.forks."""
    path, kind = PRIVATE[module]
    script = f"""
import os
import {module} as module, numba
there = module.{path}
assert type(there).__name__ == {kind!r}, there
name = {path.split(".")[0]!r}
there = vars(module).pop(name)
import fastopt
setattr(module, name, there)
import numpy as np
p = np.zeros(3, np.float32)
fastopt.SGD(p, lr=0.5).step(np.ones(3, np.float32))
child = os.fork()
if not child:
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
print(p[0])
"""
    assert run(script, tmp_path, **SHARED) == ["-0.5"]


def test_numba_uses_the_names(tmp_path):
    script = """
import threading
from numba.core import compiler_lock
from numba.np.ufunc import parallel
from llvmlite.binding import ffi
import fastopt, numba

class Counted(type(threading.RLock())):
    taken = 0

    def acquire(self, *args):
        self.taken += 1
        return super().acquire(*args)

    __enter__ = acquire

process = parallel._backend_init_process_lock
compilations, llvm, its_threads = Counted(), Counted(), Counted()
compiler_lock.global_compiler_lock._lock = compilations
ffi.lib._lock._lock = llvm
parallel._backend_init_thread_lock = its_threads
numba.njit(lambda x: x)(1)
assert compilations.taken and llvm.taken and not its_threads.taken
numba.get_num_threads()
assert its_threads.taken
assert parallel._backend_init_process_lock is process is not None
"""
    run(script, tmp_path)


def test_a_child_steps_that_was_forked_before_anything_was_used(tmp_path):
    """The parent has used OpenMP by another library, and fastopt not at all."""
    pytest.importorskip("torch")
    script = """
import os, signal
import numpy as np
import torch
import fastopt

signal.alarm(60)
torch.mm(torch.ones(800, 800), torch.ones(800, 800))
child = os.fork()
signal.alarm(60)
p = np.zeros(300_000, np.float32)
fastopt.SGD(p, lr=0.5).step(np.ones(300_000, np.float32))
assert (p == -0.5).all()
if not child:
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    run(script, tmp_path, NUMBA_NUM_THREADS=2, NUMBA_THREADING_LAYER="omp", **SHARED)
