"""Lookups on a device: rows read, pooled into bags, and multiplied with gradients of bags."""

import math
from collections.abc import Sequence

import numpy as np

from fastopt.kernels.cuda import lookups
from fastopt.kernels.cuda.array import DeviceArray, empty, upload, zeros
from fastopt.kernels.cuda.backend.placed import place
from fastopt.kernels.cuda.lanes import VECTOR_BYTES, lane_bits, vector_length
from fastopt.kernels.cuda.lookups import AHEAD, blocks_of
from fastopt.kernels.formats import BFLOAT16, HALF, PLAIN, Format
from fastopt.kernels.layout import pool_row
from fastopt.kernels.work import PooledLookup

_SMALL = {kind.dtype: kind for kind in (HALF, BFLOAT16)}
_SINGLE = np.dtype(np.float32)


def _read_as(table: DeviceArray) -> tuple[Format, np.dtype]:
    """The format of a table, and the dtype that its rows are read as."""
    small = _SMALL.get(table.dtype)
    return (PLAIN, table.dtype) if small is None else (small, _SINGLE)


def _row_of(lookup: PooledLookup, lane_bits: int) -> list[int]:
    """What kernels are told of a pooled lookup (see layout.py)."""
    _, stride, size = _indices(lookup.indices)
    return [stride, size, lane_bits, *pool_row(lookup, place)]


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
            grid = blocks_of(-(-indices.size // AHEAD), bits)
            lookups.gather(size).ready(self.device, grid, *given)()
        return out

    def pool(self, many: Sequence[PooledLookup]) -> Sequence[tuple[int, int]]:
        """Write the sums, or means, of the bags of lookups. Those of tables of the same dtype, whose rows can
        be read by vectors alike, are one launch."""
        alike: dict[tuple, list[PooledLookup]] = {}
        for lookup in many:
            table, out = lookup.table, lookup.out
            if out.size:
                size, dim = table.itemsize, table.shape[1]
                length = vector_length(size, dim, table.address, out.address, out.strides[0])
                alike.setdefault((*_read_as(table), length), []).append(lookup)
        for what, own in alike.items():
            length = what[-1]
            bits = [lane_bits(lookup.table.shape[1] // length) for lookup in own]
            rows = [_row_of(lookup, own_bits) for lookup, own_bits in zip(own, bits, strict=True)]
            blocks = [blocks_of(len(lookup.out), b, len(own)) for lookup, b in zip(own, bits, strict=True)]
            bases = np.cumsum([0, *blocks])
            memory = upload(self.device, np.concatenate([np.ravel(rows), bases]))
            given = memory.address, len(rows[0]), memory.address + len(rows) * len(rows[0]) * 8, len(rows)
            lookups.pool(*what).ready(self.device, int(bases[-1]), *given)()
        return ()

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
            own.ready(self.device, blocks_of(bags, bits), *given, *how)()
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
            grid = blocks_of(-(-indices.size // AHEAD), bits)
            own = lookups.row_products(kind, like, length)
            own.ready(self.device, grid, *given, *bags, *how)()
        return out
