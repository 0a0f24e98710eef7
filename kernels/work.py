"""What a launch is told, whatever the device: the code it needs, and the arrays it works on."""

from typing import Any, NamedTuple

import numpy as np

from fastopt.kernels.formats import Format
from fastopt.kernels.rule import RULES, Rule

Slots = tuple[tuple[np.ndarray, np.ndarray | None], ...]  # state arrays, each with the scales of its codes


class Spec(NamedTuple):
    """All that selects the machine code of a launch.

    h, c: hyperparameters of the rule and of the weight decay. Their types count; their numbers do where
        missed steps are made up for, and elsewhere not.
    compute: the dtype that is computed with.
    formats: of the parameter, of the gradient, and of each state array that is shaped as the parameter.
    mode: for tables, what comes before the update of a row.
    """

    h: Any
    c: Any
    compute: np.dtype
    formats: tuple[Format, ...]
    mode: Any = None

    @property
    def rule(self) -> Rule:
        return RULES[type(self.h)]

    @property
    def typed(self) -> tuple[Any, Any]:
        """``h`` and ``c`` in the dtype that is computed with, as kernels get them; flags stay flags."""
        cast = self.compute.type
        h, c = ([x if isinstance(x, bool) else cast(x) for x in own] for own in (self.h, self.c))
        return type(self.h)(*h), type(self.c)(*c)

    @property
    def key(self) -> tuple:
        """What is equal where one launch can do the work of both."""
        return type(self.h), type(self.c), self.compute, self.formats, type(self.mode)


class ArrayWork(NamedTuple):
    """A parameter's share of a dense update; where it and its gradient lie is said later.

    numbers: the row of hyperparameters that it uses. position: the number, among all elements, of its first
    one, which random bits are counted from. state: the rule's state arrays, C-contiguous; of a factored
    parameter the means over rows and over columns.
    """

    numbers: int
    position: int
    shape: tuple[int, ...]
    master: np.ndarray | None
    state: Slots


class Segments(NamedTuple):
    """Positions in a list of indices, brought together by row: ``order[starts[k]:starts[k + 1]]``,
    ascending, are those whose index is ``rows[k] - first_row``; positions and rows count from
    ``first_position`` and ``first_row``, since the indices of many tables are sorted together.

    order, starts: int32; rows: int64, ascending.
    """

    rows: np.ndarray
    order: np.ndarray
    starts: np.ndarray
    first_row: int = 0
    first_position: int = 0

    def own_rows(self) -> np.ndarray:
        """The distinct rows, as their table counts them."""
        return self.rows - self.first_row


class TableGradient(NamedTuple):
    """The gradient of a table, as the rows of ``values`` that add up to the gradient of each row.

    values: [any number, dim], of the dtype computed with. source, weights: for each position in the order of
    the segments the row of ``values`` and a factor on it, or None where position k has row k, and where there
    are no factors. winners: int32 like ``values``, or None: only those elements count whose winner is the
    position itself. skipped: a row that gets no gradient, or -1.
    """

    values: np.ndarray
    segments: Segments
    source: np.ndarray | None = None
    weights: np.ndarray | None = None
    winners: np.ndarray | None = None
    skipped: int = -1

    @property
    def work(self) -> int:
        """How many elements are added up."""
        starts = self.segments.starts
        return int(starts[-1] - starts[0]) * self.values.shape[1]


class StoredTable(NamedTuple):
    """A table and its state.

    state: the rule's state arrays shaped as the table, all with the same stride from row to row. row_state:
    those of one element a row. master: the float32 copy of a table of 16 bits, or None. position, key: of the
    random bits.
    """

    table: np.ndarray
    state: Slots
    row_state: tuple[np.ndarray, ...]
    master: np.ndarray | None
    position: int
    key: int


class RowSteps(NamedTuple):
    """How far each row is, and what is to be known of other steps.

    counts: int64 [rows]: the number of updates of each row, or the last step that it has taken. history:
    float64 [any number, columns]: ascending counts, each with what the rule folds at it, or the steps of a
    history, with its base and window. tabulated: coefficients of the latest steps, the first of which are for
    ``tabulated_from``.
    """

    counts: np.ndarray
    history: np.ndarray
    base: int = 0
    window: int = 0
    tabulated: np.ndarray | None = None
    tabulated_from: int = 0


class TableWork(NamedTuple):
    """A table's share of a sparse update.

    numbers: float64 hyperparameters of the rule, then of the weight decay. limit: the largest norm of a row's
    gradient. step: the number of this update of the table, 1 for the first.
    """

    stored: StoredTable
    gradient: TableGradient
    numbers: tuple[float, ...]
    limit: float
    step: int
    row_steps: RowSteps | None
