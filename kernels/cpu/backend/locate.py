"""Where the parameters and gradients of a step lie, and which of them have to be looked at closely."""

from collections.abc import Sequence

import numpy as np

from fastopt.kernels.cpu.backend.tensors import Others
from fastopt.kernels.cpu.headers import Headers

_UNCHANGED = (False, False), (False, False)  # neither parameters nor gradients moved, or are unknown


class Locator:
    """Finds the addresses of parameters and gradients in bulk: of NumPy arrays by a scan of their headers,
    of torch tensors by a scan of what torch says.

    Recognised are C-contiguous, aligned arrays of the dtypes and shapes expected, and only writeable ones
    where they are written.

    Args:
        dtypes, shapes: those of the parameters. Gradients are expected to have the same until
            :meth:`expect` is called.
        devices: on which each parameter lies with its gradient, a number, -1 for the CPU.
    """

    def __init__(
        self, dtypes: Sequence[np.dtype], shapes: Sequence[tuple[int, ...]], devices: Sequence[int]
    ) -> None:
        self._headers = Headers(dtypes, shapes)
        self._shapes = shapes
        self._devices = devices
        self._writeable = False
        self._others = Others(dtypes, shapes, devices, fixed=True), Others(dtypes, shapes, devices)
        self._whole = False  # whether the last read was finished
        self._elsewhere = any(device >= 0 for device in devices)
        if self._elsewhere:
            self.expect(dtypes)

    def expect(self, dtypes: Sequence[np.dtype | None]) -> None:
        """Expect dense gradients of these dtypes, and none for None."""
        self._others = self._others[0], Others(dtypes, self._shapes, self._devices)
        if self._elsewhere:  # an array of NumPy is no gradient of a parameter on another device
            dtypes = [
                dtype if device < 0 else None for dtype, device in zip(dtypes, self._devices, strict=True)
            ]
        self._headers.expect(dtypes)

    def unchanged(self, parameters: list | tuple, gradients: list | tuple, writeable: bool) -> bool:
        """Read all addresses; returns whether all arrays are recognised, and lie where they lay at the last
        read. ``writeable``: whether the gradients are going to be written."""
        if writeable != self._writeable:
            self._headers.expect_writeable(writeable)
            self._writeable = writeable
        whole, self._whole = self._whole, False  # an interrupt may come between the two reads
        found = self._headers.read(parameters, gradients)
        if found == _UNCHANGED and whole:
            self._whole = True
            return True
        same = whole
        for which, values in enumerate((parameters, gradients)):
            moved, unknown = found[which][0] or not whole, found[which][1]
            others = self._others[which]
            same = others.read(values, self._headers.addresses[which], moved, unknown) and not moved and same
        self._whole = True
        return same

    def parameters(self) -> tuple[np.ndarray, list[int]]:
        """The addresses last read of parameters, and the positions of those that neither scan recognised:
        each needs a full check."""
        return self._addresses(0)

    def gradients(self) -> tuple[np.ndarray, list[int]]:
        """The same of gradients."""
        return self._addresses(1)

    def _addresses(self, which: int) -> tuple[np.ndarray, list[int]]:
        addresses, others = self._headers.addresses[which].copy(), self._others[which]
        addresses[others.found] = others.pointers
        return addresses, others.unknown
