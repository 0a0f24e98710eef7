"""What is done to whole arrays of a CUDA device gives the bits that it gives on the CPU."""

import ml_dtypes
import numpy as np
import pytest
from devices import CUDA, bits

from fastopt.kernels.cpu import backend as cpu
from fastopt.kernels.cuda.array import DeviceArray, empty, upload
from fastopt.kernels.cuda.backend.basics import Basics
from fastopt.kernels.cuda.backend.elementwise import Elementwise
from fastopt.kernels.cuda.elementwise import rows_of
from fastopt.kernels.formats import BLOCK, ROOT8, SIGNED8

DTYPES = np.float32, np.float64, np.float16, ml_dtypes.bfloat16
SIZES = 0, 1, 7, 64, 1030
BIG = (2**31 + 5, 2), (3, 2**33)


class Backend(Basics, Elementwise):
    """What the tests ask."""


BACKEND = Backend(0, cpu)


@pytest.fixture(params=CUDA, autouse=True)
def device(request):
    return request.param()


def numbers(size, dtype):
    """Ordinary numbers, and those that are none, are too large or too small."""
    rng = np.random.default_rng(size)
    values = rng.standard_normal(size) * 3
    special = np.array([np.nan, np.inf, -np.inf, -0.0, 6e4, -6e4, 1e-7])[:size]
    values[rng.permutation(size)[: special.size]] = special
    return values.astype(dtype)


def over(array, view):
    """The array of the device that is to the uploaded ``array`` as ``view``, one of it, is to ``array``."""
    base = upload(0, array)
    offset = view.__array_interface__["data"][0] - array.__array_interface__["data"][0]
    return DeviceArray(0, base.address + offset, view.shape, view.dtype, view.strides, owner=base), base


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["scale", "clip"])
@pytest.mark.parametrize("first", [0, 1], ids=["aligned", "not aligned"])
def test_scaled_and_clipped(dtype, size, name, first):
    values = numbers(size + first, dtype)
    expected = values.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        getattr(cpu, name)(expected[first:], 0.37)
    array = upload(0, values)
    getattr(BACKEND, name)(array[first:], 0.37)
    np.testing.assert_array_equal(bits(array.copy_to_host()), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_widened(dtype):
    values = numbers(1030, dtype)
    array = upload(0, values)
    found = BACKEND.widen(array)
    if values.itemsize != 2:
        assert found is array
        return
    assert found.dtype == np.float32
    np.testing.assert_array_equal(bits(found.copy_to_host()), bits(cpu.widen(values)))
    assert BACKEND.widen(empty(0, (0, 3), dtype)).shape == (0, 3)


VIEWS = {
    "column": lambda a: a[:, 1, 0],
    "every other": lambda a: a.reshape(-1)[::2],
    "backwards": lambda a: a.reshape(-1)[::-1],
    "transposed": lambda a: a.transpose(1, 0, 2),
    "channels last": lambda a: a.transpose(2, 0, 1),
    "part of rows": lambda a: a[3:, :, 1:3],
    "one number many times": lambda a: np.broadcast_to(a[3, :1, 2], (5, 70)),
    "no elements": lambda a: a[:, :0, 1:],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16, np.int32])
def test_contiguous_of_any_strides(view, dtype):
    values = np.arange(40 * 3 * 5).astype(dtype).reshape(40, 3, 5)
    expected = VIEWS[view](values)
    array, _ = over(values, expected)
    found = BACKEND.contiguous(array)
    assert found.flags.c_contiguous and found.shape == expected.shape
    np.testing.assert_array_equal(found.copy_to_host(), expected)


def test_contiguous_arrays_are_not_copied():
    array = upload(0, np.ones((3, 4)))
    assert BACKEND.contiguous(array) is array


@pytest.mark.parametrize("view", ["column", "every other", "transposed", "part of rows"])
@pytest.mark.parametrize("value", [0, 2.5])
def test_views_of_any_strides_are_set(view, value):
    """To a number, and to another array; other elements stay as they are."""
    values = np.arange(600, dtype=np.float32).reshape(40, 3, 5)
    own = VIEWS[view](values)
    array, base = over(values, own)
    array.fill(value)
    own[...] = value
    np.testing.assert_array_equal(base.copy_to_host(), values)
    given = np.arange(own.size, dtype=np.float16).reshape(own.shape)
    array[...] = given.astype(np.float32)
    own[...] = given
    np.testing.assert_array_equal(base.copy_to_host(), values)


@pytest.mark.parametrize("shape", BIG)
def test_arrays_of_more_elements_than_int32_counts(shape):
    """They are few blocks, the elements of which are all there."""
    n, m = shape
    [part] = rows_of(shape, (4, 4 * n))
    assert part.rows * part.width == n * m
    assert part.blocks < 2**31
    [part] = rows_of(shape, (4 * m, 4), (8 * m, 8))
    assert (part.rows, part.width, part.steps) == (1, n * m, (4, 8))


@pytest.mark.parametrize("kind", [SIGNED8, ROOT8])
@pytest.mark.parametrize("shape", [(9, 300), (5, BLOCK), (300, 1), (2, 3 * BLOCK + 1), (0, 300)])
def test_blocks_that_end_with_rows(kind, shape):
    rng = np.random.default_rng(shape[1])
    rows, dim = shape
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    scales = numbers(-(-codes.size // BLOCK), np.float32)
    scales = np.abs(scales)
    new, new_scales = np.empty_like(codes), np.empty((rows, -(-dim // BLOCK)), np.float32)
    found, found_scales = empty(0, shape, np.uint8), empty(0, new_scales.shape, np.float32)
    cpu.reblock(kind, codes, scales, new, new_scales)
    BACKEND.reblock(kind, upload(0, codes), upload(0, scales), found, found_scales)
    np.testing.assert_array_equal(found_scales.copy_to_host(), new_scales)
    finite = np.isfinite(new_scales).repeat(BLOCK, axis=1)[
        :, :dim
    ]  # codes of others stand for NaN, any of them
    np.testing.assert_array_equal(found.copy_to_host()[finite], new[finite])
