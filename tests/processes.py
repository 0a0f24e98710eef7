"""Python processes of their own that tests run, and what their scripts share."""

import inspect
import os
import signal
import subprocess
import sys

import pytest

TIMEOUT = 120  # seconds; what it bounds is a hang

# What scripts share. Numbers are multiples of 1/64 small enough for float32 to be exact.
COMMON = """
import os, sys, threading
import numpy as np
import fastopt
from fastopt.kernels.cpu.dense import update_arrays

def dense(size, rule=fastopt.SGD):
    p, g = np.arange(size, dtype=np.float32) % 64, np.full(size, 4, np.float32)
    opt = rule(p, lr=0.25, momentum=0.5)
    for _ in range(2):
        opt.step(g)
    np.testing.assert_array_equal(p, np.arange(size) % 64 - 0.25 * 4 * 2.5)

def sparse(count):
    p = np.ones((4 * count, 8), np.float32)
    opt = fastopt.SGD(p, lr=0.25, momentum=0.5)
    indices = np.concatenate([np.arange(1, 4 * count, 4)] * 2)
    for _ in range(2):
        opt.step(fastopt.IndexedSlices(indices, np.full((2 * count, 8), 2, np.float32)))
    want = np.ones_like(p)
    want[1::4] -= 0.25 * 4 * 2.5
    np.testing.assert_array_equal(p, want)

def forget():
    # As in a new process, which loads kernels.
    vars(update_arrays).pop("compiled", None)
    update_arrays._entries.clear()

def compiled_and_loaded():
    stats = update_arrays.compiled.stats
    return [sum(getattr(stats, name).values()) for name in ("cache_misses", "cache_hits")]
"""


class Process:
    """A Python process, in a session of its own: on a hang its children go too."""

    def __init__(self, script, folder, **env):
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "PYTHON"))}
        kept.update({k: str(v) for k, v in env.items()}, PYTHONDONTWRITEBYTECODE="1")
        command = [sys.executable, *(["-c", script] if "\n" in script else [script])]
        self.process = subprocess.Popen(
            command, cwd=folder, env=kept, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def output(self):
        """What it printed, and its warnings."""
        try:
            out, err = self.process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            out, err = self.process.communicate()
            pytest.fail(f"still running after {TIMEOUT} s: {out}{err}")
        assert self.process.returncode == 0, f"exit status {self.process.returncode}: {out}{err}"
        return out, err


def run(script, folder, **env):
    """The words that a process printed."""
    return Process(script, folder, **env).output()[0].split()


def edit(path, before, after):
    """Replace text in a file and leave its times as they were."""
    text, times = path.read_text(), path.stat()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def run_before_and_after(edits, script, folder, **env):
    """The words that a script prints, a list for each run: before the edits, and after each of them.

    All are children of one process, which imports fastopt and compiles a kernel, so that they need not.
    """
    runs = f"""
from pathlib import PosixPath
{inspect.getsource(edit)}
dense(3)
for change in [None, *{edits}]:
    if change:
        edit(*change)
    child = os.fork()
    if not child:
        forget()
        exec({script!r})
        sys.stdout.flush()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    return [line.split() for line in Process(COMMON + runs, folder, **env).output()[0].splitlines()]


def files(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# Where kernels are compiled to, for tests to which it does not matter: where those of this process are.
SHARED = {name: os.environ[name] for name in ("NUMBA_CACHE_DIR",) if name in os.environ}


STEP = (
    COMMON
    + """
p = np.zeros(3, np.float32)
fastopt.SGD(p, lr=0.5).step(np.ones(3, np.float32))
print(p[0], *compiled_and_loaded())
"""
)
