"""The CUDA driver of this machine, through cuda.core."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from cuda.bindings import driver as cuda
from cuda.core import Device, LaunchConfig, ObjectCode, Stream, launch

from fastopt.kernels.cuda import compile
from fastopt.kernels.cuda.errors import EXTRA, NoDriverError
from fastopt.kernels.cuda.streams import current_stream


def _checked(result: tuple) -> Any:
    """What a call of the driver returned beside its error."""
    error, *values = result
    if error != cuda.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver failed: {error.name}")
    return values[0] if values else None


class Machine:
    """The driver of this machine (see :class:`fastopt.kernels.cuda.driver.Driver`)."""

    code = "cubin"

    def __init__(self) -> None:
        try:
            self._devices = Device.get_all_devices()
        except Exception as error:  # of cuda.pathfinder: the driver's library is not found
            raise NoDriverError(
                f"CUDA arrays need NVIDIA's driver, which this machine lacks ({error}): install it, and "
                f"{EXTRA}"
            ) from error
        self._local = threading.local()
        self._streams: dict[int, Stream] = {}
        self._configs: dict[tuple[int, int], LaunchConfig] = {}
        self._buffers: dict[tuple[int, int], Any] = {}

    def _on(self, device: int) -> None:
        """Have the calls of this thread be for a device."""
        if getattr(self._local, "device", None) != device:
            self._devices[device].set_current()
            self._local.device = device

    def stream(self, device: int) -> Stream:
        """The stream that work on a device goes to now."""
        self._on(device)
        return self._stream(current_stream(device))

    def _stream(self, handle: int) -> Stream:
        found = self._streams.get(handle)
        if found is None:
            found = self._streams[handle] = Stream.from_handle(handle)
        return found

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

    def allocate(self, device: int, nbytes: int) -> int:
        self._on(device)
        buffer = self._devices[device].memory_resource.allocate(nbytes, stream=self.stream(device))
        address = int(buffer.handle)
        self._buffers[device, address] = buffer
        return address

    def free(self, device: int, address: int) -> None:
        self._on(device)
        self._buffers.pop((device, address)).close(self.stream(device))

    def upload(self, device: int, address: int, array: np.ndarray) -> None:
        # The driver has copied pageable memory when it returns, to where the device takes it from.
        self._on(device)
        source, stream = array.ctypes.data, self._handle(device)
        _checked(cuda.cuMemcpyHtoDAsync(address, source, array.nbytes, stream))

    def download(self, device: int, array: np.ndarray, address: int) -> None:
        self._on(device)
        stream = self._handle(device)
        _checked(cuda.cuMemcpyDtoHAsync(array.ctypes.data, address, array.nbytes, stream))
        _checked(cuda.cuStreamSynchronize(stream))

    def copy(self, device: int, address: int, source: int, nbytes: int) -> None:
        self._on(device)
        _checked(cuda.cuMemcpyAsync(address, source, nbytes, self._handle(device)))

    def zero(self, device: int, address: int, nbytes: int) -> None:
        self._on(device)
        _checked(cuda.cuMemsetD8Async(address, 0, nbytes, self._handle(device)))

    def translate(self, text: str, cc: tuple[int, int], most_registers: int | None) -> bytes:
        return compile.cubin(text, cc, most_registers)

    def load(self, device: int, code: bytes, name: str) -> Any:
        self._on(device)
        return ObjectCode.from_cubin(code).get_kernel(name)

    def launcher(
        self, device: int, kernel: Any, grid: int, block: int, arguments: Sequence[int | float]
    ) -> Callable[[], object]:
        config = self._configs.get((grid, block))
        if config is None:
            config = self._configs[grid, block] = LaunchConfig(grid=grid, block=block)

        def call() -> None:
            self._on(device)
            launch(self.stream(device), config, kernel, *arguments)

        return call

    def capturing(self, device: int) -> bool:
        self._on(device)
        status = _checked(cuda.cuStreamIsCapturing(self._handle(device)))
        return status != cuda.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE

    def wait_for(self, device: int, stream: int) -> None:
        self._on(device)
        self.stream(device).wait(self._stream(stream).record())

    def synchronize(self, device: int) -> None:
        self._on(device)
        self.stream(device).sync()

    def _handle(self, device: int) -> Any:
        return self.stream(device).handle
