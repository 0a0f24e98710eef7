"""The calls of CUDA that ``fastopt.kernels.cuda.machine`` makes, for devices and streams that are not there.

Nothing is computed: what is checked is that each call is made for the right device, and that work on memory
is in order over all streams (by vector clocks: an event knows how far its stream had come, on its own and by
what it had waited for).
"""

import itertools
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from fastopt.kernels.cuda import machine
from fastopt.kernels.cuda.streams import Current

LEGACY = 1  # the handle of the default stream, of the current device
SUCCESS = SimpleNamespace(name="CUDA_SUCCESS")
INVALID = SimpleNamespace(name="CUDA_ERROR_INVALID_VALUE")
IMPLICIT = SimpleNamespace(name="CUDA_ERROR_STREAM_CAPTURE_IMPLICIT")
NOT_CAPTURING, CAPTURING = 0, 1


class FakeCuda:
    """The driver, its devices and what is known of them.

    Attributes:
        now: by device, the handle of the stream that other libraries work on.
        launches: device and stream of each launch.
        closed: the addresses of memory that went back to the driver.
        capturing: the handles of streams that capture.
        alive: the handles of streams that were made, and not destroyed.
        owners: the device of memory, by address. pinned: addresses of the host that the driver knows.
        synchronized: the handles of streams that the host waited for.
        implicit: whether another stream captures, and the default one may not be asked.
    """

    def __init__(self, devices: int = 2) -> None:
        self.count = devices
        self.now = dict.fromkeys(range(devices), LEGACY)
        self.launches: list[tuple[int, int]] = []
        self.closed: list[int] = []
        self.capturing: set[int] = set()
        self.alive: set[int] = {LEGACY}
        self.owners: dict[int, int] = {}
        self.pinned: set[int] = set()
        self.synchronized: list[int] = []
        self.implicit = False
        self._local = threading.local()
        self._clocks: dict[tuple[int, int], dict[tuple[int, int], int]] = {}
        self._uses: dict[int, list[tuple[tuple[int, int], int]]] = {}
        self._numbers = itertools.count(2)
        self._addresses = itertools.count(1 << 20, 1 << 30)

    # Contexts: that of device d is d + 1, 0 is none.

    @property
    def contexts(self) -> list[int]:
        """Those of this thread, the current one last."""
        if not hasattr(self._local, "stack"):
            self._local.stack = [0]
        return self._local.stack

    @property
    def device(self) -> int:
        """The current one."""
        assert self.contexts[-1], "a call without a context"
        return self.contexts[-1] - 1

    def cuCtxGetCurrent(self) -> tuple:
        return SUCCESS, self.contexts[-1]

    def cuCtxSetCurrent(self, context: int) -> tuple:
        self.contexts[-1] = context
        return (SUCCESS,)

    def cuCtxPushCurrent(self, context: int) -> tuple:
        self.contexts.append(context)
        return (SUCCESS,)

    def cuCtxPopCurrent(self) -> tuple:
        return SUCCESS, self.contexts.pop()

    def cuCtxGetDevice(self) -> tuple:
        return SUCCESS, self.device

    # Work

    def clock(self, stream: int) -> dict[tuple[int, int], int]:
        """How far the work that a stream's next waits for has come, by stream."""
        assert stream in self.alive, "a stream that was destroyed"
        return self._clocks.setdefault(self.key(stream), {})

    def key(self, stream: int) -> tuple[int, int]:
        """Which stream a handle is now: that of the default one is of the current device."""
        if stream != LEGACY:
            assert stream // 1000 == self.device + 1, "a stream of another device than the current one"
        return self.device, stream

    def use(self, stream: int, address: int) -> None:
        """Work of a stream on memory, which everything before is to be done for."""
        key, clock = self.key(stream), self.clock(stream)
        for other, tick in self._uses.get(address, []):
            assert clock.get(other, 0) >= tick, f"{key} uses memory that {other} may still be using"
        clock[key] = clock.get(key, 0) + 1
        self._uses.setdefault(address, []).append((key, clock[key]))

    def cuMemcpyHtoDAsync(self, address: int, source: int, nbytes: int, stream: int) -> tuple:
        self.use(stream, address)
        return (SUCCESS,)

    def cuMemcpyDtoHAsync(self, target: int, address: int, nbytes: int, stream: int) -> tuple:
        self.use(stream, address)
        return (SUCCESS,)

    def cuMemcpyAsync(self, address: int, source: int, nbytes: int, stream: int) -> tuple:
        assert self.owners[address] == self.owners[source] == self.device, "memory that is not to be seen"
        self.use(stream, address)
        self.use(stream, source)
        return (SUCCESS,)

    def cuMemcpyPeerAsync(
        self, address: int, context: int, source: int, origin: int, nbytes: int, stream: int
    ) -> tuple:
        assert (self.owners[address], self.owners[source]) == (context - 1, origin - 1)
        self.use(stream, address)
        self.use(stream, source)
        return (SUCCESS,)

    def cuPointerGetAttribute(self, attribute: str, address: int) -> tuple:
        return (SUCCESS, 1) if address in self.pinned else (INVALID, None)

    def cuMemsetD8Async(self, address: int, value: int, nbytes: int, stream: int) -> tuple:
        self.use(stream, address)
        return (SUCCESS,)

    def cuStreamSynchronize(self, stream: int) -> tuple:
        assert stream in self.alive
        self.synchronized.append(stream)
        return (SUCCESS,)

    def cuStreamIsCapturing(self, stream: int) -> tuple:
        assert stream in self.alive
        if self.implicit and stream == LEGACY:
            return IMPLICIT, None
        return SUCCESS, CAPTURING if stream in self.capturing else NOT_CAPTURING

    def launch(self, stream: "FakeStream", config: Any, kernel: Any, *addresses: int) -> None:
        self.launches.append(self.key(stream.handle))
        for address in addresses:
            self.use(stream.handle, address)

    def order(self, device: int, before: int, after: int) -> None:
        """What a user does who has one stream wait for another."""
        self.contexts.append(device + 1)
        self.clock(after).update(_later(self.clock(after), self.clock(before)))
        self.contexts.pop()

    def made(self, device: int) -> "OwnedStream":
        """A new stream of a device, which is destroyed when nobody has it any more."""
        return OwnedStream(self, device)

    def current(self, device: int) -> Current:
        now = self.now[device]
        if isinstance(now, OwnedStream):
            return Current(now.handle, now)
        return Current(now, None)

    def install(self, patch: pytest.MonkeyPatch) -> machine.Machine:
        """A machine whose driver this is."""
        devices = [FakeDevice(self, device) for device in range(self.count)]
        streams = SimpleNamespace(from_handle=lambda handle: FakeStream(self, handle))
        patch.setattr(machine, "Device", SimpleNamespace(get_all_devices=lambda: devices))
        patch.setattr(machine, "Stream", streams)
        patch.setattr(machine, "LaunchConfig", SimpleNamespace)
        patch.setattr(machine, "launch", self.launch)
        patch.setattr(machine, "cuda", self)
        patch.setattr(machine, "current", self.current)
        return machine.Machine()

    CUresult = SimpleNamespace(CUDA_SUCCESS=SUCCESS, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT=IMPLICIT)
    CUpointer_attribute = SimpleNamespace(CU_POINTER_ATTRIBUTE_MEMORY_TYPE="memory type")
    CUstreamCaptureStatus = SimpleNamespace(CU_STREAM_CAPTURE_STATUS_NONE=NOT_CAPTURING)


class OwnedStream:
    """A stream that lives as long as this object."""

    def __init__(self, cuda: FakeCuda, device: int) -> None:
        self.handle = 1000 * (device + 1) + next(cuda._numbers)
        self._cuda = cuda
        cuda.alive.add(self.handle)

    def __del__(self) -> None:
        self._cuda.alive.discard(self.handle)


class FakeStream:
    """That of a handle."""

    def __init__(self, cuda: FakeCuda, handle: int) -> None:
        self._cuda = cuda
        self.handle = handle

    def record(self) -> dict[tuple[int, int], int]:
        """An event: how far the stream has come."""
        assert self.handle not in self._cuda.capturing, "an event of work that is only captured"
        return dict(self._cuda.clock(self.handle))

    def wait(self, event: Any) -> None:
        assert self.handle not in self._cuda.capturing, "a wait in a graph"
        own = self._cuda.clock(self.handle)
        own.update(_later(own, event.record() if isinstance(event, FakeStream) else event))

    def sync(self) -> None:
        assert self.handle in self._cuda.alive


class FakeDevice:
    """A device, and where its memory comes from."""

    def __init__(self, cuda: FakeCuda, number: int) -> None:
        self._cuda = cuda
        self._number = number
        self.memory_resource = self

    def set_current(self) -> None:
        self._cuda.contexts[-1] = self._number + 1

    def allocate(self, nbytes: int, *, stream: FakeStream) -> "FakeBuffer":
        assert self._cuda.device == self._number
        assert stream.handle not in self._cuda.capturing
        address = next(self._cuda._addresses)
        self._cuda.owners[address] = self._number
        return FakeBuffer(self._cuda, address, nbytes)


class FakeBuffer:
    """Memory."""

    def __init__(self, cuda: FakeCuda, address: int, nbytes: int) -> None:
        self._cuda = cuda
        self.handle = address
        self.nbytes = nbytes

    def close(self, stream: FakeStream) -> None:
        assert stream.handle not in self._cuda.capturing, "memory that each replay gives back"
        self._cuda.use(stream.handle, self.handle)
        self._cuda.closed.append(self.handle)


def _later(one: dict, other: dict) -> dict:
    return {key: max(one.get(key, 0), other.get(key, 0)) for key in one | other}
