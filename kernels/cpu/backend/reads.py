"""Reading and changing rows and arrays: what lookups, clipping and gradients call, array in, array out."""

from collections.abc import Sequence

import numpy as np

from fastopt.kernels.cpu import bags, norms, stored_rows
from fastopt.kernels.cpu import rows as row_kernels
from fastopt.kernels.cpu.backend.addresses import address
from fastopt.kernels.cpu.backend.indices import bounds, distinct_rows
from fastopt.kernels.cpu.backend.parts import equal_parts
from fastopt.kernels.cpu.memory import ALIGNMENT, PAGE, SMALLEST_PLACED, empty, zeros_at
from fastopt.kernels.cpu.widen import widen_bfloat16, widen_half
from fastopt.kernels.formats import Format, formats
from fastopt.kernels.layout import pool_row
from fastopt.kernels.work import PooledLookup, Segments

HALF = np.dtype(np.float16)
WORK_PER_POSITION = 4  # in elements of an update by one thread, of what is read at positions in no order


def zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that begin with a cache line. They come from the system unread: a huge table costs nothing until
    its rows are touched."""
    return zeros_at(shape, dtype, 0, ALIGNMENT)


def zeros_beside(array: np.ndarray, dtypes: Sequence[np.dtype]) -> list[np.ndarray]:
    """Zeros of the shape of ``array``, one array of each dtype, placed for loops over the elements of all of
    them: where ``array`` begins a cache line, so do they. They come from the system unread, too."""
    place, width = address(array), array.itemsize
    before = -place % ALIGNMENT // width  # elements before its first whole line
    found = []
    for dtype in dtypes:
        modulus = PAGE if array.size * dtype.itemsize >= SMALLEST_PLACED else ALIGNMENT
        found.append(zeros_at(array.shape, dtype, place + before * (width - dtype.itemsize), modulus))
    return found


def contiguous(array: np.ndarray) -> np.ndarray:
    """``array`` if it is C-contiguous, or a copy that is."""
    return np.asarray(array, order="C")


def from_host(array: np.ndarray) -> np.ndarray:
    """A copy."""
    return np.array(array, order="C")


def to_host(array: np.ndarray) -> np.ndarray:
    """A C-contiguous copy."""
    return np.array(array, order="C")


def widen(array: np.ndarray) -> np.ndarray:
    """``array``, in float32 if it is of 16 bits."""
    if array.dtype.itemsize != 2:
        return array
    array = contiguous(array)
    out = empty(array.shape, np.float32)
    kernel = widen_half if array.dtype == HALF else widen_bfloat16
    kernel(array.size, array.reshape(-1).view(np.uint16), out.reshape(-1))
    return out


def reblock(
    kind: Format, codes: np.ndarray, scales: np.ndarray, new: np.ndarray, new_scales: np.ndarray
) -> None:
    """Set ``new`` and ``new_scales``, [rows, blocks], to 8-bit codes whose blocks end with the rows, of codes
    whose blocks go on over them; rounded to the nearest."""
    shape = len(new_scales), codes.size // max(len(new_scales), 1)
    given = formats(kind), np.float32(0), codes.reshape(shape), scales, new.reshape(shape), new_scales
    stored_rows.reblock(codes.size, *given)


def gather(table: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """[number of indices, dim]: the rows of ``table`` that the 1-D ``indices`` name."""
    out = empty((indices.size, table.shape[1]), table.dtype)
    if table.dtype.itemsize == 2:  # no dtype that Numba knows
        row_kernels.gather(out.size, table.view(np.uint16), indices, out.view(np.uint16))
    else:
        row_kernels.gather(out.size, table, indices, out)
    return out


def pool(lookups: Sequence[PooledLookup]) -> list[tuple[int, int]]:
    """Write the sums, or means, of the bags of lookups; rows of 16 bits are added in float32. Those of tables
    and indices of the same dtypes are one launch. Returns the smallest and the largest index of each, 0 and
    -1 of none, which may be of rows that there are not: then its result is of any content."""
    found = [(0, -1)] * len(lookups)
    alike: dict[tuple[np.dtype, np.dtype], list[int]] = {}
    for k, lookup in enumerate(lookups):
        if lookup.table.dtype.itemsize == 2:
            found[k] = _pool_small(lookup)
        else:
            alike.setdefault((lookup.table.dtype, lookup.indices.dtype), []).append(k)
    for (dtype, index), own in alike.items():
        many = [lookups[k] for k in own]
        amounts = [  # not 0 where rows are empty: the indices are looked at all the same
            (lookup.indices.size + len(lookup.out)) * max(lookup.table.shape[1], 1) for lookup in many
        ]
        rows, parts = np.array([pool_row(lookup, address) for lookup in many], np.int64), equal_parts(amounts)
        bounds_of = np.empty((len(parts) + len(many), 2), np.int64)
        bags.pool(sum(amounts), dtype.type(0), index.type(0), rows, parts, bounds_of)
        for k, (low, high) in zip(own, bounds_of[len(parts) :].tolist(), strict=True):
            found[k] = low, high
    return found


def _pool_small(lookup: PooledLookup) -> tuple[int, int]:
    """The bags of a table of 16 bits."""
    low, high = bounds(lookup.indices) if lookup.indices.size else (0, -1)
    if low >= 0 and high < len(lookup.table):
        rows, where, none = _rows_read(lookup.table, lookup.indices, lookup.padding)
        out = empty(lookup.out.shape, rows.dtype)
        pool([lookup._replace(table=rows, indices=where, padding=none, out=out)])
        lookup.out[...] = out
    return low, high


def pool_max(
    table: np.ndarray, indices: np.ndarray, offsets: np.ndarray, padding: int
) -> tuple[np.ndarray, np.ndarray]:
    """[bags, dim]: the largest element of each bag's rows, and, int32, the position that it comes from."""
    if table.dtype.itemsize == 2:
        rows, where, none = _rows_read(table, indices, padding)
        largest, winners = pool_max(rows, where, offsets, none)
        return largest.astype(table.dtype), winners
    out = empty((offsets.size - 1, table.shape[1]), table.dtype)
    winners = empty(out.shape, np.int32)
    bags.pool_max(indices.size * table.shape[1], table, indices, offsets, padding, out, winners)
    return out, winners


def bags_of_positions(
    offsets: np.ndarray, indices: np.ndarray, scales: np.ndarray | None, mean: bool, padding: int
) -> np.ndarray:
    """int32: the bag of each position. For ``mean``, ``scales[k]`` is divided by the number of rows of the
    bag of position k, the row ``padding`` not counted."""
    found = empty(indices.size, np.int32)
    given = np.empty(0, np.float32) if scales is None else scales
    divided = mean and scales is not None
    bags.bags_of_positions(indices.size, offsets, indices, padding, divided, found, given)
    return found


def take(values: np.ndarray, segments: Segments) -> np.ndarray:
    """The 1-D ``values``, one for each position, in the order of the segments."""
    order = segments.order[segments.starts[0] : segments.starts[-1]]
    out = empty(order.size, values.dtype)
    bags.take(WORK_PER_POSITION * order.size, values, order, segments.first_position, out)
    return out


def shift(numbers: np.ndarray, by: int) -> None:
    """Add a whole number to each of the 1-D int32 ``numbers``, in place."""
    numbers += np.int32(by)


def without(indices: np.ndarray, row: int, *values: np.ndarray | None) -> tuple[np.ndarray | None, ...]:
    """1-D ``indices`` that do not name ``row``, followed by what ``values`` have at their positions."""
    stay = indices != row
    return tuple(None if own is None else own[stay] for own in (indices, *values))


def won_rows(values: np.ndarray, bags_of: np.ndarray, winners: np.ndarray, out: np.ndarray) -> None:
    """Set row k of ``out`` to those elements of ``values[bags_of[k]]`` whose ``winners`` are k, and to zeros
    elsewhere."""
    bags.won_rows(out.size, values, bags_of, winners, out)


def row_products(
    table: np.ndarray,
    indices: np.ndarray,
    bags_of: np.ndarray,
    scales: np.ndarray | None,
    padding: int,
    grad_output: np.ndarray,
) -> np.ndarray:
    """For each position k the product of row ``indices[k]`` with ``grad_output[bags_of[k]]``, times
    ``scales[k]``; 0 for the row ``padding``. Rows of 16 bits are read as float32."""
    if table.dtype.itemsize == 2:
        table, indices, padding = _rows_read(table, indices, padding)
    out = np.empty(indices.size, table.dtype)
    given = np.empty(0, table.dtype) if scales is None else scales
    work = indices.size * table.shape[1]
    bags.dots(work, table, indices, bags_of, given, padding, grad_output, out)
    return out


def _rows_read(table: np.ndarray, indices: np.ndarray, padding: int) -> tuple[np.ndarray, np.ndarray, int]:
    """A table that holds, in float32, the row of each position of one of 16 bits, its indices and padding."""
    read = widen(gather(table, indices))
    where = np.arange(len(read))
    padded = np.flatnonzero(indices == padding)
    if not padded.size:
        return read, where, len(read)
    where[padded] = padded[0]  # one that is in the table, whose indices kernels look at
    return read, where, int(padded[0])


def limit_norms(table: np.ndarray, segments: Segments, max_norm: float) -> None:
    """Scale those of the rows of segments whose norm is above ``max_norm`` down to it."""
    rows = distinct_rows(segments)
    bags.limit_norms(rows.size * table.shape[1], table, rows, max_norm)


def coalesce(values: np.ndarray, segments: Segments) -> None:
    """Put the sum of each segment's values in the place of its first, and zeros in those of the others."""
    order, starts = segments.order, segments.starts
    row_kernels.coalesce(values.size, values, order, starts, segments.first_position)


def scale(array: np.ndarray, factor: float) -> None:
    """Multiply an array by a number, in place."""
    if array.dtype.itemsize == 2:
        np.multiply(array, np.float32(factor), out=array, casting="unsafe")
    else:
        norms.scale_in_place(array.size, array.reshape(-1), array.dtype.type(factor))


def clip(array: np.ndarray, limit: float) -> None:
    """Clip each element to [-limit, limit], in place; NaN stays NaN."""
    if array.dtype.itemsize == 2:
        np.clip(array, array.dtype.type(-limit), array.dtype.type(limit), out=array)
    else:
        norms.clip_in_place(array.size, array.reshape(-1), array.dtype.type(limit))
