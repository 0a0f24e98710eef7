"""The same bits from run to run, for any number of threads, and from both variants of a kernel."""

import hashlib
import os
import subprocess
import sys

import cases
import numba
import numpy as np
import pytest

import fastopt
from fastopt._core.backend import host
from fastopt.kernels.cpu import norms, rows, threads

RUNS = [(case, False) for case in cases.RULES] + [(case, True) for case in cases.PARALLEL_SPARSE]
EACH = pytest.mark.parametrize(
    ("case", "sparse"), RUNS, ids=[f"{case}-{'sparse' if sparse else 'dense'}" for case, sparse in RUNS]
)


def run(case, sparse, rows=9_001, width=33):
    """Bytes of parameter and state after some steps, large enough to run in parallel."""
    rng = np.random.default_rng(21)
    p = cases.parameter(rng, (rows, width), np.float32)
    opt = case.make(p, case.options(rng, weight_decay=False))
    for _ in range(3):
        indices = np.minimum(rng.zipf(1.3, rows), rows) - 1
        g = cases.parameter(rng, (rows, width), np.float32)
        opt.step(fastopt.IndexedSlices(indices, g) if sparse else g, clip_norm=5.0)
    state = opt.state_dict()["state"][0]
    return b"".join([p.tobytes(), *(a.tobytes() for k, a in sorted(state.items()) if k != "step")])


@EACH
@cases.needs_two_threads
def test_steps_have_the_same_bits_for_any_number_of_threads_variant_and_run(
    case, sparse, restored_threads, monkeypatch
):
    first = run(case, sparse)
    assert run(case, sparse) == first
    numba.set_num_threads(1)
    assert run(case, sparse) == first
    monkeypatch.setattr(threads, "PARALLEL_FROM", 2**62)
    assert run(case, sparse) == first


@EACH
def test_small_steps_have_the_same_bits_in_both_variants(case, sparse, monkeypatch):
    for size in ((1, 1), (5, 3), (65, 7)):
        serial = run(case, sparse, *size)
        with monkeypatch.context() as patch:
            patch.setattr(threads, "PARALLEL_FROM", 0)
            assert run(case, sparse, *size) == serial


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@cases.needs_two_threads
def test_norms_have_the_same_bits_for_any_number_of_threads_and_variant(dtype, restored_threads, monkeypatch):
    rng = np.random.default_rng(22)
    g = np.asarray(rng.standard_normal((5_001, 21)) * 10.0 ** rng.integers(-9, 9, (5_001, 1)), dtype)
    indices = rng.integers(0, 500, 5_001)
    grads = [g, fastopt.IndexedSlices(indices, g)]
    assert fastopt.grad_norm(grads) == fastopt.grad_norm(grads)
    first = fastopt.grad_norm(grads)
    numba.set_num_threads(1)
    assert fastopt.grad_norm(grads) == first

    monkeypatch.setattr(threads, "PARALLEL_FROM", 2**62)  # all on one thread
    assert fastopt.grad_norm(grads) == first


@pytest.mark.parametrize(
    ("kernel", "args"),
    [
        (norms.scale_in_place, (np.float32(0.3),)),
        (norms.clip_in_place, (np.float32(0.3),)),
    ],
    ids=["scale", "clip"],
)
def test_clipping_has_the_same_bits_on_one_thread_and_on_all(kernel, args):
    serial = np.random.default_rng(23).standard_normal(70_001).astype(np.float32)
    parallel = serial.copy()
    kernel(0, serial, *args)
    kernel(threads.PARALLEL_FROM, parallel, *args)
    assert serial.tobytes() == parallel.tobytes()


def test_coalescing_and_lookups_have_the_same_bits_on_one_thread_and_on_all():
    rng = np.random.default_rng(24)
    serial = rng.standard_normal((5_001, 9)).astype(np.float32)
    parallel = serial.copy()
    indices = rng.integers(0, 700, 5_001)
    [segments] = host().segments_of([(indices, 700)])
    rows.coalesce(0, serial, segments.order, segments.starts, 0)
    rows.coalesce(threads.PARALLEL_FROM, parallel, segments.order, segments.starts, 0)
    assert serial.tobytes() == parallel.tobytes()
    found = np.empty((2, 5_001, 9), np.float32)
    rows.gather(0, serial, indices, found[0])
    rows.gather(threads.PARALLEL_FROM, serial, indices, found[1])
    assert found[0].tobytes() == found[1].tobytes() == serial[indices].tobytes()


def digest():
    """Of all rules."""
    total = hashlib.sha256()
    for case, sparse in RUNS:
        total.update(run(case, sparse))
    return total.hexdigest()


def test_fresh_processes_have_the_same_bits_for_any_number_of_threads():
    expected = digest()
    folder = os.path.dirname(__file__)
    code = f"import sys; sys.path.insert(0, {folder!r}); import test_determinism as t; print(t.digest())"
    for count in ("1", "2"):
        environment = {**os.environ, "NUMBA_NUM_THREADS": count}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True
        )
        assert result.stdout.strip() == expected, result.stderr
