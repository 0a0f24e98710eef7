"""A CUDA device that this process plays: its memory is the host's, and its kernels, compiled to PTX for a
real one, are interpreted, every access checked."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ptx.machine import Module, launch
from ptx.memory import Memory

from fastopt.kernels.cuda.streams import current_stream

ALIGNMENT = 256


class Interpreted:
    """A driver (see ``fastopt.kernels.cuda.driver``) of devices that are interpreted.

    Attributes:
        launches: how many there were. waits: how often the host waited for a device.
        waited_for: the streams that a device was made to wait for.
    """

    code = "ptx"

    def __init__(self, cc: tuple[int, int] = (9, 0), devices: int = 1) -> None:
        self.cc = cc
        self.memory = Memory()
        self.launches = self.waits = 0
        self.waited_for: list[int] = []
        self._devices = devices
        self._owned: dict[int, tuple[int, np.ndarray]] = {}
        self._lent: dict[int, tuple[int, int]] = {}  # address: nbytes, device

    def lend(self, array: np.ndarray, device: int = 0, writeable: bool = True) -> int:
        """Let kernels of a device use an array of the host's; returns its address."""
        address = array.__array_interface__["data"][0]
        if array.nbytes:
            self.memory.add(address, array.nbytes, writeable)
            self._lent[address] = array.nbytes, device
        return address

    def take_back(self, address: int) -> None:
        """End a loan."""
        if self._lent.pop(address, None):
            self.memory.remove(address)

    @property
    def owned(self) -> list[int]:
        """The addresses of memory that was allocated, and not freed."""
        return list(self._owned)

    def version(self) -> str:
        return "interpreted"

    def count(self) -> int:
        return self._devices

    def name(self, device: int) -> str:
        return "interpreted"

    def compute_capability(self, device: int) -> tuple[int, int]:
        return self.cc

    def multiprocessors(self, device: int) -> int:
        return 2

    def device_of(self, address: int) -> int:
        for start, (device, array) in self._owned.items():
            if start <= address < start + array.nbytes:
                return device
        for start, (nbytes, device) in self._lent.items():
            if start <= address < start + nbytes:
                return device
        raise RuntimeError("no memory of a device")

    def current_device(self) -> int:
        return 0

    def allocate(self, device: int, nbytes: int) -> int:
        memory = np.full(nbytes + ALIGNMENT, 0xA5, np.uint8)  # what no kernel should rely on
        first = -memory.__array_interface__["data"][0] % ALIGNMENT
        address = memory.__array_interface__["data"][0] + first
        self._owned[address] = device, memory[first : first + nbytes]
        self.memory.add(address, nbytes)
        return address

    def free(self, device: int, address: int) -> None:
        owner, _ = self._owned.pop(address)
        assert owner == device
        self.memory.remove(address)

    def upload(self, device: int, address: int, array: np.ndarray) -> None:
        ctypes.memmove(address, array.__array_interface__["data"][0], array.nbytes)

    def download(self, device: int, array: np.ndarray, address: int) -> None:
        self.waits += 1
        ctypes.memmove(array.__array_interface__["data"][0], address, array.nbytes)

    def copy(self, device: int, address: int, origin: int, source: int, nbytes: int) -> None:
        ctypes.memmove(address, source, nbytes)

    def zero(self, device: int, address: int, nbytes: int) -> None:
        ctypes.memset(address, 0, nbytes)

    def translate(self, text: str, cc: tuple[int, int], most_registers: int | None) -> str:
        return text

    def load(self, device: int, code: str, name: str) -> Module:
        return _module(code)

    def launcher(
        self, device: int, kernel: Module, grid: int, block: int, arguments: Sequence[int | float]
    ) -> Callable[[], object]:
        assert grid > 0, "a grid of no blocks is an error of the driver"
        return functools.partial(self._launch, kernel, grid, block, tuple(arguments))

    def _launch(self, kernel: Any, grid: int, block: int, arguments: tuple) -> None:
        self.launches += 1
        launch(kernel, self.memory, grid, block, arguments)

    def capturing(self, device: int) -> bool:
        return False

    def wait_for(self, device: int, stream: int) -> None:
        if stream != current_stream(device):
            self.waited_for.append(stream)

    def synchronize(self, device: int) -> None:
        self.waits += 1


@functools.cache
def _module(text: str) -> Module:
    return Module(text)


class Lent:
    """An array of the host's that offers the CUDA array interface, as one on an interpreted device."""

    def __init__(self, driver: Interpreted, array: np.ndarray, device: int = 0) -> None:
        self.host = array
        self.shape, self.dtype = array.shape, array.dtype
        self._driver = driver
        self._address = driver.lend(array, device)

    def __del__(self) -> None:
        self._driver.take_back(self._address)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        array = self.host
        typestr = "<V2" if array.dtype.kind == "V" else array.dtype.str
        strides = None if array.flags.c_contiguous else array.strides
        data = array.__array_interface__["data"][0], not array.flags.writeable
        return {"shape": array.shape, "typestr": typestr, "data": data, "strides": strides, "version": 3}
