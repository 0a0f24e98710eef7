"""Indices, the segments they are sorted into, and offsets of bags, on a device."""

from collections.abc import Sequence

import numpy as np

from fastopt.kernels.cuda import indices as finding
from fastopt.kernels.cuda import sort
from fastopt.kernels.cuda.array import DeviceArray, empty, upload
from fastopt.kernels.cuda.indices import MOST_PARTS, blocks_for
from fastopt.kernels.cuda.segments import DeviceSegments

MOST_BLOCKS = 2**20  # of a launch over tiles, each of which then takes several
ALONE = sort.TILE  # positions, or fewer, that one launch sorts
BITS = 64  # of the words that are sorted
MOST_POSITIONS = 2**31  # int32 counts them


class Indices:
    """What a backend finds of indices, and makes of them (see ``fastopt._core.backend``)."""

    device: int

    def bounds(self, indices: DeviceArray) -> tuple[int, int]:
        """Smallest and largest of 1-D indices, which are not empty; waits for them."""
        blocks = blocks_for(indices.size, MOST_PARTS)
        found = empty(self.device, (blocks, 2), np.int64)
        given = indices.address, indices.strides[0], indices.itemsize, indices.size, found.address
        finding.find_bounds().ready(self.device, blocks, *given)()
        low, high = found.copy_to_host().min(axis=0)
        return int(low), ~int(high)

    def copies(self, parts: Sequence[DeviceArray]) -> list[tuple[DeviceArray, int, int]]:
        """C-contiguous copies of indices of any shapes, none of which is empty, each with its smallest and
        largest; waits for these."""
        own = [part.copy() for part in parts]
        return [(copy, *self.bounds(copy.reshape(-1))) for copy in own]

    def segments_of(self, parts: Sequence[tuple[DeviceArray, int]]) -> list[DeviceSegments]:
        """The segments of the 1-D indices of each table, given with how many rows it has."""
        sizes, rows = [indices.size for indices, _ in parts], [own for _, own in parts]
        first_positions = np.cumsum([0, *sizes])
        first_rows = np.cumsum([0, *(own + 1 for own in rows)])
        size = int(first_positions[-1])
        key_bits = max(int(first_rows[-1]) - 1, 1).bit_length()
        position_bits = max(size - 1, 1).bit_length()
        if key_bits + position_bits > BITS or size >= MOST_POSITIONS:
            raise ValueError(
                f"{size} indices of tables of {sum(rows)} rows are too many at once: "
                "expected them to take 64 bits together, split the batch"
            )
        order = empty(self.device, max(size, 1), np.int32)
        starts = empty(self.device, size + 1, np.int32)
        rows_of = empty(self.device, max(size, 1), np.int64)
        bounds = empty(self.device, len(parts) + 1, np.int64)
        if size:
            table = np.empty((sort.COLUMNS, len(parts)), np.int64)
            table[sort.FIRST_POSITIONS] = first_positions[:-1]
            table[sort.ADDRESSES] = [indices.address for indices, _ in parts]
            table[sort.STRIDES] = [indices.strides[0] for indices, _ in parts]
            table[sort.ITEMSIZES] = [indices.itemsize for indices, _ in parts]
            table[sort.ROWS] = rows
            table[sort.FIRST_ROWS] = first_rows[:-1]
            _sort(upload(self.device, table), size, key_bits, position_bits, order, starts, rows_of, bounds)
        else:
            starts.fill(0)
            bounds.fill(0)
        return [
            DeviceSegments(
                order,
                starts,
                rows_of,
                bounds,
                t,
                int(first_rows[t]),
                int(first_positions[t]),
                sizes[t],
                rows[t],
            )
            for t in range(len(parts))
        ]

    def all_rows(self, rows: int) -> tuple[DeviceArray, DeviceSegments]:
        """The indices that name every row once, in order, which need no sorting, and their segments."""
        if rows >= MOST_POSITIONS:
            raise ValueError(
                f"all {rows} rows of a table are too many at once: expected fewer than {MOST_POSITIONS}, "
                "give the rows that change as fastopt.IndexedSlices"
            )
        indices = empty(self.device, rows, np.int64)
        order, starts = (empty(self.device, n, np.int32) for n in (max(rows, 1), rows + 1))
        bounds = empty(self.device, 2, np.int64)
        given = rows, indices.address, order.address, starts.address, bounds.address
        finding.name_all().ready(self.device, blocks_for(rows + 1), *given)()
        return indices, DeviceSegments(order, starts, indices, bounds, 0, 0, 0, rows, rows)

    def distinct_rows(self, segments: DeviceSegments) -> DeviceArray:
        """The different rows, ascending, as their table counts them; waits for how many there are."""
        first, count = self._named(segments)
        out = empty(self.device, count, np.int64)
        if count:
            given = segments.rows.address + first * 8, segments.first_row, count, out.address
            finding.subtract_number().ready(self.device, blocks_for(count), *given)()
        return out

    def counts(self, segments: DeviceSegments) -> DeviceArray:
        """How many indices there are of each of the different rows; waits for how many those are."""
        first, count = self._named(segments)
        out = empty(self.device, count, np.int32)
        if count:
            given = segments.starts.address + first * 4, count, out.address
            finding.subtract_neighbours().ready(self.device, blocks_for(count), *given)()
        return out

    def bag_offsets(
        self, offsets: DeviceArray, size: int, with_last: bool, check: bool = True
    ) -> tuple[DeviceArray, tuple[int, int, int] | None]:
        """int64 [bags + 1]: a copy of ``offsets``, followed by ``size`` unless they come ``with_last``. If
        they are to be looked at: the first and the last, and the position of the first that is larger than
        the next, or -1; waits for these."""
        count = offsets.size + (not with_last)
        out = empty(self.device, count, np.int64)
        if count:
            given = offsets.address, offsets.strides[0], offsets.itemsize, offsets.size, size, count
            finding.copy_offsets().ready(self.device, blocks_for(count), *given, out.address)()
        return out, self._checked_offsets(out) if check else None

    def regular_offsets(self, bags: int, width: int) -> DeviceArray:
        """int64 [bags + 1]: the offsets of bags of ``width`` indices each."""
        out = empty(self.device, bags + 1, np.int64)
        given = width, out.size, out.address
        finding.make_multiples().ready(self.device, blocks_for(out.size), *given)()
        return out

    def _checked_offsets(self, offsets: DeviceArray) -> tuple[int, int, int]:
        """What is found of offsets, which are not empty."""
        blocks = blocks_for(offsets.size, MOST_PARTS)
        found = empty(self.device, 2 + blocks, np.int64)
        given = offsets.address, offsets.size, found.address
        finding.check_offsets().ready(self.device, blocks, *given)()
        first, last, *falls = found.copy_to_host().tolist()
        falls_at = min(falls)
        return first, last, -1 if falls_at == finding.LARGEST else falls_at

    def _named(self, segments: DeviceSegments) -> tuple[int, int]:
        """The first segment of a table, and how many have a row of it."""
        found = empty(self.device, 2, np.int64)
        past = segments.first_row + segments.table_rows
        given = segments.bounds.address, segments.table, segments.rows.address, past, found.address
        finding.find_named().ready(self.device, 1, *given)()
        first, last = found.copy_to_host().tolist()
        return first, last - first


def _sort(
    tables: DeviceArray,
    size: int,
    key_bits: int,
    position_bits: int,
    order: DeviceArray,
    starts: DeviceArray,
    rows: DeviceArray,
    bounds: DeviceArray,
) -> None:
    """Sort positions, and find segments and those of each table. What is needed meanwhile is given back at
    once: memory is used again by later work alone."""
    device, count = tables.device, tables.shape[1]
    memory = empty(device, (2, size), np.uint64)
    words, others = memory[0].address, memory[1].address
    given = tables.address, count, size, position_bits
    places = order.address, starts.address, rows.address
    if size <= ALONE:
        of_tile = *given, key_bits, words, others, *places, bounds.address
        sort.sort_tile().ready(device, 1, *of_tile)()
        return
    tiles = -(-size // sort.TILE)
    grid = min(tiles, MOST_BLOCKS)
    counted = empty(device, sort.DIGITS * (tiles + 1), np.int32)
    counts, totals = counted.address, counted.address + sort.DIGITS * tiles * 4
    sort.make_words().ready(device, grid, *given, words, tiles, counts)()
    for shift in range(position_bits, position_bits + key_bits, sort.DIGIT_BITS):
        if shift > position_bits:
            sort.count_digits().ready(device, grid, words, size, shift, tiles, counts)()
        sort.add_up().ready(device, sort.DIGITS, counts, sort.DIGITS, tiles, totals)()
        sort.move_words().ready(device, grid, words, size, shift, tiles, counts, totals, others)()
        words, others = others, words
    sort.count_heads().ready(device, grid, words, size, position_bits, tiles, counts)()
    sort.add_up().ready(device, 1, counts, 1, tiles, totals)()
    sort.write_heads().ready(device, grid, words, size, position_bits, tiles, counts, *places)()
    of_tables = tables.address, count, size, totals, starts.address, bounds.address
    sort.find_tables().ready(device, blocks_for(count + 1), *of_tables)()
