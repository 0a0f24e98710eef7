"""The update of a parameter whose state is of rows and columns (Adafactor)."""

import math
from collections.abc import Callable

import numpy as np

from fastopt.kernels.cuda.array import empty
from fastopt.kernels.cuda.backend.placed import PlacedLaunch, place
from fastopt.kernels.cuda.factored import (
    STRIPE,
    add_tiles,
    add_updates,
    average_moments,
    find_factor,
    find_means,
    take_step,
)
from fastopt.kernels.cuda.launch import Kernel
from fastopt.kernels.cuda.memory import WARP
from fastopt.kernels.cuda.sums import WARPS
from fastopt.kernels.work import ArrayWork, Spec

MOST_BLOCKS = 2**20  # of a launch, each of which then takes several tiles
TILES = 8_192  # as many as keep a device busy: in larger arrays tiles have more rows
LOWEST, HIGHEST = 4, 128  # rows of a tile
MANY_PARTS = 64  # of which several lanes add up a moment's, each some of them


class MatrixLaunch(PlacedLaunch):
    """The update of an array, a stack of matrices, by factored second moments.

    How sums are cut depends on the array's shape alone. Tiles and groups of moments are fewer than 2**32: so
    many take more memory than a device has.
    """

    def __init__(self, device: int, spec: Spec, work: ArrayWork) -> None:
        matrices, rows, columns = math.prod(work.shape[:-2]), work.shape[-2], work.shape[-1]
        size = matrices * rows * columns
        super().__init__(device, spec, [work], [size], [[]], 1, row=columns)
        self._shape, self._size = (matrices, rows, columns), size
        self._var = [place(array) for array, _ in work.state]
        self._height = min(max(-(-size // (STRIPE * TILES)), LOWEST), HIGHEST)
        self._bands, self._stripes = -(-rows // self._height), -(-columns // STRIPE)
        self._tiles = matrices * self._bands * self._stripes
        self._bits = [_bits(rows, self._stripes), _bits(columns, self._bands)]
        self._groups = -(-rows // 2 ** self._bits[0])  # of rows of a matrix
        groups = -(-self._tiles // WARPS)
        sizes = matrices * self._stripes * rows, matrices * self._bands * columns
        self._row_sums, self._col_sums = (empty(device, n, np.float64) for n in sizes)
        self._row_totals = empty(device, matrices * self._groups, np.float64)
        self._means = empty(device, matrices, spec.compute)
        self._sums = empty(device, (2, groups), np.float64)
        self._units = empty(device, 2, np.float64)
        self._rate = empty(device, 1, spec.compute)

    def launches(self, zero_grads: bool) -> list[Callable[[], object]]:
        """The calls that update the array."""
        (matrices, rows, columns), code = self._shape, self.code
        exact, numbers = self.settings.exact, self.settings.numbers
        tiles = self._tiles, rows, columns, self._height, self._bands, self._stripes
        p_sums, u_sums = (own.address for own in (self._sums[0], self._sums[1]))
        sums = self._row_sums.address, self._col_sums.address
        totals, means, units = self._row_totals.address, self._means.address, self._units.address
        rate, groups = self._rate.address, -(-self._tiles // WARPS)
        known = *self._var, means
        calls = [self._ready(add_tiles(code), groups, self.table.address, numbers, *tiles, *sums, p_sums)]
        given = matrices, rows, columns, self._bands, self._stripes, *sums, *self._var
        col_groups = -(-columns // 2 ** self._bits[1])
        of_moments = -(-matrices * (self._groups + col_groups) // WARPS)
        given = *given, *self._bits, self._groups, totals
        calls.append(self._ready(average_moments(code), of_moments, numbers, *given))
        of_means = -(-matrices // WARPS)
        calls.append(self._ready(find_means(code), of_means, matrices, rows, self._groups, totals, means))
        # squares of float32 are in range
        for again in (False, True) if code.compute == np.float64 else (False,):
            given = self.table.address, numbers, *tiles, *known, units, groups, p_sums, u_sums
            calls.append(self._ready(add_updates(code, again), groups, *given))
            given = exact, groups, p_sums, u_sums, self._size, units, int(again), rate
            calls.append(self._ready(find_factor(code), 1, *given))
        given = self.table.address, numbers, *tiles, *known, rate, int(zero_grads)
        calls.append(self._ready(take_step(code), groups, *given))
        return calls

    def _ready(self, kernel: Kernel, blocks: int, *given: int) -> Callable[[], object]:
        return kernel.ready(self.device, min(blocks, MOST_BLOCKS), *given)


def _bits(moments: int, parts: int) -> int:
    """2 to this are the moments that share out a warp."""
    most = WARP if parts <= MANY_PARTS else WARP // 4
    return min((moments - 1).bit_length(), most.bit_length() - 1)
