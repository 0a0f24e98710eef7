"""What comes before a dense update by a rule with a trust ratio."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastopt.kernels.cuda.array import empty, upload
from fastopt.kernels.cuda.elements import Code
from fastopt.kernels.cuda.settings import Settings
from fastopt.kernels.cuda.trust import SUMMED, find_trust_ratios, sum_directions

MOST_BLOCKS = 2**20  # of a launch, each of which then takes several blocks of elements


class TrustRatios:
    """The trust ratios of arrays, in memory of the device.

    Args:
        table: on the device, rows of layout.py. sizes: elements of each array.

    Attributes:
        numbers: the address of each array's own row of hyperparameters, the ratio in the learning rate.
    """

    def __init__(self, code: Code, table: Any, sizes: Sequence[int], settings: Settings) -> None:
        self._code, self._table, self._settings = code, table, settings
        device, arrays = table.device, len(sizes)
        self._device = device
        bases = np.cumsum([0, *(-(-size // SUMMED) for size in sizes)])
        self._blocks = int(bases[-1])
        self._bases = upload(device, bases)
        self._sums = empty(device, (self._blocks, 2), np.float64)
        self._units = empty(device, (arrays, 2), np.float64)
        self._own = empty(device, (arrays, code.width), code.compute)
        self.numbers = self._own.address

    def calls(self) -> list[Callable[[], object]]:
        """The calls that find them."""
        table, bases, arrays = self._table.address, self._bases.address, len(self._units)
        sums, units, settings = self._sums.address, self._units.address, self._settings
        adding, finding = sum_directions(self._code), find_trust_ratios(self._code)
        blocks, own = min(self._blocks, MOST_BLOCKS), min(arrays, MOST_BLOCKS)
        calls = []
        for again in (0, 1) if self._code.compute == np.float64 else (0,):  # squares of float32 are in range
            of_blocks = table, bases, arrays, settings.numbers, units, again, sums
            calls.append(adding.ready(self._device, blocks, *of_blocks))
            exact = settings.exact, settings.numbers
            of_arrays = table, bases, arrays, *exact, sums, units, again, self.numbers
            calls.append(finding.ready(self._device, own, *of_arrays))
        return calls
