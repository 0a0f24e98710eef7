"""The compilation cache, imports, forks and threads: each case in processes of its own."""

import ast
import importlib
import os
import shutil
from pathlib import Path

import pytest
from processes import COMMON, SHARED, STEP, Process, edit, files, run, run_before_and_after

import fastopt
import fastopt.kernels
from fastopt.kernels.cpu import cache as cache_on_disk

ROOT = Path(__file__).parents[1]
LAYERS = {"omp": "omppool", "tbb": "tbbpool", "workqueue": "workqueue"}


def copy_package(folder):
    """A copy of the installed package in ``folder``, laid out as in a wheel."""
    own = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(Path(fastopt.__file__).parent, folder / "fastopt", ignore=own)
    shutil.copytree(
        Path(fastopt.kernels.__file__).parent,
        folder / "fastopt" / "kernels",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return folder / "fastopt"


def test_an_edited_rule_is_compiled_again_and_an_unchanged_one_is_not(tmp_path):
    package = copy_package(tmp_path)
    env = {"PYTHONPATH": tmp_path, "NUMBA_CACHE_DIR": tmp_path / "cache"}
    where = "\nimport fastopt.kernels.rules\nprint(fastopt.__file__, fastopt.kernels.rules.__file__)"
    names = [str(package / name) for name in ("__init__.py", "kernels/rules/__init__.py")]
    assert run(STEP + where, tmp_path, **env) == ["-0.5", "1", "0", *names]
    edit(package / "kernels" / "rules" / "sgd.py", "(p - h.lr * g,)", "(p + h.lr * g,)")
    assert run(STEP, tmp_path, **env) == ["0.5", "1", "0"]
    before = files(tmp_path / "cache")
    assert run(STEP, tmp_path, **env) == ["0.5", "0", "1"]
    assert files(tmp_path / "cache") == before


OWN_STEP = (
    COMMON
    + """
from own_rule import Own
p = np.zeros(3, np.float32)
Own(p, lr=0.5).step(np.ones(3, np.float32))
print(p[0], *compiled_and_loaded())
"""
)
OWN_RULE = """
from typing import NamedTuple
import fastopt
import own_parts
import own_parts.more
from own_parts import negative

class H(NamedTuple):
    lr: float = 0.1
    gain: float = 2.0

def update(h, p, g):
    return (p + own_parts.scaled(negative(g), h.lr) * h.gain - own_parts.more.zero(g) * own_parts.FACTORS[0],)

Own = fastopt.register_rule("Own", H, update)
"""
OWN_PARTS = """
import numpy as np
from numba import njit
from numba.extending import register_jitable
from own_parts.more import identity

FACTORS = np.array([1.0, 2.0])
SIGN = -1

@register_jitable
def scaled(g, lr, by=1.0):
    return g * lr / by

@njit
def negative(g):
    return identity(g) * SIGN
"""
OWN_MORE = """
from numba.extending import register_jitable

@register_jitable
def identity(x):
    return x * 1

@register_jitable
def zero(x):
    return x * 0
"""


def test_a_rule_from_outside_is_compiled_again_when_any_of_its_code_changed(tmp_path):
    env = {"PYTHONPATH": tmp_path, "NUMBA_CACHE_DIR": tmp_path / "cache"}
    (tmp_path / "own_parts").mkdir()
    rule, parts = tmp_path / "own_rule.py", tmp_path / "own_parts" / "__init__.py"
    more = tmp_path / "own_parts" / "more.py"
    rule.write_text(OWN_RULE)
    parts.write_text(OWN_PARTS)
    more.write_text(OWN_MORE)
    edits = [
        (rule, "(p + own", "(p - own"),
        (parts, "SIGN = -1", "SIGN = -2"),
        (parts, "by=1.0", "by=2.0"),
        (more, "x * 1", "x * 3"),
        (more, "x * 0", "x * 1"),
        (parts, "([1.0,", "([1.0000000001,"),
        (rule, "lr: float = 0.1\n    gain: float = 2.0", "gain: float = 2.0\n    lr: float = 0.1"),
    ]
    results = ["-1.0", "1.0", "2.0", "1.0", "3.0", "2.0", "2.0", "2.0"]
    found = run_before_and_after(edits, OWN_STEP, tmp_path, **env)
    assert found == [[want, "1", "0"] for want in results]
    kept = files(tmp_path / "cache")
    assert run(OWN_STEP, tmp_path, **env) == [results[-1], "0", "1"]
    assert files(tmp_path / "cache") == kept


OWN_FORMAT = """
import numpy as np
from numba.extending import register_jitable
from fastopt.kernels import formats

UNIT = np.float32(64)

@register_jitable
def decode(stored):
    return np.float32(stored) / UNIT

@register_jitable
def encode(x, random):
    return np.int16(np.float32(x) * UNIT)

OWN = formats.register_format(formats.Format("OWN", np.dtype(np.int16), np.int16, decode, encode))
formats.register_state_dtype("own", formats.StateFormats(OWN, OWN))
"""
OWN_FORMAT_STEPS = (
    COMMON
    + """
import own_format
p = np.zeros(3, np.float32)
opt = fastopt.SGD(p, lr=0.5, momentum=0.5, state_dtype="own")
for _ in range(2):
    opt.step(np.ones(3, np.float32))
print(p[0], opt.state_dict()["state"][0]["momentum_buffer"].dtype, *compiled_and_loaded())
"""
)


def test_a_format_from_outside_is_compiled_again_when_its_code_changed(tmp_path):
    env = {"PYTHONPATH": tmp_path, "NUMBA_CACHE_DIR": tmp_path / "cache"}
    path = tmp_path / "own_format.py"
    path.write_text(OWN_FORMAT)
    edits = [
        (path, "float32(stored) /", "float32(stored) * 0.5 /"),
        (path, "stored) * 0.5 /", "stored) /"),
        (path, "float32(x) *", "float32(x) * 0.5 *"),
    ]
    assert run_before_and_after(edits, OWN_FORMAT_STEPS, tmp_path, **env) == [
        ["-1.25", "int16", "1", "0"],
        ["-1.125", "int16", "1", "0"],
        ["-1.25", "int16", "0", "1"],
        ["-1.125", "int16", "1", "0"],
    ]


COMPILES = {"Kernel", "Direct", "helper", "restricted_helper", "register_jitable", "overload", "intrinsic"}
COMPILES |= {"optimised_helper", "njit", "jit", "vectorize", "generated_jit", "define"}


def test_files_that_the_digest_leaves_out_define_nothing_compiled_for_the_cpu():
    folder = Path(fastopt.kernels.__file__).parent
    left_out = [folder / name for name in cache_on_disk.HOST_ONLY if name != "cuda"]
    files = [file for path in left_out for file in (path.rglob("*.py") if path.is_dir() else [path])]
    files = [file for file in files if file.exists()]
    assert {"threads.py", "cache.py", "memory.py"} < {file.name for file in files}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "numba":
                names.append(node.attr)
            assert not COMPILES & set(names), file


def test_an_edit_of_a_file_that_the_digest_leaves_out_compiles_nothing_again(tmp_path):
    package = copy_package(tmp_path)
    env = {"PYTHONPATH": tmp_path, "NUMBA_CACHE_DIR": tmp_path / "cache"}
    assert run(STEP, tmp_path, **env) == ["-0.5", "1", "0"]
    edit(package / "kernels" / "cpu" / "threads.py", "PARALLEL_FROM = 131_072", "PARALLEL_FROM = 262_144")
    assert run(STEP, tmp_path, **env) == ["-0.5", "0", "1"]


def test_a_rule_of_the_main_module_works_without_the_cache(tmp_path):
    script = OWN_STEP.replace("from own_rule import Own", "from typing import NamedTuple").replace(
        "p = np.zeros",
        """
class H(NamedTuple):
    lr: float

def update(h, p, g):
    return (p - h.lr * g,)

Own = fastopt.register_rule("Own", H, update)
p = np.zeros""",
    )
    (tmp_path / "script.py").write_text(script)
    for _ in range(2):
        assert run("script.py", tmp_path, NUMBA_CACHE_DIR=tmp_path / "cache") == ["-0.5", "1", "0"]
    assert not list(tmp_path.rglob("*update_arrays*.nbc"))


def warned(err):
    return [line for line in err.splitlines() if "RuntimeWarning" in line]


# Of those that compile fast.
TWO_KERNELS = (
    COMMON
    + """
fastopt.clip_grad_value(np.ones(3, np.float32), 0.5)
fastopt.embedding(np.ones((3, 2), np.float32), np.array([1]))
"""
)


def test_without_a_folder_for_the_cache_there_is_one_warning(tmp_path):
    package = copy_package(tmp_path)
    for folder in [package / "kernels", *(package / "kernels").rglob("*")]:
        if folder.is_dir():
            (folder / "__pycache__").write_text("not a folder")
    nowhere = "/dev/null/nowhere"
    env = {"PYTHONPATH": tmp_path, "HOME": nowhere, "XDG_CACHE_HOME": nowhere}
    for given in ({}, {"NUMBA_CACHE_DIR": nowhere}):
        _, err = Process(TWO_KERNELS, tmp_path, **env, **given).output()
        assert len(warned(err)) == 1, err
        assert "NUMBA_CACHE_DIR" in warned(err)[0]


def test_when_the_cache_can_no_longer_be_written_there_is_one_warning(tmp_path):
    script = (
        COMMON
        + """
import shutil, pathlib
cache = pathlib.Path(os.environ["NUMBA_CACHE_DIR"])
fastopt.clip_grad_value(np.ones(3, np.float32), 0.5)
assert list(cache.rglob("*.nbc"))
shutil.rmtree(cache)
cache.write_text("not a folder")
fastopt.clip_grad_value(np.ones(3), 0.5)
fastopt.embedding(np.ones((3, 2), np.float32), np.array([1]))
"""
    )
    _, err = Process(script, tmp_path, NUMBA_CACHE_DIR=tmp_path / "cache").output()
    assert len(warned(err)) == 1, err
    assert "NUMBA_CACHE_DIR" in warned(err)[0]


def test_damaged_cache_files_are_replaced(tmp_path):
    script = (
        COMMON
        + """
import pathlib

def step():
    # How many kernels were compiled, and how many loaded.
    forget()
    p = np.zeros(3, np.float32)
    fastopt.SGD(p, lr=0.5).step(np.ones(3, np.float32))
    assert (p == -0.5).all()
    return compiled_and_loaded()

assert step() == [1, 0]
(path,) = pathlib.Path(os.environ["NUMBA_CACHE_DIR"]).rglob("*update_arrays*.nbc")
whole = path.read_bytes()
eighth = len(whole) // 8
flips = 0, 31, 32, 3 * eighth, len(whole) - 1
bits = [whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in flips]
hole = whole[: 2 * eighth] + bytes(256) + whole[2 * eighth + 256 :]
for damaged in (b"", b"garbage", whole[:32], whole[: 5 * eighth], whole + b".", hole, *bits):
    path.write_bytes(damaged)
    assert step() == [1, 0]
    assert step() == [0, 1]
assert [p.name for p in path.parent.glob("*update_arrays*")] == [path.name]
path.unlink()
path.mkdir()  # as what can't be read nor replaced
assert step() == [1, 0]
"""
    )
    _, err = Process(script, tmp_path, NUMBA_CACHE_DIR=tmp_path / "cache").output()
    assert len(warned(err)) == 1, err


# Each step has a kernel of its own, by its name, the rule, the dtype or how it is compiled.
SEVERAL = (
    COMMON
    + """
for rule, size, dtype in (
    (fastopt.SGD, 3, np.float32), (fastopt.SGD, 3, np.float64),
    (fastopt.AdaGrad, 3, np.float32), (fastopt.SGD, 200_000, np.float32),
):
    p = np.zeros(size, dtype)
    rule(p, lr=0.5).step(np.ones(size, dtype))
    print(p[0], p[-1])
table = np.arange(6, dtype=np.float32).reshape(3, 2)
print(*fastopt.embedding(table, np.array([2])).ravel())
fastopt.clip_grad_value(table, 0.5)
print(*table.ravel())
"""
)


def test_a_kernel_stored_under_the_name_of_another_is_compiled_again(tmp_path):
    env = {"NUMBA_CACHE_DIR": tmp_path / "cache", "NUMBA_NUM_THREADS": 2}
    right = run(SEVERAL, tmp_path, **env)
    paths = sorted((tmp_path / "cache").rglob("*.nbc"))
    whole = [path.read_bytes() for path in paths]
    assert len(paths) >= 6 and len(set(whole)) == len(paths)
    others = whole[1:] + whole[:1]
    for path, other in zip(paths, others, strict=True):
        path.write_bytes(other)
    assert run(SEVERAL, tmp_path, **env) == right
    assert sorted((tmp_path / "cache").rglob("*.nbc")) == paths
    assert not any(path.read_bytes() == other for path, other in zip(paths, others, strict=True))


def test_what_killed_processes_left_in_the_cache_is_removed(tmp_path):
    env = {"NUMBA_CACHE_DIR": tmp_path / "cache"}
    run(STEP, tmp_path, **env)
    (path,) = (tmp_path / "cache").rglob("*update_arrays*.nbc")
    stale, fresh = path.with_suffix(".12.34.tmp"), path.with_suffix(".56.78.tmp")
    for left in (stale, fresh):
        left.write_bytes(b"half a kernel")
    os.utime(stale, (0, 0))
    os.unlink(path)
    assert run(STEP, tmp_path, **env) == ["-0.5", "1", "0"]
    assert path.exists() and fresh.exists() and not stale.exists()


def test_two_processes_may_fill_one_cache_at_once(tmp_path):
    script = (
        COMMON
        + """
print("ready", flush=True)
rule = eval(input())
p = np.zeros(3, np.float32)
rule(p, lr=0.5).step(np.ones(3, np.float32))
print(p[0], *compiled_and_loaded())
"""
    )
    rules = ["fastopt.SGD", "fastopt.AdaGrad"]
    for counts in (["1", "0"], ["0", "1"]):
        processes = [Process(script, tmp_path, NUMBA_CACHE_DIR=tmp_path / "cache") for _ in rules]
        for process in processes:
            assert process.process.stdout.readline() == "ready\n"
        for process, rule in zip(processes, rules, strict=True):
            process.process.stdin.write(rule + "\n")
            process.process.stdin.flush()
        for process in processes:
            assert process.output()[0].split() == ["-0.5", *counts]


def test_kernels_compiled_in_several_processes_work_in_one(tmp_path):
    """Numba names what it compiles by a number that it counts anew in each process."""
    script = (
        COMMON
        + """
STATES = None, "bfloat16", "8bit"

def child(states):
    if number := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 0
        return
    for state_dtype in states:
        table = np.ones((4, 100), np.float32)
        g = np.linspace(-1, 1, table.size, dtype=np.float32).reshape(table.shape)
        grad = g if state_dtype else fastopt.IndexedSlices(np.arange(4), g)
        fastopt.SGD(table, lr=0.25, momentum=0.5, state_dtype=state_dtype).step(grad)
        print(float(table @ np.arange(100) @ np.arange(4)))
    sys.stdout.flush()
    os._exit(0)

for state_dtype in STATES:
    child([state_dtype])
child(STATES)
"""
    )
    found = run(script, tmp_path, NUMBA_CACHE_DIR=tmp_path / "cache")
    assert len(found) == 6 and found[:3] == found[3:]


def test_importing_compiles_nothing_and_starts_nothing(tmp_path):
    script = """
import sys, os
import numba, numpy
from numba.core import event
tasks = os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else []
with event.install_recorder("numba:compile") as recorder:
    import fastopt
assert not recorder.buffer, recorder.buffer
now = os.listdir("/proc/self/task") if tasks else []
assert now == tasks, (tasks, now)
print(*sorted(sys.modules))
"""
    found = set(run(script, tmp_path, NUMBA_CACHE_DIR=tmp_path / "cache"))
    unwanted = {"typer", "rich", "matplotlib", "safetensors", "torch"}
    assert "fastopt.optimizers" in found
    assert found & unwanted == set()
    assert files(tmp_path) == {}


def test_without_jit_results_are_the_same(tmp_path):
    script = (
        COMMON
        + """
dense(5)
sparse(2)
import itertools
from numba.core import config
rng = np.random.default_rng(0)
for make, dim in itertools.product((fastopt.AdamW, fastopt.RowwiseAdaGrad), (5, 70)):
    p = rng.standard_normal((9, dim), dtype=np.float32)
    opt = make(p, lr=0.1)
    opt.step(rng.standard_normal((9, dim), dtype=np.float32))
    values = rng.standard_normal((6, dim), dtype=np.float32)
    opt.step(fastopt.IndexedSlices(np.array([2, 0, 2, 5, 7, 1]), values), clip_norm=0.5)
    print(p.tobytes().hex())
for dim, mode in ((0, "sum"), (0, "mean"), (3, "sum"), (3, "mean")):
    table = rng.standard_normal((4, dim), dtype=np.float32)
    for padding in (None, 2):
        given = np.array([2, 0, 2]), np.array([0, 1])
        out = fastopt.embedding_bag(table, *given, mode=mode, padding_idx=padding)
        print(out.shape, out.tobytes().hex())
print(config.DISABLE_JIT)
"""
    )
    *jit, off = run(script, tmp_path, **SHARED)
    *plain, on = run(script, tmp_path, NUMBA_DISABLE_JIT=1)
    assert (off, on) == ("0", "1")
    assert plain == jit


def available(layer):
    try:
        importlib.import_module(f"numba.np.ufunc.{LAYERS[layer]}")
    except ImportError:
        return False
    return True


@pytest.fixture(params=LAYERS)
def layer(request):
    if not available(request.param):
        pytest.skip(f"the threading layer {request.param} is not there")
    return request.param


# Above and below fastopt.kernels.cpu.threads.PARALLEL_FROM.
STEP_ALL = """
def step_all():
    dense(300_000)
    sparse(20_000)
    dense(5)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("before", ["nothing", "a step", "another kernel", "torch"])
def test_forked_children_step(tmp_path, layer, before):
    if before == "torch":
        pytest.importorskip("torch")
    script = (
        COMMON
        + STEP_ALL
        + f"""
import multiprocessing, warnings
import numba
warnings.simplefilter("ignore", DeprecationWarning)

@numba.njit(parallel=True)
def other(x):
    for i in numba.prange(x.size):
        x[i] += 1

if {before == "a step"}:
    step_all()
    assert numba.threading_layer() == "{layer}"
if {before == "another kernel"}:
    other(np.zeros(100_000))
    assert numba.threading_layer() == "{layer}"
if {before == "torch"}:
    import torch
    torch.mm(torch.ones(800, 800), torch.ones(800, 800))
child = os.fork()
if not child:
    step_all()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
child = multiprocessing.get_context("fork").Process(target=step_all)
child.start()
child.join()
assert child.exitcode == 0
step_all()
assert numba.threading_layer() == "{layer}"
"""
    )
    run(script, tmp_path, NUMBA_NUM_THREADS=2, NUMBA_THREADING_LAYER=layer, **SHARED)


def test_threads_step_at_once(tmp_path, layer):
    script = (
        COMMON
        + STEP_ALL
        + f"""
import numba

def steps(seed, p):
    rng = np.random.default_rng(seed)
    opt = [fastopt.SGD, fastopt.Adam][seed % 2](p)
    for step in range(10):
        g = rng.standard_normal(p.shape, dtype=np.float32)
        if step % 2:
            g = fastopt.IndexedSlices(rng.integers(0, p.shape[0], p.shape[0]), g)
        opt.step(g, clip_norm=1.0)

def parameters():
    return [np.ones((33_000 + k, 8), np.float32) for k in range(4)]

at_once, alone = parameters(), parameters()
threads = [threading.Thread(target=steps, args=item) for item in enumerate(at_once)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for item in enumerate(alone):
    steps(*item)
for together, one in zip(at_once, alone):
    assert not np.array_equal(one, np.ones_like(one))
    np.testing.assert_array_equal(together, one)
assert numba.threading_layer() == "{layer}"
"""
    )
    run(script, tmp_path, NUMBA_NUM_THREADS=2, NUMBA_THREADING_LAYER=layer, **SHARED)


def test_the_kernels_folder_is_not_a_package_of_its_own(tmp_path):
    script = """
try:
    import kernels
except ImportError as error:
    assert "fastopt.kernels" in str(error), error
    print("refused")
"""
    assert run(script, ROOT) == ["refused"]
