"""How long does the first step take, in a new process, without and with compiled kernels on disk?"""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys, time
import numpy as np
import numba
before = time.perf_counter()
import fastopt
imported = time.perf_counter() - before
rule, kind, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
p = np.ones((size // 64, 64), np.float32)
opt = getattr(fastopt, rule)(p)
grad = np.ones_like(p)
rows = np.arange(size // 64)
if kind == "sparse":
    grad = fastopt.IndexedSlices(rows, grad)
elif kind == "bags":
    grad = fastopt.BagGradient(rows, rows[::4], grad[: len(rows[::4])], "sum")
before = time.perf_counter()
opt.step(grad)
print(imported, time.perf_counter() - before)
"""


CASES = [
    ("Adam", "dense"),
    ("Adam", "sparse"),
    ("SGD", "sparse"),
    ("RowwiseAdaGrad", "sparse"),
    ("Adam", "bags"),
]


@pytest.mark.parametrize("size", [6_400, 6_400_000], ids=["serial", "parallel"])
@pytest.mark.parametrize(("rule", "kind"), CASES, ids=map("-".join, CASES))
@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_first_step_fastopt(benchmark, tmp_path, cache, rule, kind, size):
    """The time of the whole process is measured; what the step alone took is in ``extra_info``."""
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    took: list[list[float]] = []

    def process():
        command = [sys.executable, "-c", SCRIPT, rule, kind, str(size)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        took.append([float(word) for word in done.stdout.split()])

    if cache == "warm":
        process()
    benchmark.group = f"first step, {cache}, {rule}, {kind}, {size}"
    benchmark.pedantic(process, rounds=1 if cache == "cold" else 3)
    benchmark.extra_info["import_s"], benchmark.extra_info["step_s"] = took[-1]
    print(f"\n{benchmark.group}: import {took[-1][0]:.3f} s over numba's, first step {took[-1][1]:.3f} s")
