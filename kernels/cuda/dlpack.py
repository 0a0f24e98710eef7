"""Arrays of a device for other libraries, as DLPack's capsules.

NumPy makes the capsule, of an array over the same addresses that nobody reads: it owns a capsule's memory in
machine code, which works while an exception is on its way and when the interpreter ends. What NumPy can't
know, the device and bfloat16, is then written into it.
"""

import ctypes
from typing import Any

import ml_dtypes
import numpy as np

from fastopt.kernels.cuda.driver import driver
from fastopt.kernels.cuda.streams import LEGACY, current_stream

CUDA = 2  # the type of device
BFLOAT16_CODE = 4
IS_COPIED = 2  # a flag
NO_WAIT = -1  # for a stream: the consumer sees to it that work is done
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_HAS_VERSIONS = np.lib.NumpyVersion(np.__version__) >= "2.1.0"


class _Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


# DLManagedTensor, of a consumer that knows no versions, begins with the tensor.
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.argtypes, _pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p


class _Memory:
    """The memory of an array, which lives as long, in the words of NumPy's interface for the host."""

    def __init__(self, array: Any) -> None:
        self._array = array
        dtype = np.dtype(np.uint16) if array.dtype == _BFLOAT16 else array.dtype
        self.__array_interface__ = {
            "shape": array.shape,
            "typestr": dtype.str,
            "data": (array.address, not array.flags.writeable),
            "strides": array.strides,
            "version": 3,
        }


def capsule_of(array: Any, stream: int | None, max_version: tuple[int, int] | None, copied: bool) -> Any:
    """The capsule of an array of a device.

    stream: the consumer's, whose work from now on finds that of fastopt done; None for the default one, -1
        for no waiting. max_version: the latest of DLPack's that the consumer knows; one before 1.0 can't say
        that an array is not to be written. copied: whether the array is a copy for the consumer.

    Raises:
        BufferError: the array is not to be written, and the capsule can't say so.
    """
    if stream == 0:
        raise ValueError("stream is 0, which DLPack leaves open for CUDA: pass 1, the legacy default stream")
    versioned = _HAS_VERSIONS and max_version is not None and max_version[0] >= 1
    memory = np.asarray(_Memory(array))
    made = memory.__dlpack__(max_version=(1, 0)) if versioned else memory.__dlpack__()
    if versioned:
        held = _Versioned.from_address(_pointer(made, b"dltensor_versioned"))
        held.flags |= IS_COPIED * copied
        tensor = held.tensor
    else:
        tensor = _Tensor.from_address(_pointer(made, b"dltensor"))
    tensor.device_type, tensor.device_id = CUDA, array.device
    if array.dtype == _BFLOAT16:
        tensor.code = BFLOAT16_CODE
    # Work of one stream is done in order.
    if stream != NO_WAIT and (stream or LEGACY) != current_stream(array.device):
        driver().synchronize(array.device)
    return made
