"""Kernels that numba-cuda compiles, interpreted: right as they are, found wrong when something is gone."""

import re

import numpy as np
import pytest
from numba.core import config

if config.ENABLE_CUDASIM:
    pytest.skip("the simulator does not compile", allow_module_level=True)
pytest.importorskip("numba_cuda")

from numba import cuda, float32, float64, int32, int64

from ptx.fault import Fault
from ptx.machine import Module, launch
from ptx.programs import memory_of

THREADS = 128


def total(x, out):
    """Sums of blocks: within a warp by shuffles, between warps in shared memory."""
    partial = cuda.shared.array(4, float64)
    thread = cuda.threadIdx.x
    value = float64(0)
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        value += float64(x[i])
    distance = 16
    while distance:
        value += cuda.shfl_down_sync(0xFFFFFFFF, value, distance)
        distance >>= 1
    for _ in range(2):  # what the first round leaves is read before the second writes it
        if thread % 32 == 0:
            partial[thread // 32] = value
        cuda.syncthreads()
        if thread == 0:
            out[cuda.blockIdx.x] = partial[0] + partial[1] + partial[2] + partial[3]
        cuda.syncthreads()


def histogram(x, counts):
    own = cuda.shared.array(256, int32)
    thread = cuda.threadIdx.x
    for k in range(thread, 256, cuda.blockDim.x):
        own[k] = 0
    cuda.syncthreads()
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        cuda.atomic.add(own, x[i] & 255, 1)
    cuda.syncthreads()
    for k in range(thread, 256, cuda.blockDim.x):
        cuda.atomic.add(counts, k, own[k])


def collatz(x, steps):
    """A loop that each thread goes round another number of times."""
    i = cuda.grid(1)
    if i < x.size:
        number, count = x[i], 0
        while number > 1:
            number = number // 2 if number % 2 == 0 else 3 * number + 1
            count += 1
        steps[i] = count


def compiled(kernel, *kinds, cc=(9, 0)):
    return cuda.compile_ptx(kernel, tuple(kind[::1] for kind in kinds), cc=cc)[0]


def run(text, *arrays, grid):
    arguments = []
    for array in arrays:
        arguments += [0, 0, array.size, array.itemsize, array.ctypes.data, array.size, array.itemsize]
    return launch(Module(text), memory_of(*arrays), grid, THREADS, arguments)


ALL = pytest.mark.parametrize("cc", [(7, 5), (9, 0), (10, 0)], ids=lambda cc: f"sm_{cc[0]}{cc[1]}")


@ALL
def test_a_sum(cc):
    x, out = np.arange(1000, dtype=np.float32), np.zeros(3)
    statistics = run(compiled(total, float32, float64, cc=cc), x, out, grid=3)
    assert out.sum() == x.sum(dtype=np.float64)
    assert statistics.executed["bar.sync"] > 0


def test_a_sum_without_one_of_its_barriers():
    text = compiled(total, float32, float64)
    x, out = np.arange(1000, dtype=np.float32), np.zeros(3)
    barriers = [match.span() for match in re.finditer(r"bar\.sync\s+0;", text)]
    found = []
    for first, end in barriers:
        try:
            run(text[:first] + text[end:], x, out, grid=3)
            found.append("")
        except Fault as fault:
            found.append(str(fault).split(":")[0])
    assert len(barriers) > 1
    assert found == ["racecheck"] * (len(barriers) - 1) + [""]  # the last one has nothing to order


def test_a_sum_of_what_does_not_fit():
    text = compiled(total, float32, float64)
    x = np.arange(1000, dtype=np.float32)
    with pytest.raises(Fault, match="memcheck: out of bounds: thread 0 of block 3"):
        run(text, x, np.zeros(3), grid=4)
    out = np.zeros(3)
    out.flags.writeable = False
    with pytest.raises(Fault, match="memcheck: a write to what is read only: thread 0"):
        run(text, x, out, grid=3)


@ALL
def test_a_histogram(cc):
    x, counts = np.random.default_rng(0).integers(0, 1 << 40, 3000), np.zeros(256, np.int32)
    run(compiled(histogram, int64, int32, cc=cc), x, counts, grid=4)
    np.testing.assert_array_equal(counts, np.bincount(x & 255, minlength=256))


@pytest.mark.parametrize("which", [0, 1])
def test_a_histogram_without_one_of_its_barriers(which):
    text = compiled(histogram, int64, int32)
    first, end = [match.span() for match in re.finditer(r"bar\.sync\s+0;", text)][which]
    x, counts = np.random.default_rng(0).integers(0, 1 << 40, 3000), np.zeros(256, np.int32)
    with pytest.raises(Fault, match=r"racecheck|initcheck"):
        run(text[:first] + text[end:], x, counts, grid=4)


def test_threads_that_part():
    x, steps = np.arange(1, 500), np.zeros(499, np.int64)
    run(compiled(collatz, int64, int64), x, steps, grid=4)
    expected = np.zeros(499, np.int64)
    for i, number in enumerate(x.tolist()):
        while number > 1:
            number = number // 2 if number % 2 == 0 else 3 * number + 1
            expected[i] += 1
    np.testing.assert_array_equal(steps, expected)
