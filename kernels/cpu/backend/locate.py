"""Where the parameters and gradients of a step lie, and which of them have to be looked at closely."""

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fastopt.kernels.cpu.headers import UNKNOWN, Headers
from fastopt.kernels.loaded import loaded

DTYPES = tuple(map(np.dtype, (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)))


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
        self._tensors: list[_Tensors | None] = [None, None]
        self._dtypes: list[Sequence[np.dtype | None]] = [dtypes, dtypes]
        self._elsewhere = any(device >= 0 for device in devices)
        if self._elsewhere:
            self.expect(dtypes)

    def expect(self, dtypes: Sequence[np.dtype | None]) -> None:
        """Expect dense gradients of these dtypes, and none for None."""
        self._dtypes[1] = dtypes
        self._tensors[1] = None
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
        return self._headers.read(parameters, gradients) == _UNCHANGED

    def parameters(self, values: Sequence[Any]) -> tuple[np.ndarray, list[int]]:
        """The addresses last read of parameters, and the positions of those that neither scan recognised:
        each needs a full check."""
        return self._addresses(0, values)

    def gradients(self, values: Sequence[Any]) -> tuple[np.ndarray, list[int]]:
        """The same of gradients."""
        return self._addresses(1, values)

    def _addresses(self, which: int, values: Sequence[Any]) -> tuple[np.ndarray, list[int]]:
        addresses = self._headers.addresses[which].copy()
        positions = np.flatnonzero(addresses == UNKNOWN).tolist()
        if positions and loaded("torch") is not None:
            tensors = self._tensors[which]
            if tensors is None:
                expected = self._dtypes[which], self._shapes, self._devices
                tensors = self._tensors[which] = _Tensors(*expected)
            positions = tensors.find(values, positions, addresses)
        return addresses, positions


class _Tensors:
    """Finds contiguous torch tensors of these dtypes, None for none, and shapes on these devices, the CPU or
    CUDA devices by number.

    It tells what a full check tells of one, in a tenth of the time: a model has many.
    """

    def __init__(
        self,
        dtypes: Sequence[np.dtype | None],
        shapes: Sequence[tuple[int, ...]],
        devices: Sequence[int],
    ) -> None:
        torch = loaded("torch")
        known = torch.float32, torch.float64, torch.float16, torch.bfloat16
        by_dtype: dict[Any, Any] = dict(zip(DTYPES, known, strict=True))
        self._expected = [
            (by_dtype.get(dtype), shape, device)
            for dtype, shape, device in zip(dtypes, shapes, devices, strict=True)
        ]

    def find(self, values: Sequence[Any], positions: list[int], addresses: np.ndarray) -> list[int]:
        """Set ``addresses[i]`` for each ``values[i]`` that is such a tensor, i being one of ``positions``;
        returns the other positions."""
        torch = loaded("torch")
        tensor, parameter, strided = torch.Tensor, torch.nn.Parameter, torch.strided
        pointers, found, others = [], [], []
        for i in positions:
            value = values[i]
            if type(value) is tensor or type(value) is parameter:
                dtype, shape, device = self._expected[i]
                if (
                    (value.is_cpu if device < 0 else value.is_cuda and value.get_device() == device)
                    and value.dtype is dtype
                    and value.layout is strided
                    and value.shape == shape
                    and value.is_contiguous()
                    and not value.is_neg()
                ):
                    pointers.append(value.data_ptr())
                    found.append(i)
                    continue
            others.append(i)
        addresses[found] = pointers
        return others
