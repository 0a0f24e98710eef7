"""What a CUDA driver does for the backend: memory, copies, streams and launches, of every device.

There is one :class:`Driver`, found by :func:`driver`: that of the machine. Tests put one in its place that
interprets kernels in the memory of the host.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from fastopt.kernels.cuda.errors import EXTRA, NoDriverError


class Driver(Protocol):
    """Devices are numbered from 0, addresses are int. Work goes to the device's current stream (see
    streams.py), looked up for each piece of work; nothing waits but what says so.

    code: what kind of code :meth:`translate` makes.
    """

    code: str

    def version(self) -> str:
        """That of CUDA which the driver is for."""

    def count(self) -> int:
        """How many devices there are."""

    def name(self, device: int) -> str:
        """What the device is called."""

    def compute_capability(self, device: int) -> tuple[int, int]:
        """Major and minor number."""

    def multiprocessors(self, device: int) -> int:
        """How many the device has."""

    def device_of(self, address: int) -> int:
        """The device that memory lies on."""

    def current_device(self) -> int:
        """The one that other libraries work on now in this thread."""

    def allocate(self, device: int, nbytes: int) -> int:
        """The address of new memory, aligned to 256 bytes."""

    def free(self, device: int, address: int) -> None:
        """Give memory back, once the work that was asked for so far is done, on whatever streams."""

    def upload(self, device: int, address: int, array: np.ndarray) -> None:
        """Copy a C-contiguous array of the host, which may be changed from then on."""

    def download(self, device: int, array: np.ndarray, address: int) -> None:
        """Fill a C-contiguous array of the host; waits for it."""

    def copy(self, device: int, address: int, origin: int, source: int, nbytes: int) -> None:
        """Copy memory of the device ``origin``, on whose current stream it was written, to ``device``; the
        two do not overlap."""

    def zero(self, device: int, address: int, nbytes: int) -> None:
        """Set bytes to 0."""

    def load(self, device: int, code: Any, name: str) -> Any:
        """The kernel ``name`` of machine code (see :func:`Driver.translate`), loaded."""

    def translate(self, text: str, cc: tuple[int, int], most_registers: int | None) -> Any:
        """What :meth:`load` takes, of a kernel's PTX."""

    def launcher(
        self, device: int, kernel: Any, grid: int, block: int, arguments: Sequence[int | float]
    ) -> Callable[[], object]:
        """The call that launches a kernel."""

    def capturing(self, device: int) -> bool:
        """Whether work is being put into a graph in place of being done."""

    def wait_for(self, device: int, stream: int) -> None:
        """Have later work of a device wait for what was put on a stream so far, given by its handle; nothing
        if that is the current one."""

    def synchronize(self, device: int) -> None:
        """Wait for all work that was asked for."""


_current: list[Driver] = []


def driver() -> Driver:
    """The driver of this machine.

    Raises:
        NoDriverError: there is none, or a package is missing; it says how to get it.
    """
    if not _current:
        _current.append(_of_machine())
    return _current[0]


def use(other: Driver) -> Driver | None:
    """Put another driver in the place of the machine's; returns the one there was."""
    before = _current.pop() if _current else None
    _current.append(other)
    return before


def _of_machine() -> Driver:
    try:
        from fastopt.kernels.cuda.machine import Machine
    except ImportError as error:
        raise NoDriverError(f"CUDA arrays need a package that is missing ({error}): {EXTRA}") from error
    return Machine()
