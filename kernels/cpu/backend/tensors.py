"""Torch tensors among the parameters and gradients of a step, by what torch says of them.

A model has many, and a look at each from Python takes longer than its update: what can be asked of a tensor
in one call of C is asked of all of them at once.
"""

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fastopt.kernels.cpu.headers import UNKNOWN
from fastopt.kernels.loaded import loaded

DTYPES = tuple(map(np.dtype, (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)))


class Others:
    """What is no array of NumPy: contiguous torch tensors of these dtypes, None for none, and shapes on these
    devices, the CPU or CUDA devices by number; and what is neither.

    Args:
        fixed: whether the values are the same objects in each read.

    Attributes:
        found: the positions of such tensors. pointers: their addresses. unknown: the other positions.
    """

    def __init__(
        self,
        dtypes: Sequence[np.dtype | None],
        shapes: Sequence[tuple[int, ...]],
        devices: Sequence[int],
        fixed: bool = False,
    ) -> None:
        self.found: list[int] = []
        self.pointers: list[int] = []
        self.unknown: list[int] = []
        self._fixed = fixed
        self._are_none = False  # whether all of the other positions had None at the last read
        self._positions: list[int] = []
        self._expected = list(zip(dtypes, shapes, devices, strict=True))
        self._facts: _Facts | None = None  # what is expected of the tensors at these positions

    def read(self, values: list | tuple, addresses: np.ndarray, moved: bool, unknown: bool) -> bool:
        """Look at the values whose address is not known, if there are ``unknown`` ones. Returns whether all
        are tensors that lie where they lay, or None where None was; ``moved``: whether there may be others
        than at the last read."""
        if not unknown:
            self.found, self.pointers, self.unknown, self._positions = [], [], [], []
            self._are_none = True
            return True
        if moved or not self._positions:
            self._positions, self._facts = np.flatnonzero(addresses == UNKNOWN).tolist(), None
        before = self.found, self.pointers, self.unknown
        self._look(values)
        were_none, self._are_none = self._are_none, all(values[i] is None for i in self.unknown)
        return were_none and self._are_none and before == (self.found, self.pointers, self.unknown)

    def _look(self, values: list | tuple) -> None:
        """Find which of the values are such tensors."""
        where, torch = self._positions, loaded("torch")
        tensors = values if len(where) == len(values) else [values[i] for i in where]
        if torch is None:
            self.found, self.pointers, self.unknown = [], [], where
            return
        pointers = self._all(torch, tensors)
        if pointers is not None:
            self.found, self.pointers, self.unknown = where, pointers, []
            return
        fits = [_fits(torch, own, *self._expected[i]) for i, own in zip(where, tensors, strict=True)]
        self.found = [i for i, fit in zip(where, fits, strict=True) if fit]
        self.unknown = [i for i, fit in zip(where, fits, strict=True) if not fit]
        self.pointers = [values[i].data_ptr() for i in self.found]

    def _all(self, torch: Any, tensors: Sequence[Any]) -> list[int] | None:
        """The addresses of all, if all are as expected."""
        if not set(map(type, tensors)) <= {torch.Tensor, torch.nn.Parameter}:
            return None
        try:
            pointers = [*map(torch.Tensor.data_ptr, tensors)]
        except RuntimeError:  # one has no elements side by side, as a sparse one
            return None
        if self._facts is None:
            self._facts = _Facts.of(torch, [self._expected[i] for i in self._positions])
        facts, tensor = self._facts, torch.Tensor
        where_they_were = self.found is self._positions and pointers == self.pointers
        fit = (
            [*map(_dtype, tensors)] == facts.dtypes
            and all(map(tensor.is_contiguous, tensors))
            and (0 not in pointers or not any(map(_lacks_memory, tensors)))
        )
        if fit and where_they_were and self._fixed:  # nothing else but their sizes can have changed
            return pointers if [*map(tensor.numel, tensors)] == facts.sizes else None
        fit = fit and not any(map(tensor.is_neg, tensors)) and [*map(_shape, tensors)] == facts.shapes
        if fit and not where_they_were:
            fit = [*map(_is_cpu, tensors)] == facts.on_cpu and (
                facts.numbers is None or [*map(_cuda_device, tensors)] == facts.numbers
            )
        return pointers if fit else None


_dtype, _shape, _is_cpu = map(attrgetter, ("dtype", "shape", "is_cpu"))


class _Facts(NamedTuple):
    """What is expected of tensors, each a list: torch's dtype, the shape, the number of elements, whether it
    is on the CPU; the number of the device, -1 for the CPU, None where all are there."""

    dtypes: list[Any]
    shapes: list[tuple[int, ...]]
    sizes: list[int]
    on_cpu: list[bool]
    numbers: list[int] | None

    @classmethod
    def of(cls, torch: Any, expected: list[tuple]) -> "_Facts":
        on_cpu = [device < 0 for _, _, device in expected]
        return cls(
            [_torch_dtype(torch, dtype) for dtype, _, _ in expected],
            [shape for _, shape, _ in expected],
            [math.prod(shape) for _, shape, _ in expected],
            on_cpu,
            None if all(on_cpu) else [device for _, _, device in expected],
        )


def _lacks_memory(tensor: Any) -> bool:
    """Whether there is none for its elements: it was released, or stands for zeros."""
    return tensor.data_ptr() == 0 and tensor.numel() > 0


def _cuda_device(tensor: Any) -> int:
    """The number of its CUDA device, -1 for none."""
    return tensor.get_device() if tensor.is_cuda else -1


def _torch_dtype(torch: Any, dtype: np.dtype | None) -> Any:
    known = torch.float32, torch.float64, torch.float16, torch.bfloat16
    by_dtype: dict[Any, Any] = dict(zip(DTYPES, known, strict=True))
    return by_dtype.get(dtype)


def _fits(torch: Any, value: Any, dtype: np.dtype | None, shape: tuple[int, ...], device: int) -> bool:
    """Whether a value is a tensor as expected."""
    return (
        (type(value) is torch.Tensor or type(value) is torch.nn.Parameter)
        and (value.is_cpu if device < 0 else _cuda_device(value) == device)
        and value.dtype is _torch_dtype(torch, dtype)
        and value.layout is torch.strided
        and value.shape == shape
        and value.is_contiguous()
        and not value.is_neg()
        and not _lacks_memory(value)
    )
