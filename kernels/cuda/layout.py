"""What kernels for devices read of an array: a row of int64 numbers, its own columns and then those that the
CPU's kernels read (see ``fastopt.kernels.layout``)."""

from collections.abc import Sequence

import numpy as np

from fastopt.kernels.layout import ARRAY_PLACES

(
    ARRAY_SIZE,  # elements
    ARRAY_ALIGNED,  # whether every one of its addresses allows loads and stores of whole vectors
    ARRAY_SHARED,  # the first of the shared columns
) = range(3)
PLACES = ARRAY_SHARED + ARRAY_PLACES  # two addresses each of the parameter, the gradient and the slots


def array_columns(members: int) -> int:
    """How many columns an array has that has so many formats."""
    return PLACES + 2 * members


def with_own_columns(table: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The rows of arrays of these sizes, of what ``fastopt.kernels.layout.array_table`` made."""
    own = np.zeros((len(sizes), ARRAY_SHARED), np.int64)
    own[:, ARRAY_SIZE] = sizes
    return np.concatenate([own, table], axis=1)


# What kernels of rows read of a table: its own columns and then those of the CPU's kernels.
(
    ROWS_BOUNDS,  # address of int64: the table's first segment, and the one after its last
    ROWS_TABLE_ROWS,  # the row of indices outside the table
    ROWS_ALIGNED,  # whether rows and values allow loads and stores of whole vectors
    ROWS_LANE_BITS,  # 2 to this are the lanes that take a row
    ROWS_SLOTS,  # address of [slot, dim], sums of the gradients of many positions; or 0
    ROWS_LIMIT,  # bits of a float64: the largest norm of a row's gradient
    ROWS_SHARED,  # the first of the shared columns
) = range(7)

# What kernels read of a pooled lookup: its own columns and then those of the CPU's kernels.
(
    POOL_INDEX_STRIDE,  # bytes from index to index
    POOL_INDEX_SIZE,  # bytes of an index
    POOL_LANE_BITS,  # 2 to this are the lanes that take a bag
    POOL_SHARED,  # the first of the shared columns
) = range(4)
