"""Lookups on a device: rows read, pooled into bags, and multiplied with gradients of bags."""

import math

import numpy as np

from fastopt.kernels.cuda import lookups
from fastopt.kernels.cuda.array import DeviceArray, empty, zeros
from fastopt.kernels.cuda.lanes import VECTOR_BYTES, lane_bits, vector_length
from fastopt.kernels.cuda.lookups import AHEAD, THREADS
from fastopt.kernels.formats import BFLOAT16, HALF, PLAIN, Format

MOST_BLOCKS = 2**20  # of a launch, each of which then takes several shares

_SMALL = {kind.dtype: kind for kind in (HALF, BFLOAT16)}
_SINGLE = np.dtype(np.float32)


def _read_as(table: DeviceArray) -> tuple[Format, np.dtype]:
    """The format of a table, and the dtype that its rows are read as."""
    small = _SMALL.get(table.dtype)
    return (PLAIN, table.dtype) if small is None else (small, _SINGLE)


def _grid(shares: int, lane_bits: int) -> int:
    """How many blocks of threads there are for so many shares of so many lanes."""
    return min(-(-(shares << lane_bits) // THREADS), MOST_BLOCKS)


def _indices(indices: DeviceArray) -> tuple[int, int, int]:
    return indices.address, indices.strides[0], indices.itemsize


class Lookups:
    """What a backend reads of tables (see ``fastopt._core.backend``)."""

    device: int

    def gather(self, table: DeviceArray, indices: DeviceArray) -> DeviceArray:
        """[number of indices, dim]: the rows of ``table`` that 1-D indices name."""
        rows, dim = table.shape
        out = empty(self.device, (indices.size, dim), table.dtype)
        if out.size:
            stride = dim * table.itemsize
            size = math.gcd(VECTOR_BYTES, table.address, out.address, stride)  # of the largest words
            bits = lane_bits(stride // size)
            given = table.address, rows, stride // size, *_indices(indices), indices.size, bits, out.address
            grid = _grid(-(-indices.size // AHEAD), bits)
            lookups.gather(size).ready(self.device, grid, *given)()
        return out

    def pool(
        self,
        table: DeviceArray,
        indices: DeviceArray,
        offsets: DeviceArray,
        weights: DeviceArray | None,
        mean: bool,
        padding: int,
    ) -> DeviceArray:
        """[bags, dim]: the rows of each bag, times their weights, summed or averaged, without the row
        ``padding``."""
        bags, (rows, dim) = offsets.size - 1, table.shape
        out = empty(self.device, (bags, dim), table.dtype)
        if out.size:
            length = vector_length(table.itemsize, dim, table.address)
            bits = lane_bits(dim // length)
            given = table.address, rows, dim, *_indices(indices), indices.size, offsets.address, bags
            how = 0 if weights is None else weights.address, int(mean), max(padding, -1), bits, out.address
            own = lookups.pool(*_read_as(table), length)
            own.ready(self.device, _grid(bags, bits), *given, *how)()
        return out

    def pool_max(
        self, table: DeviceArray, indices: DeviceArray, offsets: DeviceArray, padding: int
    ) -> tuple[DeviceArray, DeviceArray]:
        """[bags, dim]: the largest element of each bag's rows, and, int32, the position it comes from."""
        bags, (rows, dim) = offsets.size - 1, table.shape
        out = empty(self.device, (bags, dim), table.dtype)
        winners = empty(self.device, (bags, dim), np.int32)
        if out.size:
            length = vector_length(table.itemsize, dim, table.address)
            bits = lane_bits(dim // length)
            given = table.address, rows, dim, *_indices(indices), indices.size, offsets.address, bags
            how = max(padding, -1), bits, out.address, winners.address
            own = lookups.pool_max(*_read_as(table), length)
            own.ready(self.device, _grid(bags, bits), *given, *how)()
        return out, winners

    def row_products(
        self,
        table: DeviceArray,
        indices: DeviceArray,
        bags_of: DeviceArray,
        scales: DeviceArray | None,
        padding: int,
        grad_output: DeviceArray,
    ) -> DeviceArray:
        """For each position k the product of row ``indices[k]`` with ``grad_output[bags_of[k]]``, times
        ``scales[k]``; 0 for the row ``padding``."""
        rows, dim = table.shape
        kind, like = _read_as(table)
        if not dim:
            return zeros(self.device, indices.size, like)
        out = empty(self.device, indices.size, like)
        if out.size:
            length = vector_length(table.itemsize, dim, table.address, grad_output.address)
            bits = lane_bits(dim // length)
            given = table.address, rows, dim, *_indices(indices), indices.size
            bags = bags_of.address, len(grad_output), 0 if scales is None else scales.address
            how = max(padding, -1), bits, grad_output.address, out.address
            grid = _grid(-(-indices.size // AHEAD), bits)
            own = lookups.row_products(kind, like, length)
            own.ready(self.device, grid, *given, *bags, *how)()
        return out
