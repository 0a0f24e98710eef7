"""Signals whose handlers raise while a kernel is compiled or loaded: nothing is lost or left behind."""

import pytest
from processes import COMMON, SHARED, run

# The signal comes at a place that is hit each time: where a name of Numba's or llvmlite's is called.
INTERRUPTS = (
    COMMON
    + """
import pathlib, pickle, signal
from typing import NamedTuple
import llvmlite.binding
from numba.core import base
from fastopt.kernels import keyed_files
from fastopt.kernels.cpu import cache, jit

class Interrupt(Exception):
    pass

ran = []

def interrupt(number, frame):
    ran.append(number)
    raise Interrupt(number)

signal.signal(signal.SIGALRM, interrupt)
signal.signal(signal.SIGUSR1, interrupt)
handlers = [signal.getsignal(number) for number in signal.valid_signals()]

def at(owner, name, numbers=(signal.SIGALRM,), after=False):
    # Have the signals come when the attribute is called for the first time.
    there = getattr(owner, name)

    def called(*args, **kwargs):
        setattr(owner, name, there)
        if after:
            result = there(*args, **kwargs)
        for number in numbers:
            signal.raise_signal(number)
        return result if after else there(*args, **kwargs)

    setattr(owner, name, called)

def step(dtype=np.float32):
    p = np.zeros(3, dtype)
    fastopt.SGD(p, lr=0.5).step(np.ones(3, dtype))
    assert (p == -0.5).all(), p

def interrupted(call, numbers=(signal.SIGALRM,)):
    # The exception comes out, the signals' handlers ran, and the next calls are as ever.
    try:
        call()
    except Interrupt as error:
        assert error.args[0] in numbers, error
    else:
        raise AssertionError("nothing came out")
    assert sorted(ran) == sorted(numbers), ran
    assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers
    ran.clear()
    call()
    step(np.float64)
    assert not ran

def forget():
    # As in a new process, which loads kernels.
    step()
    step(np.float64)
    del vars(update_arrays)["compiled"]
    vars(update_arrays).get("_entries", {}).clear()
"""
)
ENGINE = "llvmlite.binding.ExecutionEngine"
COMPILING = {
    "in a callback of LLVM": f"at({ENGINE}, '_find_module_ptr')",
    "while Numba's registries are filled": "at(base.BaseContext, '_insert_getattr_defn')",
    "in the middle of a registry": "at(base.OverloadSelector, 'append')",
    "when it is written": "at(pathlib.Path, 'write_bytes', after=True)",
}


@pytest.mark.parametrize("place", COMPILING.values(), ids=COMPILING)
def test_an_interrupt_while_a_kernel_compiles(tmp_path, place):
    script = INTERRUPTS + f"\n{place}\ninterrupted(step)\n"
    run(script, tmp_path, NUMBA_CACHE_DIR=tmp_path / "cache")
    written = sorted(path.suffix for path in (tmp_path / "cache").rglob("*update_arrays*"))
    assert written and set(written) == {".nbc"}, written


LOADING = {
    "in a callback of LLVM": f"at({ENGINE}, '_find_module_ptr')",
    "at the end of a callback": f"at({ENGINE}, '_find_module_ptr', after=True)",
    "while it is read": "at(pathlib.Path, 'read_bytes')",
    "when it is read": "at(keyed_files.pickle, 'loads', after=True)",
}


@pytest.mark.parametrize("place", LOADING.values(), ids=LOADING)
def test_an_interrupt_while_a_kernel_is_loaded(tmp_path, place):
    script = INTERRUPTS + f"\nforget()\n{place}\ninterrupted(step)\nprint(*compiled_and_loaded())\n"
    assert run(script, tmp_path, **SHARED) == ["0", "2"]


def test_several_signals_while_a_kernel_compiles(tmp_path):
    script = (
        INTERRUPTS
        + f"""
both = signal.SIGALRM, signal.SIGUSR1
at({ENGINE}, "_find_module_ptr", both)
interrupted(step, both)

signal.signal(signal.SIGALRM, lambda number, frame: ran.append(number))
forget()
at({ENGINE}, "_find_module_ptr", [signal.SIGALRM] * 2)
step()  # of a handler that raises nothing: it runs once for all that came
assert ran == [signal.SIGALRM], ran
"""
    )
    run(script, tmp_path, NUMBA_CACHE_DIR=tmp_path / "cache")


def test_an_interrupt_while_another_thread_compiles_comes_at_once(tmp_path):
    script = (
        INTERRUPTS
        + f"""
arrived, going = threading.Event(), threading.Event()
there = {ENGINE}._find_module_ptr

def waits(self, pointer):
    {ENGINE}._find_module_ptr = there
    arrived.set()
    assert going.wait(60)
    return there(self, pointer)

{ENGINE}._find_module_ptr = waits
thread = threading.Thread(target=step)
thread.start()
assert arrived.wait(60)
try:
    signal.raise_signal(signal.SIGALRM)
except Interrupt:
    ran.clear()
    going.set()
else:
    raise AssertionError("nothing came out")
thread.join()
step()
"""
    )
    run(script, tmp_path, NUMBA_CACHE_DIR=tmp_path / "cache")
