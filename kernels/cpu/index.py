"""Grouping of indices: which positions belong to each distinct row, in order."""

from typing import NamedTuple

import numpy as np

from fastopt.kernels.jit import Kernel

DIGIT_BITS = 11  # 2,048 counters fit the first-level cache


class Groups(NamedTuple):
    """Positions of each distinct row: ``order[starts[k]:starts[k + 1]]``, ascending, has row
    ``rows[starts[k]]``."""

    rows: np.ndarray
    order: np.ndarray
    starts: np.ndarray


def group(indices: np.ndarray, table_rows: int) -> Groups:
    """Group 1-D ``indices``, each in [0, table_rows), by a stable radix sort."""
    key_type = np.int32 if table_rows <= 2**31 else np.int64
    position_type = np.int32 if indices.size < 2**31 else np.int64
    rows = indices.astype(key_type)
    rows_scratch = np.empty_like(rows)
    order = np.arange(indices.size, dtype=position_type)
    order_scratch = np.empty_like(order)
    starts = np.empty(indices.size + 1, position_type)
    passes = -(-max(table_rows - 1, 1).bit_length() // DIGIT_BITS)
    distinct = sort_and_mark.serial(rows, rows_scratch, order, order_scratch, starts, passes)
    if passes % 2:
        rows, order = rows_scratch, order_scratch
    return Groups(rows, order, starts[: distinct + 1])


@Kernel
def sort_and_mark(rows, rows_scratch, order, order_scratch, starts, passes):
    """Sort ``rows``, least significant digit first, ``order`` along with it, and mark where each
    distinct row starts; returns how many there are. With an odd number of passes the sorted
    arrays are the scratch ones."""
    size = rows.size
    counts = np.empty(1 << DIGIT_BITS, np.int64)
    for digit in range(passes):
        shift = digit * DIGIT_BITS
        counts[:] = 0
        for i in range(size):
            counts[(rows[i] >> shift) & ((1 << DIGIT_BITS) - 1)] += 1
        before = 0
        for value in range(counts.size):
            count = counts[value]
            counts[value] = before
            before += count
        for i in range(size):
            value = (rows[i] >> shift) & ((1 << DIGIT_BITS) - 1)
            at = counts[value]
            counts[value] = at + 1
            rows_scratch[at] = rows[i]
            order_scratch[at] = order[i]
        rows, rows_scratch = rows_scratch, rows
        order, order_scratch = order_scratch, order
    distinct = 0
    for i in range(size):
        if i == 0 or rows[i] != rows[i - 1]:
            starts[distinct] = i
            distinct += 1
    starts[distinct] = size
    return distinct
