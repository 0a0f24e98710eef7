"""Launches over arrays: dense updates."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastopt.kernels.cuda.array import upload
from fastopt.kernels.cuda.backend.trust import TrustRatios
from fastopt.kernels.cuda.dense import SMALLEST_CHUNK, update_arrays
from fastopt.kernels.cuda.driver import driver
from fastopt.kernels.cuda.elements import code_of
from fastopt.kernels.cuda.layout import ARRAY_ALIGNED, ARRAY_SHARED, with_own_columns
from fastopt.kernels.cuda.settings import Settings
from fastopt.kernels.cuda.vectors import Vectors
from fastopt.kernels.layout import ARRAY_GRADIENT, ARRAY_PARAMETER, array_table
from fastopt.kernels.work import ArrayWork, Spec

Calls = Sequence[Callable[[], object]]

CHUNKS = 8  # for each multiprocessor, until chunks are large
LARGEST_CHUNK = 16 * SMALLEST_CHUNK  # elements
MOST_BLOCKS = 2**20  # of a launch, each of which then takes several chunks


class Arrays:
    """The dense updates of a backend (see ``fastopt._core.backend``)."""

    device: int

    def ArraysLaunch(self, spec: Spec, works: Sequence[ArrayWork], classes: int) -> "ArraysLaunch":
        """One launch over any number of arrays."""
        return ArraysLaunch(self.device, spec, works, classes)


class ArraysLaunch:
    """One launch over any number of arrays.

    Attributes:
        numbers: float64 [class, fields of h and of c], the hyperparameters that the next run uses; written
            by the caller.
    """

    def __init__(self, device: int, spec: Spec, works: Sequence[ArrayWork], classes: int) -> None:
        self._device = device
        self._code = code_of(spec)
        self._settings = Settings(device, self._code, classes)
        self.numbers = self._settings.host
        rated = spec.rule.trust_ratio is not None
        sizes = [math.prod(work.shape) for work in works]
        state = [[_place(array) for pair in work.state for array in pair] for work in works]
        uses = [(work.numbers, work.position) for work in works]
        table = array_table(uses, [_place(work.master) for work in works], state)
        self._table = with_own_columns(table, sizes)
        self._own_table = upload(device, self._table)
        self._moved = False  # whether the device's table is another
        spread = CHUNKS * driver().multiprocessors(device) * SMALLEST_CHUNK
        self._chunk = min(max(-(-sum(sizes) // spread), 1) * SMALLEST_CHUNK, LARGEST_CHUNK)
        bases = np.cumsum([0, *(-(-size // self._chunk) for size in sizes)])
        self._chunks = int(bases[-1])
        self._bases = upload(device, bases)
        self._ratios = TrustRatios(self._code, self._own_table, sizes, self._settings) if rated else None
        self._alive = works

    def place(self, parameters: np.ndarray, gradients: np.ndarray) -> None:
        """Take over the addresses of the parameters and of their gradients."""
        places = self._table[:, ARRAY_SHARED + ARRAY_PARAMETER : ARRAY_SHARED + ARRAY_GRADIENT + 1 : 2]
        given = np.stack([parameters, gradients], axis=1)
        if np.array_equal(places, given):
            return
        places[...] = given
        widths = Vectors(self._code.members, self._code.compute).aligned()
        aligned = self._table[:, [*widths]] % [*widths.values()] == 0
        self._table[:, ARRAY_ALIGNED] = aligned.all(axis=1)
        self._moved = True

    def set_keys(self, keys: list[int]) -> None:
        """Set the keys of the random bits, one for each class."""
        self._settings.set_keys(keys)

    def refresh(self) -> Calls:
        """The calls that bring the numbers, the keys and the places to the device, where a step that was
        captured in a graph finds them."""
        return (self._upload,) if self._chunks else ()

    def prepare(self, zero_grads: bool, factor: Any = None) -> Calls:
        """The calls that update the arrays, their machine code ready.

        zero_grads: whether they set gradients to zero. factor: an array of the device, whose float64 number
        the scale of gradients is multiplied by.
        """
        if not self._chunks:
            return ()
        launches = [] if factor is None else [self._settings.scaled(factor)]
        launches += self._launches(zero_grads)
        if not driver().capturing(self._device):
            return (*self.refresh(), *launches)
        if self._moved:
            raise ValueError(
                "a step that is captured in a CUDA graph has other parameters or gradients than the step "
                "before it: make a step with these, in the same memory, before the capture"
            )
        return launches

    def _launches(self, zero_grads: bool) -> Calls:
        table, bases, arrays = self._own_table.address, self._bases.address, len(self._table)
        calls, numbers = [], self._settings.numbers
        if self._ratios is not None:
            calls, numbers = self._ratios.calls(), self._ratios.numbers
        given = table, bases, arrays, self._settings.keys, numbers, self._chunk, int(zero_grads)
        update = update_arrays(self._code).ready(self._device, min(self._chunks, MOST_BLOCKS), *given)
        return [*calls, update]

    def _upload(self) -> None:
        if self._moved:
            driver().upload(self._device, self._own_table.address, self._table)
            self._moved = False
        self._settings.upload()


def _place(array: Any) -> int:
    return 0 if array is None else array.address
