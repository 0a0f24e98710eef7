"""DLPack's capsules of arrays of a CUDA device, read by their bytes and by cuda.core."""

import ctypes
import struct

import ml_dtypes
import numpy as np
import pytest
from devices import CUDA

from fastopt.kernels.cuda import driver, streams
from fastopt.kernels.cuda.array import empty, upload

CODES = {"i": 0, "u": 1, "f": 2, "b": 6, "V": 4}  # of DLPack, by NumPy's kind
DTYPES = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.int32, np.int64, np.uint8, np.bool_]
# The capsules are NumPy's, which tells of versions since 2.1.
VERSIONED = pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="NumPy before 2.1")
NAMES = {False: b"dltensor", True: b"dltensor_versioned"}


@pytest.fixture(params=CUDA, autouse=True)
def device(request):
    return request.param()


def pointer_of(capsule, name):
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.argtypes, get.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
    return get(capsule, name)


def read(capsule, versioned):
    """What the capsule's bytes say, and of a versioned one its version and flags."""
    at = pointer_of(capsule, NAMES[versioned])
    more = ()
    if versioned:
        *version, _, _, flags = struct.unpack("=IIQQQ", ctypes.string_at(at, 32))
        at, more = at + 32, (tuple(version), flags)
    given = struct.unpack("=QiiiBBHQQQ", ctypes.string_at(at, 48))
    data, kind, number, ndim, code, bits, lanes, shape, strides, offset = given
    assert offset == 0 and lanes == 1
    axes = [np.ctypeslib.as_array((ctypes.c_int64 * ndim).from_address(own)) for own in (shape, strides)]
    return data, (kind, number), (code, bits), *(tuple(axis.tolist()) for axis in axes), *more


@pytest.mark.parametrize(
    "max_version", [None, (0, 8), *(pytest.param(own, marks=VERSIONED) for own in ((1, 0), (1, 3)))]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_capsules_say_where_an_array_lies(dtype, max_version):
    array = upload(0, np.zeros((3, 4, 5), dtype))[1:, :, 2]
    versioned = max_version is not None and max_version[0] == 1
    found = read(array.__dlpack__(max_version=max_version), versioned)
    own = np.dtype(dtype)
    want = array.address, (2, 0), (CODES[own.kind], 8 * own.itemsize), (2, 4), (20, 5)
    assert array.__dlpack_device__() == (2, 0)
    assert found[:5] == want
    if versioned:
        assert found[5][0] == 1 and found[6] == 0


@VERSIONED
def test_capsules_say_that_an_array_is_read_only():
    array = upload(0, np.zeros(3)).read_only()
    assert read(array.__dlpack__(max_version=(1, 0)), True)[6] == 1
    with pytest.raises(BufferError, match="readonly"):
        array.__dlpack__()


@VERSIONED
def test_a_copy_is_one():
    array = upload(0, np.arange(6.0))
    capsule = array.__dlpack__(max_version=(1, 0), copy=True)
    found = read(capsule, True)
    assert found[0] != array.address and found[6] == 2
    assert read(array.__dlpack__(max_version=(1, 0), copy=False), True)[::6] == (array.address, 0)


def test_other_devices_are_refused():
    array = upload(0, np.zeros(3))
    assert read(array.__dlpack__(dl_device=(2, 0)), False)[1] == (2, 0)
    for other in ((1, 0), (2, 1)):
        with pytest.raises(BufferError, match="copy_to_host"):
            array.__dlpack__(dl_device=other)


@pytest.mark.parametrize("max_version", [None, pytest.param((1, 0), marks=VERSIONED)])
@pytest.mark.parametrize("used", [False, True])
def test_memory_lives_as_long_as_the_capsule_or_its_consumer(monkeypatch, max_version, used):
    freed, own = [], driver.driver()
    free = own.free
    monkeypatch.setattr(own, "free", lambda device, address: (freed.append(address), free(device, address)))
    array = empty(0, 5, np.float32)
    address = array.address
    capsule = array.__dlpack__(max_version=max_version)
    del array
    assert address not in freed
    if used:  # as a consumer does: it renames the capsule, and calls the deleter when it has done
        versioned = max_version is not None
        managed = pointer_of(capsule, NAMES[versioned])
        ctypes.pythonapi.PyCapsule_SetName.argtypes = ctypes.py_object, ctypes.c_char_p
        name = b"used_" + NAMES[versioned]
        ctypes.pythonapi.PyCapsule_SetName(capsule, name)
        [deleter] = struct.unpack("=Q", ctypes.string_at(managed + (16 if versioned else 56), 8))
        del capsule
        assert address not in freed
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(deleter)(managed)
    else:
        del capsule
    assert address in freed


def test_a_capsule_goes_while_an_error_is_on_its_way():
    array = upload(0, np.zeros(3))
    with pytest.raises(ZeroDivisionError):
        read(array.__dlpack__(), 1 // 0)
    assert array.address


def test_a_consumer_on_another_stream_finds_the_work_done(monkeypatch):
    waits, array = [], upload(0, np.zeros(3))
    monkeypatch.setattr(driver.driver(), "synchronize", waits.append)
    monkeypatch.setattr("fastopt.kernels.cuda.dlpack.current_stream", lambda device: 77)
    array.__dlpack__(stream=77)
    array.__dlpack__(stream=-1)
    assert not waits
    for stream in (None, streams.LEGACY, streams.PER_THREAD, 78):
        array.__dlpack__(stream=stream)
    assert waits == [0] * 4
    monkeypatch.setattr("fastopt.kernels.cuda.dlpack.current_stream", lambda device: streams.LEGACY)
    array.__dlpack__()
    array.__dlpack__(stream=streams.LEGACY)
    assert len(waits) == 4
    with pytest.raises(ValueError, match="stream is 0"):
        array.__dlpack__(stream=0)


@pytest.mark.parametrize("shape", [(2, 3), (), (0, 4)])
@VERSIONED
def test_cuda_core_reads_them(shape):
    utils = pytest.importorskip("cuda.core.utils")
    array = upload(0, np.zeros(shape, np.float32)).read_only()
    view = utils.StridedMemoryView.from_dlpack(array, stream_ptr=-1)
    assert view.shape == shape and view.dtype == np.float32 and view.readonly
    assert view.device_id == 0 and view.is_device_accessible
    assert not array.size or view.ptr == array.address
