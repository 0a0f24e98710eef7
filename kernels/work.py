"""What a launch is told, whatever the device: the code it needs, and the arrays it works on."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from fastopt.kernels.formats import Format
from fastopt.kernels.rule import RULES, Rule

Array: TypeAlias = Any  # an array of NumPy or, with the same attributes, of a device (see Backend)
Slots = tuple[tuple[Array, Array | None], ...]  # state arrays, each with the scales of its codes


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
    master: Array | None
    state: Slots


class Segments(NamedTuple):
    """Positions in a list of indices, brought together by row: ``order[starts[k]:starts[k + 1]]``,
    ascending, are those whose index is ``rows[k] - first_row``; positions and rows count from
    ``first_position`` and ``first_row``, since the indices of many tables are sorted together.

    order, starts: int32; rows: int64, ascending.

    These are the host's. A device may have others with the attributes ``order``, ``starts`` and ``rows``.
    """

    rows: Array
    order: Array
    starts: Array
    first_row: int = 0
    first_position: int = 0


class PooledLookup(NamedTuple):
    """Bags of rows of a table, each added up to a row of ``out``.

    table: [rows, dim]. indices: 1-D, int32 or int64. offsets: int64 [bags + 1]. weights: a factor for each
    index, or None. mean: whether sums are divided by how many rows they have. padding: a row that is left
    out, or -1. out: [bags, dim], whose rows may lie apart.
    """

    table: Array
    indices: Array
    offsets: Array
    weights: Array | None
    mean: bool
    padding: int
    out: Array


class TableGradient(NamedTuple):
    """The gradient of a table, as the rows of ``values`` that add up to the gradient of each row.

    values: [any number, dim], of the dtype computed with; on the host, rows may lie apart. source, weights:
    for each position in the order of the segments the row of ``values`` and a factor on it, or None where
    position k has row k, and where there are no factors. winners: int32 [any number, dim], or None: only
    those elements count whose winner is the position itself. skipped: a row that gets no gradient, or -1.
    """

    values: Array
    segments: Any  # Segments, or those of a device
    source: Array | None = None
    weights: Array | None = None
    winners: Array | None = None
    skipped: int = -1


class StoredState:
    """The state of a table, which stays where it is from step to step.

    Args:
        slots: the rule's state arrays shaped as the table, all with the same stride from row to row.
        of_rows: those of one element a row.
        master: the float32 copy of a table of 16 bits, or None.
    """

    def __init__(self, slots: Slots, of_rows: tuple[Array, ...] = (), master: Array | None = None) -> None:
        self.slots = slots
        self.of_rows = of_rows
        self.master = master
        self._places: list[int] | None = None

    def places(self, address: Callable[[Array], int]) -> list[int]:
        """Two addresses of each state array: of its elements, and of the scales of their codes or 0.
        ``address``: what finds where an array lies, the same at each call."""
        if self._places is None:
            pairs = [*self.slots, *((array, None) for array in self.of_rows)]
            self._places = [0 if array is None else address(array) for pair in pairs for array in pair]
        return self._places


class StoredTable(NamedTuple):
    """A table and its state. position, key: of the random bits."""

    table: Array
    state: StoredState
    position: int
    key: int

    def columns(self, address: Callable[[Array], int]) -> dict[str, int]:
        """Columns of ``fastopt.kernels.layout``; ``address``: what finds where an array lies."""
        columns = {
            "parameter": address(self.table),
            "dim": self.table.shape[1],
            "position": self.position,
            "key": self.key,
        }
        if self.state.slots:
            first, _ = self.state.slots[0]
            columns["state_stride"] = first.strides[0] // first.itemsize
        if self.state.master is not None:
            columns["master"] = address(self.state.master)
        return columns


class RowSteps(NamedTuple):
    """How far each row is, and what is to be known of other steps.

    counts: int64 [rows]: the number of updates of each row, or the last step that it has taken. history:
    float64 [any number, columns]: ascending counts, each with what the rule folds at it, or the steps of a
    history, with its base and window. tabulated: coefficients of the latest steps, the first of which are for
    ``tabulated_from``.
    """

    counts: Array
    history: Array
    base: int = 0
    window: int = 0
    tabulated: Array | None = None
    tabulated_from: int = 0

    def columns(self, address: Callable[[Array], int]) -> dict[str, int]:
        """Columns of ``fastopt.kernels.layout``; ``address``: what finds where an array lies."""
        columns = {
            "row_steps": address(self.counts),
            "history": address(self.history),
            "history_rows": self.history.shape[0],
            "history_columns": self.history.shape[1],
            "history_base": self.base,
            "history_window": self.window,
        }
        if self.tabulated is not None:
            columns["tabulated"] = address(self.tabulated)
            columns["tabulated_columns"] = self.tabulated.shape[1]
            columns["tabulated_from"] = self.tabulated_from
        return columns


class CountFold(NamedTuple):
    """What is folded where rows count their own updates. Equal ones fold the same, so that what they folded
    can be kept.

    options: names and values, checked, but for the learning rate.
    """

    rule: Rule
    options: tuple[tuple[str, Any], ...]

    def __call__(self, steps: np.ndarray) -> np.ndarray:
        """float64 [n, 1 + fields]: each of the float64 ``steps``, with what the rule folds at it for the
        learning rate 1."""
        with np.errstate(all="ignore"):  # as Python's floats and kernels do
            h = self.rule.fold(steps, {**dict(self.options), "lr": 1.0}, np.float64)
        found = np.empty((steps.size, 1 + len(h)))
        found[:, 0] = steps
        for k, number in enumerate(h):
            found[:, 1 + k] = number
        return found


class TableWork(NamedTuple):
    """A table's share of a sparse update.

    numbers: float64 hyperparameters of the rule, then of the weight decay. limit: the largest norm of a row's
    gradient. step: the number of this update of the table, 1 for the first. missed_key: of the
    random bits with which missed steps are rounded, where they are stored before the update; 0 where no row
    has missed any.
    """

    stored: StoredTable
    gradient: TableGradient
    numbers: tuple[float, ...]
    limit: float
    step: int
    row_steps: RowSteps | None
    missed_key: int
