"""What kernels read of arrays and of tables: a row of int64 numbers each, so that one launch can work on
any number of them. The columns, and the only code that writes them."""

from collections.abc import Sequence

import numpy as np

from fastopt.kernels.cpu import tables
from fastopt.kernels.cpu.flat import GRADIENT, KEY, NUMBERS, PARAMETER, POSITION, STATE

ARRAY_GRADIENT, ARRAY_KEY, ARRAY_NUMBERS, ARRAY_PARAMETER = GRADIENT, KEY, NUMBERS, PARAMETER

_ALIASES = {"parameter": "PARAM", "segments": "GROUPS"}


def array_table(
    uses: Sequence[tuple[int, int]], masters: Sequence[int], state: Sequence[Sequence[int]]
) -> np.ndarray:
    """The rows of arrays, without the addresses of the arrays and their gradients and without keys.

    uses: of each array the row of hyperparameters and the position of its first element. masters: addresses
    or 0. state: two addresses of each state array.
    """
    table = np.zeros((len(uses), STATE + len(state[0])), np.int64)
    table[:, [NUMBERS, POSITION]] = uses
    table[:, PARAMETER + 1] = masters
    table[:, STATE:] = state
    return table


def table_row(state: Sequence[int], **columns: int) -> np.ndarray:
    """The row of a table: the columns named, others 0, and two addresses of each state array."""
    row = np.zeros(tables.STATE + len(state), np.int64)
    for name, value in columns.items():
        row[getattr(tables, _ALIASES.get(name, name.upper()))] = value
    row[tables.STATE :] = state
    return row
