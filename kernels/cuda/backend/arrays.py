"""Launches over arrays: dense updates."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from fastopt.kernels.cuda.array import upload
from fastopt.kernels.cuda.backend.matrices import MatrixLaunch
from fastopt.kernels.cuda.backend.placed import PlacedLaunch, place
from fastopt.kernels.cuda.backend.trust import TrustRatios
from fastopt.kernels.cuda.dense import SMALLEST_CHUNK, update_arrays
from fastopt.kernels.cuda.driver import driver
from fastopt.kernels.work import ArrayWork, Spec

CHUNKS = 8  # for each multiprocessor, until chunks are large
LARGEST_CHUNK = 16 * SMALLEST_CHUNK  # elements
MOST_BLOCKS = 2**20  # of a launch, each of which then takes several chunks


class Arrays:
    """The dense updates of a backend (see ``fastopt._core.backend``)."""

    device: int

    def ArraysLaunch(self, spec: Spec, works: Sequence[ArrayWork], classes: int) -> "ArraysLaunch":
        """One launch over any number of arrays."""
        return ArraysLaunch(self.device, spec, works, classes)

    def MatrixLaunch(self, spec: Spec, work: ArrayWork) -> MatrixLaunch:
        """The update of a parameter with state of rows and columns."""
        return MatrixLaunch(self.device, spec, work)


class ArraysLaunch(PlacedLaunch):
    """One launch over any number of arrays."""

    def __init__(self, device: int, spec: Spec, works: Sequence[ArrayWork], classes: int) -> None:
        sizes = [math.prod(work.shape) for work in works]
        state = [[place(array) for pair in work.state for array in pair] for work in works]
        super().__init__(device, spec, works, sizes, state, classes)
        spread = CHUNKS * driver().multiprocessors(device) * SMALLEST_CHUNK
        self._chunk = min(max(-(-sum(sizes) // spread), 1) * SMALLEST_CHUNK, LARGEST_CHUNK)
        bases = np.cumsum([0, *(-(-size // self._chunk) for size in sizes)])
        self._chunks = int(bases[-1])
        self._bases = upload(device, bases)
        rated = spec.rule.trust_ratio is not None
        self._ratios = TrustRatios(self.code, self.table, sizes, self.settings) if rated else None

    def launches(self, zero_grads: bool) -> list[Callable[[], object]]:
        """The calls that update the arrays."""
        table, bases, arrays = self.table.address, self._bases.address, len(self.table)
        calls, numbers = [], self.settings.numbers
        if self._ratios is not None:
            calls, numbers = self._ratios.calls(), self._ratios.numbers
        given = table, bases, arrays, self.settings.keys, numbers, self._chunk, int(zero_grads)
        update = update_arrays(self.code).ready(self.device, min(self._chunks, MOST_BLOCKS), *given)
        return [*calls, update]
