"""Arrays of a device, made and moved, and calls made."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from fastopt.kernels.at_once import at_once
from fastopt.kernels.cuda import array as arrays
from fastopt.kernels.cuda.array import DeviceArray
from fastopt.kernels.cuda.driver import driver


class Basics:
    """What needs no kernel of its own.

    Attributes:
        device: the number of the device. host: the backend of the host's memory.
    """

    def __init__(self, device: int, host: Any) -> None:
        self.device = device
        self.host = host

    @property
    def capturing(self) -> bool:
        """Whether work is being put into a graph, to be replayed, in place of being done."""
        return driver().capturing(self.device)

    def run(self, calls: Iterable[Callable[[], object]]) -> None:
        """Make these calls in turn, with no signal handler run between them (see at_once.py)."""
        at_once(calls)

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> DeviceArray:
        """An array of any content."""
        return arrays.empty(self.device, shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """Zeros."""
        return arrays.zeros(self.device, shape, dtype)

    def zeros_beside(self, array: DeviceArray, dtypes: Sequence[np.dtype]) -> list[DeviceArray]:
        """Zeros of the shape of ``array``, one array of each dtype."""
        return [self.zeros(array.shape, dtype) for dtype in dtypes]

    def address(self, array: DeviceArray) -> int:
        """The address of the first element."""
        return array.address

    def from_host(self, array: np.ndarray) -> DeviceArray:
        """A copy of an array of the host's."""
        return arrays.upload(self.device, array)

    def to_host(self, array: DeviceArray) -> np.ndarray:
        """A C-contiguous copy in the memory of the host; waits for it."""
        return array.copy_to_host()
