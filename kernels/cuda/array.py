"""Arrays in the memory of a device, with what the package uses of NumPy's."""

import math
import operator
import os
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from fastopt.kernels.cuda.assign import copy_all, set_all
from fastopt.kernels.cuda.dlpack import CUDA, capsule_of
from fastopt.kernels.cuda.driver import driver

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def check_not_captured(device: int, what: str) -> None:
    """Refuse to do in a CUDA graph what it can't hold: to take memory, or to wait.

    Raises:
        RuntimeError: work of the device is being captured in one.
    """
    if driver().capturing(device):
        raise RuntimeError(
            f"{what} can't be captured in a CUDA graph: do this outside; of steps, those with dense "
            "gradients can be captured, after one ordinary step with the same arrays"
        )


class Memory:
    """Memory of a device, given back when the last array over it goes."""

    def __init__(self, device: int, nbytes: int) -> None:
        check_not_captured(device, "what needs new memory")
        self.device = device
        self._process = os.getpid()
        self._driver = driver()
        self.address = self._driver.allocate(device, max(nbytes, 1))

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # When the interpreter ends all memory goes with the process, and modules may have gone before.
        # A forked process has no device.
        address = getattr(self, "address", 0)
        if address and not is_finalizing() and self._process == os.getpid():
            self._driver.free(self.device, address)


class Flags:
    """What NumPy says of an array's memory."""

    def __init__(self, c_contiguous: bool, aligned: bool, writeable: bool) -> None:
        self.c_contiguous = c_contiguous
        self.aligned = aligned
        self.writeable = writeable


class DeviceArray:
    """An array in the memory of a CUDA device.

    It offers the CUDA array interface and DLPack, so that torch, CuPy, JAX and Numba use the same memory:
    ``torch.as_tensor(array, device="cuda")``, ``cupy.asarray(array)``. :meth:`copy_to_host` makes a NumPy
    array of it.

    Attributes:
        device: the number of the device. address: of the first element, an int.
        shape, dtype, strides (in bytes), ndim, size, itemsize, nbytes, flags: as those of NumPy.
    """

    __slots__ = ("_owner", "_writeable", "address", "device", "dtype", "shape", "strides")

    def __init__(
        self,
        device: int,
        address: int,
        shape: tuple[int, ...],
        dtype: Any,
        strides: tuple[int, ...] | None = None,
        *,
        writeable: bool = True,
        owner: Any = None,
    ) -> None:
        self.device = device
        self.address = address
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.strides = contiguous_strides(shape, self.dtype.itemsize) if strides is None else strides
        self._writeable = writeable
        self._owner = owner  # keeps the memory alive

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    @property
    def flags(self) -> Flags:
        expected = contiguous_strides(self.shape, self.itemsize)
        pairs = zip(self.shape, self.strides, expected, strict=True)
        contiguous = not self.size or all(n == 1 or a == b for n, a, b in pairs)
        return Flags(contiguous, self.address % self.itemsize == 0, self._writeable)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("an array without axes has no length")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, device={self.device})"

    # Views

    def _over(self, address: int, shape: tuple[int, ...], dtype: Any, strides: Any = None) -> "DeviceArray":
        writeable, owner = self._writeable, self._owner if self._owner is not None else self
        return DeviceArray(self.device, address, shape, dtype, strides, writeable=writeable, owner=owner)

    def read_only(self) -> "DeviceArray":
        """The same memory, not to be written."""
        view = self._over(self.address, self.shape, self.dtype, self.strides)
        view._writeable = False
        return view

    def view(self, dtype: Any) -> "DeviceArray":
        """The same memory as elements of another dtype of the same size."""
        assert np.dtype(dtype).itemsize == self.itemsize
        return self._over(self.address, self.shape, dtype, self.strides)

    def reshape(self, *shape: Any) -> "DeviceArray":
        """A view of a C-contiguous array, or of one that keeps its shape but for axes of length 1."""
        new = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        if -1 in new:
            known = math.prod(n for n in new if n != -1)
            new = tuple(self.size // max(known, 1) if n == -1 else n for n in new)
        if math.prod(new) != self.size:
            raise ValueError(f"cannot reshape an array of shape {self.shape} into {new}")
        if new == self.shape:
            return self
        if not self.flags.c_contiguous:
            raise ValueError("cannot reshape an array that is not C-contiguous without a copy")
        return self._over(self.address, new, self.dtype)

    def __getitem__(self, key: Any) -> "DeviceArray":
        """A view, by whole numbers, slices with a positive step, and an ellipsis."""
        address, shape, strides = self.address, [], []
        for own, length, stride in zip(self._keys(key), self.shape, self.strides, strict=True):
            if isinstance(own, slice):
                first, last, step = own.indices(length)
                if step < 0:
                    raise ValueError(f"a slice has step {step}: expected a positive one")
                chosen = range(first, last, step)
                address += (first if chosen else 0) * stride
                shape.append(len(chosen))
                strides.append(stride * step)
                continue
            if not hasattr(own, "__index__") or isinstance(own, bool | np.bool):
                raise TypeError(f"{own!r} is no index of a DeviceArray: expected whole numbers and slices")
            index = operator.index(own)
            if not -length <= index < length:
                raise IndexError(f"index {index} is out of range for an axis of length {length}")
            address += (index % length) * stride
        return self._over(address, tuple(shape), self.dtype, tuple(strides))

    def _keys(self, key: Any) -> list[Any]:
        """One key for each axis."""
        keys = list(key) if isinstance(key, tuple) else [key]
        wild = [i for i, own in enumerate(keys) if own is Ellipsis]
        if len(wild) > 1 or len(keys) - len(wild) > self.ndim:
            raise IndexError(f"{key!r} has too many indices for an array with {self.ndim} axes")
        at = wild[0] if wild else len(keys)
        missing = [slice(None)] * (self.ndim - len(keys) + len(wild))
        return [*keys[:at], *missing, *keys[at + 1 :]]

    # Contents

    def __setitem__(self, key: Any, value: Any) -> None:
        """Set the elements of a view to a number, or to an array of its shape, of a device or of the
        host."""
        target = self[key]
        target._check_writeable()
        if isinstance(value, np.ndarray) and value.ndim:
            value = upload(self.device, value)
        if isinstance(value, DeviceArray):
            if value.shape != target.shape:
                raise ValueError(f"an array of shape {target.shape} can't be set to one of {value.shape}")
            if value.device != target.device:  # each waits for the other
                for device in (value.device, target.device):
                    check_not_captured(device, "a copy between devices")
            elif _overlap(target, value):
                value = value.copy()
            copy_all(target, value)
        else:
            set_all(target, value)

    def fill(self, value: float) -> None:
        """Set each element to a number."""
        self._check_writeable()
        set_all(self, value)

    def _check_writeable(self) -> None:
        if not self._writeable:
            raise ValueError("the array is read-only")

    def copy_to_host(self) -> np.ndarray:
        """A NumPy array of its own memory; waits for what is being done to this one."""
        check_not_captured(self.device, "what reads an array of the device")
        source = self if self.flags.c_contiguous else self.copy()
        out = np.empty(self.shape, self.dtype)
        if out.nbytes:
            driver().download(self.device, out, source.address)
        return out

    def tolist(self) -> Any:
        """Its numbers, in lists as NumPy makes them; waits for them."""
        return self.copy_to_host().tolist()

    def item(self) -> Any:
        """The number of an array that has one; waits for it."""
        return self.copy_to_host().item()

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError("a DeviceArray lies on a CUDA device: copy_to_host() makes a NumPy array of it")

    def copy(self) -> "DeviceArray":
        """A C-contiguous copy."""
        out = empty(self.device, self.shape, self.dtype)
        copy_all(out, self)
        return out

    def copied_to(self, device: int) -> "DeviceArray":
        """A C-contiguous copy on a device."""
        out = empty(device, self.shape, self.dtype)
        out[...] = self if self.flags.c_contiguous else self.copy()
        return out

    def __deepcopy__(self, memo: dict) -> "DeviceArray":
        return self.copy()

    def __reduce__(self) -> tuple:
        return upload, (self.device, self.copy_to_host())

    # Protocols

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        # The interface's own word for bfloat16 is that of two bytes.
        typestr = "<V2" if self.dtype == BFLOAT16 else self.dtype.str
        strides = None if self.flags.c_contiguous else self.strides
        return {
            "shape": self.shape,
            "typestr": typestr,
            "data": (self.address if self.size else 0, not self._writeable),  # as the interface asks for
            "strides": strides,
            "stream": None,  # work was put on the producer's own stream
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A DLPack capsule over the same memory, or over a copy of it (see dlpack.py)."""
        if dl_device not in (None, self.__dlpack_device__()):
            raise BufferError(
                f"dl_device is {dl_device}, and the array lies on {self.__dlpack_device__()}: use "
                "copy_to_host(), and move what it returns"
            )
        return capsule_of(self.copy() if copy else self, stream, max_version, bool(copy))


def _overlap(one: DeviceArray, other: DeviceArray) -> bool:
    """Whether the spans of both in memory meet, and are not the same elements in the same order."""
    if one.address == other.address and one.strides == other.strides:
        return False
    (first, last), (begin, end) = _span(one), _span(other)
    return first < end and begin < last


def _span(array: DeviceArray) -> tuple[int, int]:
    """The addresses of its first byte, and of that after its last."""
    steps = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
    first = array.address + sum(step for step in steps if step < 0)
    return first, array.address + sum(step for step in steps if step > 0) + array.itemsize


def contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Those of a C-contiguous array."""
    strides: list[int] = []
    for extent in reversed(shape):
        strides.insert(0, itemsize)
        itemsize *= extent
    return tuple(strides)


def empty(device: int, shape: int | tuple[int, ...], dtype: Any) -> DeviceArray:
    """A new array of any content."""
    shape = (shape,) if isinstance(shape, int) else shape
    memory = Memory(device, math.prod(shape) * np.dtype(dtype).itemsize)
    return DeviceArray(device, memory.address, shape, dtype, owner=memory)


def zeros(device: int, shape: int | tuple[int, ...], dtype: Any) -> DeviceArray:
    """A new array of zeros."""
    array = empty(device, shape, dtype)
    if array.nbytes:
        driver().zero(device, array.address, array.nbytes)
    return array


def upload(device: int, array: np.ndarray) -> DeviceArray:
    """A copy of an array of the host."""
    source = np.ascontiguousarray(array).reshape(array.shape)
    out = empty(device, source.shape, source.dtype)
    if source.nbytes:
        driver().upload(device, out.address, source)
    return out
