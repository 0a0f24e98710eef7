"""The CUDA driver of this machine, through cuda.core."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from cuda.bindings import driver as cuda
from cuda.core import Device, LaunchConfig, ObjectCode, Stream, launch
from cuda.pathfinder import DynamicLibNotFoundError

from fastopt.kernels.cuda import compile
from fastopt.kernels.cuda.errors import NoDriverError
from fastopt.kernels.cuda.pool import Pool, capacity_of
from fastopt.kernels.cuda.streams import current


def _checked(result: tuple) -> Any:
    """What a call of the driver returned beside its error."""
    error, *values = result
    if error != cuda.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver failed: {error.name}")
    return values[0] if values else None


@functools.lru_cache(maxsize=1024)  # grids of sparse steps differ
def _config(grid: int, block: int) -> LaunchConfig:
    return LaunchConfig(grid=grid, block=block)


class _Stream:
    """A stream of a device (see pool.py); the handles 1 and 2 are those of the current device.

    Args:
        owner: keeps the stream alive.
    """

    def __init__(self, handle: int, owner: Any = None) -> None:
        self.handle = handle
        self.native = Stream.from_handle(handle)
        self._owner = owner

    @property
    def pointer(self) -> Any:
        """The handle, as the driver takes it."""
        return self.native.handle

    def wait(self, other: "_Stream") -> None:
        self.native.wait(other.native)

    def capturing(self) -> bool:
        error, status = cuda.cuStreamIsCapturing(self.pointer)
        if error == cuda.CUresult.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT:  # another stream holds the default one
            return True
        _checked((error,))
        return status != cuda.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE


class Machine:
    """The driver of this machine (see :class:`fastopt.kernels.cuda.driver.Driver`)."""

    code = "cubin"

    def __init__(self) -> None:
        try:
            self._devices = Device.get_all_devices()
        except DynamicLibNotFoundError as error:
            raise NoDriverError(
                "CUDA arrays need NVIDIA's driver, which this machine lacks: install it, its version 525 or "
                "later for CUDA 12, or 580 for CUDA 13"
            ) from error
        except Exception as error:  # a driver that is too old, a machine without devices, a forked process
            raise NoDriverError(f"NVIDIA's driver can't be used in this process: {error}") from error
        self._contexts: dict[int, Any] = {}
        self._pools = [Pool(_Stream) for _ in self._devices]

    @contextmanager
    def _at(self, device: int) -> Iterator[None]:
        """Have the calls of this thread be for a device, and afterwards for that of before."""
        own, before = self._context(device), _checked(cuda.cuCtxGetCurrent())
        if own == before:
            yield
            return
        try:
            _checked(cuda.cuCtxPushCurrent(own))
            yield
        finally:
            if _checked(cuda.cuCtxGetCurrent()) == own:  # an interrupt may come before it is
                _checked(cuda.cuCtxPopCurrent())

    def _context(self, device: int) -> Any:
        """The primary context of a device, which other libraries use, too."""
        found = self._contexts.get(device)
        if found is None:
            before = _checked(cuda.cuCtxGetCurrent())
            self._devices[device].set_current()
            found = self._contexts[device] = _checked(cuda.cuCtxGetCurrent())
            _checked(cuda.cuCtxSetCurrent(before))
        return found

    def _stream(self, device: int) -> _Stream:
        """The stream that work on the device, whose context is current, goes to now."""
        return self._pools[device].use(*current(device))

    def version(self) -> str:
        number = _checked(cuda.cuDriverGetVersion())
        return f"{number // 1000}.{number % 1000 // 10}"

    def count(self) -> int:
        return len(self._devices)

    def name(self, device: int) -> str:
        return self._devices[device].name

    def compute_capability(self, device: int) -> tuple[int, int]:
        found = self._devices[device].compute_capability
        return found.major, found.minor

    def multiprocessors(self, device: int) -> int:
        return self._devices[device].properties.multiprocessor_count

    def device_of(self, address: int) -> int:
        attribute = cuda.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        return int(_checked(cuda.cuPointerGetAttribute(attribute, address)))

    def current_device(self) -> int:
        if not int(_checked(cuda.cuCtxGetCurrent())):
            return 0
        return int(_checked(cuda.cuCtxGetDevice()))

    def allocate(self, device: int, nbytes: int) -> int:
        capacity, pool = capacity_of(nbytes), self._pools[device]
        with self._at(device):
            stream = self._stream(device)
            self._settle(device)
            buffer = pool.taken(capacity, stream)
            if buffer is None:
                buffer = self._devices[device].memory_resource.allocate(capacity, stream=stream.native)
            return pool.lend(buffer, capacity, stream)

    def free(self, device: int, address: int) -> None:
        self._pools[device].give_back(address)
        with self._at(device):
            self._settle(device)

    def _settle(self, device: int) -> None:
        """Give back what does not wait for its next use."""
        for buffer, stream in self._pools[device].settle():
            buffer.close(stream.native)

    def upload(self, device: int, address: int, array: np.ndarray) -> None:
        # The driver has copied pageable memory when it returns, to where the device takes it from. Memory
        # that it knows it may read later.
        with self._at(device):
            source, stream = array.ctypes.data, self._stream(device).pointer
            _checked(cuda.cuMemcpyHtoDAsync(address, source, array.nbytes, stream))
            kind = cuda.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
            if cuda.cuPointerGetAttribute(kind, source)[0] == cuda.CUresult.CUDA_SUCCESS:
                _checked(cuda.cuStreamSynchronize(stream))

    def download(self, device: int, array: np.ndarray, address: int) -> None:
        with self._at(device):
            stream = self._stream(device).pointer
            _checked(cuda.cuMemcpyDtoHAsync(array.ctypes.data, address, array.nbytes, stream))
            _checked(cuda.cuStreamSynchronize(stream))

    def copy(self, device: int, address: int, origin: int, source: int, nbytes: int) -> None:
        if origin == device:
            with self._at(device):
                _checked(cuda.cuMemcpyAsync(address, source, nbytes, self._stream(device).pointer))
            return
        # Memory of a pool is of one device alone, unless it is given to others, and then takes this call.
        contexts = self._context(device), self._context(origin)
        with self._at(device):
            stream = self._stream(device)
            stream.native.wait(self._reached(origin))
            _checked(
                cuda.cuMemcpyPeerAsync(address, contexts[0], source, contexts[1], nbytes, stream.pointer)
            )
        reached = self._reached(device)
        with self._at(origin):  # whose memory may be written again once it is read
            self._stream(origin).native.wait(reached)

    def _reached(self, device: int) -> Any:
        """An event: the work that was asked for so far is done."""
        with self._at(device):
            return self._stream(device).native.record()

    def zero(self, device: int, address: int, nbytes: int) -> None:
        with self._at(device):
            _checked(cuda.cuMemsetD8Async(address, 0, nbytes, self._stream(device).pointer))

    def translate(self, text: str, cc: tuple[int, int], most_registers: int | None) -> bytes:
        return compile.cubin(text, cc, most_registers)

    def load(self, device: int, code: Any, name: str) -> Any:
        with self._at(device):
            return ObjectCode.from_cubin(code).get_kernel(name)

    def launcher(
        self, device: int, kernel: Any, grid: int, block: int, arguments: Sequence[int | float]
    ) -> Callable[[], object]:
        config = _config(grid, block)

        def call() -> None:
            with self._at(device):
                launch(self._stream(device).native, config, kernel, *arguments)

        return call

    def capturing(self, device: int) -> bool:
        with self._at(device):
            return self._stream(device).capturing()

    def wait_for(self, device: int, stream: int) -> None:
        with self._at(device):
            own = self._stream(device)
            if own.handle != stream:
                own.wait(_Stream(stream))

    def synchronize(self, device: int) -> None:
        with self._at(device):
            self._stream(device).native.sync()
