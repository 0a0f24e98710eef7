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

MOST_WAITING = 1 << 28  # bytes of memory that wait for their next use


def _checked(result: tuple) -> Any:
    """What a call of the driver returned beside its error."""
    error, *values = result
    if error != cuda.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver failed: {error.name}")
    return values[0] if values else None


def _rounded(nbytes: int) -> int:
    """The size of a buffer for so many bytes: few different ones, so that those that wait fit later needs."""
    eighth = 1 << max(nbytes.bit_length() - 4, 8)
    return -(-nbytes // eighth) * eighth


class _Pool:
    """Buffers of a device that wait for their next use: getting one from the driver takes as long as a
    launch.

    What was put on a stream is done in order, so that a buffer can be used again at once by work on the
    stream that it was used on.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a collection of garbage may come while it is held
        self._lent: dict[int, tuple[Any, int, int]] = {}
        self._waiting: dict[tuple[int, int], list[Any]] = {}
        self._waiting_bytes = 0

    def taken(self, capacity: int, stream: int) -> Any:
        """A buffer that waited, None if there is none."""
        with self._lock:
            waiting = self._waiting.get((capacity, stream))
            if not waiting:
                return None
            self._waiting_bytes -= capacity
            return waiting.pop()

    def lend(self, buffer: Any, capacity: int, stream: int) -> int:
        """Remember a buffer that is in use; returns its address."""
        address = int(buffer.handle)
        with self._lock:
            self._lent[address] = buffer, capacity, stream
        return address

    def take_back(self, address: int) -> list[tuple[Any, int]]:
        """Let a buffer wait; returns those that are to be closed, each with its stream."""
        with self._lock:
            buffer, capacity, stream = self._lent.pop(address)
            if capacity > MOST_WAITING:
                return [(buffer, stream)]
            closed: list[tuple[Any, int]] = []
            if self._waiting_bytes + capacity > MOST_WAITING:  # sizes that are no longer needed, too
                closed = [(own, key[1]) for key, many in self._waiting.items() for own in many]
                self._waiting.clear()
                self._waiting_bytes = 0
            self._waiting.setdefault((capacity, stream), []).append(buffer)
            self._waiting_bytes += capacity
            return closed


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
        self._memory = [_Pool() for _ in self._devices]

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
        capacity, stream, pool = _rounded(nbytes), self.stream(device), self._memory[device]
        buffer = pool.taken(capacity, int(stream.handle))
        if buffer is None:
            buffer = self._devices[device].memory_resource.allocate(capacity, stream=stream)
        return pool.lend(buffer, capacity, int(stream.handle))

    def free(self, device: int, address: int) -> None:
        self._on(device)
        for buffer, handle in self._memory[device].take_back(address):
            buffer.close(self._stream(handle))

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

    def load(self, device: int, code: Any, name: str) -> Any:
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
