"""Norms on a CUDA device: partial sums have the CPU's bits, and sums differ from the CPU's in their order
alone."""

import math

import ml_dtypes
import numpy as np
import pytest
from devices import CUDA

from fastopt._core.state import computed_with, gradient_format
from fastopt._step.norms import DenseSquares, norm_of
from fastopt.kernels.cpu import backend as cpu
from fastopt.kernels.cpu import norms as cpu_norms
from fastopt.kernels.cpu.threads import run
from fastopt.kernels.cuda.array import DeviceArray, empty
from fastopt.kernels.cuda.backend.basics import Basics
from fastopt.kernels.cuda.backend.norms import Norms
from fastopt.kernels.formats import formats

DTYPES = [np.dtype(kind) for kind in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
# Two blocks of elements and more; arrays that end within a block and within a vector; none at all
SIZES = [3, 0, 8_189, 20_000, 1, 0, 17_408, 5]


class Backend(Basics, Norms):
    """What norms need of a backend."""


BACKEND = Backend(0, cpu)


@pytest.fixture(params=CUDA, autouse=True)
def device(request):
    return request.param()


def ulps(got, want):
    """How many units in the last place of float64 two numbers are apart."""
    if math.isnan(got) or math.isnan(want):
        return 0 if math.isnan(got) and math.isnan(want) else math.inf
    return 0 if got == want else abs(got - want) / np.spacing(abs(want))


def gradients(dtype, sizes=SIZES, scale=1.0):
    rng = np.random.default_rng(5)
    return [(rng.standard_normal(size) * scale).astype(dtype) for size in sizes]


def on_device(arrays, offset=0):
    """Copies that begin ``offset`` elements after memory that is aligned."""
    copies = []
    for array in arrays:
        target = empty(0, array.size + offset, array.dtype)[offset:]
        target[...] = array
        copies.append(target)
    return copies


def addresses_of(arrays):
    return np.array([own.address if isinstance(own, DeviceArray) else cpu.address(own) for own in arrays])


def squares_of(backend, dtype, sizes=SIZES):
    return backend.Squares(computed_with(dtype), gradient_format(dtype), sizes)


def cpu_partials(arrays, scale):
    """The CPU's partial sums."""
    dtype, sizes = arrays[0].dtype, [array.size for array in arrays]
    like, kind = computed_with(dtype), gradient_format(dtype)
    bases = np.cumsum([0, *sizes])
    partials = np.zeros(-(-int(bases[-1]) // cpu_norms.SUMMED))
    arguments = like.type(0), formats(kind), addresses_of(arrays), bases, scale, partials
    run([cpu_norms.sum_squares_arrays.ready(int(bases[-1]), arguments, (like, kind))])
    return partials


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_partial_sums_have_the_bits_of_the_cpu(dtype, offset):
    host = gradients(dtype)
    arrays = on_device(host, offset)
    squares = squares_of(BACKEND, dtype)
    total = squares.sum(addresses_of(arrays), 0.3)
    want = cpu_partials(host, 0.3)
    np.testing.assert_array_equal(squares.partials.copy_to_host(), want)
    assert ulps(total, float(want.sum())) <= 2


def norm_on_device(groups, rows=()):
    """The norm of arrays, one list for each dtype, and of rows; what it is of lives as long."""
    parts = [on_device(group) for group in groups]
    squares = [
        (squares_of(BACKEND, group[0].dtype, [own.size for own in group]), addresses_of(part))
        for group, part in zip(groups, parts, strict=True)
    ]
    return BACKEND.norm(squares, rows), parts


def norm_on_host(groups):
    arrays = [own for group in groups for own in group]
    dense = DenseSquares((cpu, own.dtype, own.size) for own in arrays)
    return norm_of(dense, addresses_of(arrays), [])


@pytest.mark.parametrize("scale", [1.0, 1e200, 1e-200], ids=str)
def test_norms_are_those_of_the_cpu(device, scale):
    groups = [gradients(dtype, [30, 9_000]) for dtype in DTYPES if scale == 1.0 or dtype == np.float64]
    norm, alive = norm_on_device(groups)
    waits = device.driver.waits
    got = norm.value()
    assert ulps(got, norm_on_host(groups)) <= 2
    assert math.isfinite(got) and got > 0
    assert norm.value() == got and device.driver.waits == waits + 1
    assert alive
