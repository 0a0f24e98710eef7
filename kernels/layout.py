"""What kernels read of arrays and of tables: a row of int64 numbers each, so that one launch can work on any
number of them. These are its columns, and the only code that writes them.

An array, or its gradient, or one of its slots is described by two addresses: of its elements and, where its
format has one (see formats.py), of its master or of the scales of its blocks.

The gradient of a table is the rows of its values: sorted position j (see cpu/index.py) adds row
``source[j - source origin] - source base`` of them to its segment's sum, times ``weights[j - source origin]``
if there are weights. With winners, [rows of values, dim], only those elements count whose winner is the
position itself: the gradient of a maximum.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fastopt.kernels.work import Array, PooledLookup

(
    ARRAY_NUMBERS,  # the row of hyperparameters
    ARRAY_POSITION,  # that random bits are counted from
    ARRAY_KEY,  # of the random bits
    ARRAY_PLACES,  # two addresses each of the parameter, the gradient and the slots
) = range(4)
ARRAY_PARAMETER, ARRAY_GRADIENT, ARRAY_STATE = ARRAY_PLACES, ARRAY_PLACES + 2, ARRAY_PLACES + 4

(
    TABLE_PARAMETER,  # address of [rows, dim]
    TABLE_DIM,
    TABLE_VALUES,  # address of [any number, dim]
    TABLE_VALUES_STRIDE,  # bytes from row to row; kernels for devices take rows that follow one another
    TABLE_SOURCE,  # address of int32
    TABLE_SOURCE_ORIGIN,
    TABLE_SOURCE_BASE,
    TABLE_WEIGHTS,  # address, or 0
    TABLE_WINNERS,  # address of int32, or 0
    TABLE_ORDER,  # address of int32: the position of each sorted position
    TABLE_FIRST_POSITION,
    TABLE_ROWS,  # address of int64: the row of each segment, plus TABLE_FIRST_ROW
    TABLE_FIRST_ROW,
    TABLE_STARTS,  # address of int32: where each segment starts, and the last ends
    TABLE_SEGMENTS,  # how many there are
    TABLE_SKIPPED,  # a row that gets no gradient, or -1
    TABLE_STATE_STRIDE,  # elements from row to row of the state arrays
    TABLE_ROW_STEPS,  # address of int64: one number of steps a row, or 0
    TABLE_STEP,  # of the update: 1 is the first
    TABLE_HISTORY,  # address of float64 [TABLE_HISTORY_ROWS, TABLE_HISTORY_COLUMNS]
    TABLE_HISTORY_COLUMNS,
    TABLE_HISTORY_ROWS,
    TABLE_HISTORY_BASE,
    TABLE_HISTORY_WINDOW,
    TABLE_TABULATED,  # address of [any number, TABLE_TABULATED_COLUMNS]: coefficients (see catch_up.py)
    TABLE_TABULATED_COLUMNS,
    TABLE_TABULATED_FROM,  # the step that the first of them are for
    TABLE_MASTER,  # address of the parameter's master, or 0
    TABLE_POSITION,  # that random bits are counted from
    TABLE_KEY,  # of the random bits
    TABLE_STATE,  # two addresses each of the state arrays, and of those of one element a row
) = range(31)

(
    POOL_TABLE,  # address of [rows, dim]
    POOL_ROWS,
    POOL_DIM,
    POOL_INDICES,  # address
    POOL_POSITIONS,  # how many indices there are
    POOL_OFFSETS,  # address of int64: where each bag begins, and the last ends
    POOL_BAGS,
    POOL_WEIGHTS,  # address: one for each index, or 0
    POOL_MEAN,  # whether sums are divided
    POOL_PADDING,  # a row that is left out, or -1
    POOL_OUT,  # address of [bags, dim]
    POOL_OUT_STRIDE,  # bytes from row to row
) = range(12)

_COLUMNS = {
    name.removeprefix("TABLE_").lower(): k for name, k in list(globals().items()) if name.startswith("TABLE_")
}


def array_table(
    uses: Sequence[tuple[int, int]], masters: Sequence[int], state: Sequence[Sequence[int]]
) -> np.ndarray:
    """The rows of arrays, without the addresses of the arrays and their gradients and without keys.

    uses: of each array the row of hyperparameters and the position of its first element. masters: addresses
    or 0. state: two addresses of each state array.
    """
    table = np.zeros((len(uses), ARRAY_STATE + len(state[0])), np.int64)
    table[:, [ARRAY_NUMBERS, ARRAY_POSITION]] = uses
    table[:, ARRAY_PARAMETER + 1] = masters
    table[:, ARRAY_STATE:] = state
    return table


def pool_row(lookup: PooledLookup, address: Callable[[Array], int]) -> list[int]:
    """The row of a pooled lookup; ``address``: what finds where an array lies."""
    table, indices, offsets, weights, mean, padding, out = lookup
    of_weights = 0 if weights is None else address(weights)
    given = address(table), *table.shape, address(indices), indices.size, address(offsets), len(out)
    return [*given, of_weights, int(mean), max(padding, -1), address(out), out.strides[0]]


def table_row(state: Sequence[int], columns: Mapping[str, int]) -> list[int]:
    """The row of a table: the columns named, without ``TABLE_`` and in small letters, others 0, and two
    addresses of each state array."""
    row = [0] * TABLE_STATE
    for name, value in columns.items():
        row[_COLUMNS[name]] = value
    return [*row, *state]
