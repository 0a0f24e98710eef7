"""Positions of indices on a device: their bags, values in their order, and the rows that they name."""

import numpy as np

from fastopt.kernels.cuda import bags
from fastopt.kernels.cuda.array import DeviceArray, empty, zeros
from fastopt.kernels.cuda.coalesce import coalesce
from fastopt.kernels.cuda.indices import blocks_for
from fastopt.kernels.cuda.lanes import lane_bits, vector_length
from fastopt.kernels.cuda.limits import WARPS, limit_norms
from fastopt.kernels.cuda.lookups import blocks_of
from fastopt.kernels.cuda.memory import WARP
from fastopt.kernels.cuda.segments import DeviceSegments

MOST_BLOCKS = 2048  # of a launch over rows, each of which then takes several groups of them


class Positions:
    """What a backend makes of positions and of their segments (see ``fastopt._core.backend``)."""

    device: int

    def bags_of_positions(
        self,
        offsets: DeviceArray,
        indices: DeviceArray,
        scales: DeviceArray | None,
        mean: bool,
        padding: int,
    ) -> DeviceArray:
        """int32: the bag of each position; a position before the first bag or after the last, which offsets
        that were not checked may leave, belongs to that one. For ``mean``, ``scales`` are divided by the
        number of rows of the bag, the row ``padding`` not counted."""
        size, count = indices.size, offsets.size - 1
        found = empty(self.device, size, np.int32)
        if not size:
            return found
        if not count:
            raise ValueError(f"offsets have no bags for {size} indices: give one offset for each bag")
        blocks, own = blocks_for(size), (found.address, size)
        bags.find_bags().ready(self.device, blocks, offsets.address, count, size, found.address)()
        if mean and scales is not None:
            counts = None
            if padding >= 0:
                counts = zeros(self.device, count, np.int64)
                given = found.address, indices.address, indices.strides[0], indices.itemsize, size
                bags.count_padding().ready(self.device, blocks, *given, padding, counts.address)()
            counted = 0 if counts is None else counts.address
            divide = bags.divide_scales(scales.dtype)
            divide.ready(self.device, blocks, offsets.address, *own, counted, scales.address)()
        return found

    def take(self, values: DeviceArray, segments: DeviceSegments) -> DeviceArray:
        """The 1-D ``values``, one for each position of the table, in the order of its segments."""
        size, first = segments.positions, segments.first_position
        out = empty(self.device, size, values.dtype)
        if size:
            order = segments.order[first : first + size].address
            given = values.address, order, first, size, out.address
            bags.take(values.itemsize).ready(self.device, blocks_for(size), *given)()
        return out

    def shift(self, numbers: DeviceArray, by: int) -> None:
        """Add a whole number to each of the 1-D int32 ``numbers``, in place."""
        if numbers.size:
            given = numbers.address, numbers.size, by
            bags.shift().ready(self.device, blocks_for(numbers.size), *given)()

    def without(
        self, indices: DeviceArray, row: int, *values: DeviceArray | None
    ) -> tuple[DeviceArray | None, ...]:
        """1-D ``indices``, of which those that named ``row`` name no row of the table, and ``values`` as they
        are: how many indices there are would have to be waited for."""
        own = indices.copy()
        if own.size:
            made = bags.leave_out(own.itemsize)
            made.ready(self.device, blocks_for(own.size), own.address, own.size, row)()
        return own, *values

    def won_rows(
        self, values: DeviceArray, bags_of: DeviceArray, winners: DeviceArray, out: DeviceArray
    ) -> None:
        """Set row k of ``out`` to those elements of ``values[bags_of[k]]`` whose ``winners`` are k, and to
        zeros elsewhere."""
        if out.size:
            count, dim = out.shape
            bits = lane_bits(dim)
            given = values.address, bags_of.address, winners.address, dim, count, bits, out.address
            bags.won_rows(out.dtype).ready(self.device, blocks_of(count, bits), *given)()

    def limit_norms(self, table: DeviceArray, segments: DeviceSegments, max_norm: float) -> None:
        """Scale those of the rows of segments whose norm is above ``max_norm`` down to it."""
        if not segments.positions or not table.size:
            return
        length = vector_length(table.itemsize, table.shape[1], table.address)
        bits = lane_bits(table.shape[1] // length)
        per_block = WARPS * WARP >> bits
        blocks = min(-(-segments.positions // per_block), MOST_BLOCKS)
        named = segments.rows.address, segments.own_bounds, segments.first_row, segments.table_rows
        given = table.address, table.shape[1], bits, *named, blocks * per_block, float(max_norm)
        limit_norms(table.dtype, length).ready(self.device, blocks, *given)()

    def coalesce(self, values: DeviceArray, segments: DeviceSegments) -> None:
        """Put the sum of a segment's values in the place of its first, and zeros in those of the others."""
        if not segments.positions or not values.size:
            return
        length = vector_length(values.itemsize, values.shape[1], values.address)
        bits = lane_bits(values.shape[1] // length)
        per_block = WARPS * WARP >> bits
        blocks = min(-(-segments.positions // per_block), MOST_BLOCKS)
        named = segments.order.address, segments.starts.address, segments.own_bounds, segments.first_position
        given = values.address, values.shape[1], bits, *named
        coalesce(values.dtype, length).ready(self.device, blocks, *given)()
