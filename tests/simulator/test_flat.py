"""Every rule in numba-cuda's simulator, a second opinion on what its Python source means. The simulator needs
a process of its own: ``NUMBA_ENABLE_CUDASIM=1 pytest tests/simulator``."""

import inspect

import numba
import numpy as np
import pytest
import reference
from numba.core import config

from fastopt.kernels.cpu.jit import OPTIONS as JIT_OPTIONS
from fastopt.kernels.element import load, store, update_element
from fastopt.kernels.rule import L2, Decoupled, Scaled
from fastopt.kernels.rules.adagrad import AdaGradH
from fastopt.kernels.rules.sgd import SGDH

if not config.ENABLE_CUDASIM:
    pytest.skip("needs NUMBA_ENABLE_CUDASIM=1", allow_module_level=True)
pytest.importorskip("numba_cuda")

from numba import cuda
from simulator import flat as gpu

BLOCKS, THREADS = 2, 4
SHAPES = [(0, 3), (1, 1), (1, 7), (BLOCKS * THREADS, 1), (2 * BLOCKS * THREADS + 1, 3)]
STEPS = [1, 2, 9]  # the last is one that RAdam rectifies
SCALE, LIMIT, WEIGHT_DECAY = 0.5, 0.7, 0.1
OPTIONS = {
    "lr": 0.03,
    "momentum": 0.8,
    "dampening": 0.3,
    "lr_decay": 0.1,
    "momentum_decay": 0.2,
    "alpha": 0.9,
    "betas": (0.8, 0.95),
    "beta": 0.8,
    "eps": 1e-3,
}
# The function in reference.py of each rule, and the options that make it this variant.
REFERENCES = {
    "SGDH": (reference.sgd, {}),
    "MomentumH": (reference.momentum, {}),
    "AdaGradH": (reference.adagrad, {}),
    "RowwiseAdaGradH": (reference.rowwise_adagrad, {}),
    "RMSPropH": (reference.rmsprop, {"momentum": 0.0}),
    "RMSPropMomentumH": (reference.rmsprop, {}),
    "CenteredRMSPropH": (reference.rmsprop, {"centered": True, "momentum": 0.0}),
    "CenteredRMSPropMomentumH": (reference.rmsprop, {"centered": True}),
    "AdamH": (reference.adam, {}),
    "AMSGradH": (reference.adam, {"amsgrad": True}),
    "SparseAdamH": (reference.sparse_adam, {}),
    "RowwiseAdamH": (reference.rowwise_adam, {}),
    "RAdamH": (reference.radam, {}),
    "NAdamH": (reference.nadam, {}),
    "LionH": (reference.lion, {}),
    "SignumH": (reference.signum, {}),
}
ULPS = 100  # v - mean^2 of a centered RMSProp loses a digit


@numba.njit(**JIT_OPTIONS)
def cpu_flat(h, c, p, g, state):
    for i in range(p.size):
        new = update_element(h, c, p[i], g[i], *load(state, i))
        p[i] = new[0]
        store(state, i, new[1:])


@numba.njit(**JIT_OPTIONS)
def cpu_flat_rows(h, c, p, g, state, row_state):
    for row in range(p.shape[0]):
        gpu.update_row(h, c, p[row], g[row], load(state, row), row_state[0][row : row + 1])


def kernels(rule):
    return (gpu.flat_rows, cpu_flat_rows) if rule.row_slots else (gpu.flat, cpu_flat)


def flattened(arguments):
    p, g, *states = arguments
    return [p, g, *(array for state in states for array in state)]


def whole(arguments):
    """The arrays with what lies around them, which no kernel may touch."""
    return [array.base for array in flattened(arguments)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_simulated_kernels_agree_with_the_cpu_and_the_formula(rule, decay, dtype, hyperparameters, arrays):
    gpu_kernel, cpu_kernel = kernels(rule)
    follow, variant = REFERENCES[rule.hyper.__name__]
    options = {**OPTIONS, **variant}
    common = {
        "weight_decay": 0.0 if decay is Scaled else WEIGHT_DECAY,
        "decoupled": decay is Decoupled,
    }
    # the formula is as sharp in float64, where compiling all pairs for the CPU would take long
    with_cpu = dtype == np.float32 or decay is L2
    for rows, dim in SHAPES:
        on_gpu, on_cpu = arrays(dtype, rows, dim), arrays(dtype, rows, dim)
        p, g = (array.astype(np.float64) for array in on_gpu[:2])
        slots = (*rule.state_slots, *rule.row_slots)
        state = {k: array.astype(np.float64) for k, array in zip(slots, flattened(on_gpu)[2:], strict=True)}
        for step in STEPS:
            options["nesterov"] = step == STEPS[-1]
            taken = {k: v for k, v in options.items() if k in inspect.signature(follow).parameters}
            h, c = hyperparameters(dtype, step, SCALE, LIMIT, WEIGHT_DECAY, options)
            cuda.jit(gpu_kernel)[BLOCKS, THREADS](h, c, *on_gpu)
            p = follow(p, np.clip(SCALE * g, -LIMIT, LIMIT), state, step, **taken, **common)
            if with_cpu:
                cpu_kernel(h, c, *on_cpu)
        for got, want in zip(flattened(on_gpu), [p, g, *state.values()], strict=True):
            atol = ULPS * np.finfo(dtype).eps * reference.peak(want)
            np.testing.assert_allclose(got, want, rtol=0, atol=atol)
        for got, want in zip(whole(on_gpu), whole(on_cpu), strict=True):
            if with_cpu:
                np.testing.assert_array_equal(got, want)
            else:
                np.testing.assert_array_equal(got[[0, -1]], want[[0, -1]])


@pytest.mark.parametrize(("blocks", "threads"), [(1, 1), (1, 32), (5, 3), (40, 1)])
def test_any_grid_updates_every_element_once(blocks, threads):
    h, c = SGDH(np.float32(0.5)), Scaled(np.float32(1), np.float32(np.inf))
    p, g = np.zeros(37, np.float32), np.arange(37, dtype=np.float32)
    cuda.jit(gpu.flat)[blocks, threads](h, c, p, g, ())
    np.testing.assert_array_equal(p, -g / 2)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_and_infinity_stay_in_their_elements():
    h, c = AdaGradH(np.float32(0.5), np.float32(1e-3)), Scaled(np.float32(1), np.float32(np.inf))
    p, g, state = np.ones(5, np.float32), np.float32([1, np.nan, 1, np.inf, 1]), np.zeros(5, np.float32)
    cuda.jit(gpu.flat)[1, 2](h, c, p, g, (state,))
    np.testing.assert_array_equal(np.isfinite(p), [True, False, True, False, True])
    np.testing.assert_array_equal(state, [1, np.nan, 1, np.inf, 1])
