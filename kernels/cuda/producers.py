"""Arrays of other libraries as arrays of a device, of the same memory.

Torch's tensors are read by what torch says of them. Others offer the CUDA array interface or DLPack. Work on
an array may be waiting on its producer's stream; where that is not the one that kernels are launched on, this
one waits for it, and the host does not.
"""

from typing import Any

import ml_dtypes
import numpy as np

from fastopt.kernels.cuda.array import DeviceArray
from fastopt.kernels.cuda.driver import driver
from fastopt.kernels.cuda.streams import current_stream
from fastopt.kernels.loaded import is_tensor, loaded

CUDA, CUDA_MANAGED = 2, 13  # device types of DLPack
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def device_array(value: Any) -> DeviceArray | None:
    """``value`` as an array of the device that it lies on, None if it lies on none.

    Raises:
        NoDriverError: there is such an array, but no driver, or a package is missing.
        TypeError: a tensor whose memory does not hold its numbers, or a dtype that NumPy does not know.
    """
    if isinstance(value, DeviceArray):
        return value
    if is_tensor(value):
        return _of_tensor(loaded("torch"), value) if value.is_cuda else None
    interface = getattr(value, "__cuda_array_interface__", None)
    if interface is not None:
        return _of_interface(value, interface)
    of_device = getattr(value, "__dlpack_device__", None)
    if of_device is not None and not isinstance(value, np.ndarray) and of_device()[0] in (CUDA, CUDA_MANAGED):
        return _of_capsule(value, of_device()[1])
    return None


def _of_tensor(torch: Any, tensor: Any) -> DeviceArray:
    if tensor.is_neg() or tensor.is_conj():
        raise TypeError("the tensor is a view that negates or conjugates: pass .resolve_neg().resolve_conj()")
    dtype = _BFLOAT16 if tensor.dtype == torch.bfloat16 else _numpy_dtype(str(tensor.dtype))
    strides = tuple(stride * dtype.itemsize for stride in tensor.stride())
    return DeviceArray(
        tensor.device.index, tensor.data_ptr(), tuple(tensor.shape), dtype, strides, owner=tensor
    )


def _numpy_dtype(name: str) -> np.dtype:
    try:
        return np.dtype(name.removeprefix("torch."))
    except TypeError as error:
        raise TypeError(f"the tensor has dtype {name}, which NumPy does not know") from error


def _of_interface(value: Any, interface: dict[str, Any]) -> DeviceArray:
    address, read_only = interface["data"]
    typestr, shape, strides = interface["typestr"], tuple(interface["shape"]), interface.get("strides")
    dtype = _BFLOAT16 if typestr in ("<V2", "|V2") else np.dtype(typestr)
    device = driver().device_of(address) if address else _device_of_empty(value)
    stream = interface.get("stream")
    if stream is not None:
        driver().wait_for(device, stream)
    # JAX's arrays can't be written, which their interface does not say.
    writeable = not read_only and type(value).__module__.partition(".")[0] not in ("jax", "jaxlib")
    strides = None if strides is None else tuple(strides)
    return DeviceArray(device, address or 0, shape, dtype, strides, writeable=writeable, owner=value)


def _device_of_empty(value: Any) -> int:
    """The device of an array without elements, whose interface has no address."""
    if hasattr(value, "__dlpack_device__"):
        return int(value.__dlpack_device__()[1])
    return driver().current_device()


def _of_capsule(value: Any, device: int) -> DeviceArray:
    from cuda.core.utils import StridedMemoryView  # there where the driver is

    # The producer has our stream wait for what it has not finished.
    view = StridedMemoryView.from_dlpack(value, stream_ptr=current_stream(device))
    dtype = np.dtype(view.dtype)
    strides = None if view.strides is None else tuple(stride * dtype.itemsize for stride in view.strides)
    return DeviceArray(
        device, view.ptr, tuple(view.shape), dtype, strides, writeable=not view.readonly, owner=view
    )
