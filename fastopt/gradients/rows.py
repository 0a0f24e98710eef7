"""A sparse gradient as steps see it: rows of values, and the rows of the parameter that they belong to."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from fastopt._core.backend import backend_of
from fastopt._core.indices import Indices
from fastopt.gradients.pooling import Bags
from fastopt.kernels.work import Array, Segments, TableGradient


class RowGradient:
    """A checked gradient by rows: rows of values, and which of them add up to the gradient of a row.

    Args:
        values: [number of indices, dim], or the gradients of bags, [bags, dim]; of any dtype of gradients.
        indices: the row of the parameter that each position belongs to.
        bags: for pooled rows, which bag each position belongs to, and its weight; None: position k has row k
            of ``values``.
        dense: whether it is a dense gradient, used by rows: then it names every row.

    Attributes:
        given: the arrays of the caller that its numbers come from.
        values: in the dtype that is computed with.
    """

    def __init__(
        self, values: Array, indices: Indices, bags: Bags | None = None, *, dense: bool = False
    ) -> None:
        self.given: tuple[Array, ...] = (values,)
        self.values = backend_of(values).widen(values)
        self.indices = indices
        self.bags = bags
        self.dense = dense
        self._winners: Array | None = None
        self._by_row: TableGradient | None = None

    @property
    def takes_maxima(self) -> bool:
        """Whether it goes to the rows that maxima come from, which the table decides."""
        return self.bags is not None and self.bags.mode == "max"

    @property
    def padding(self) -> int:
        """A row that gets no gradient, or -1."""
        return -1 if self.bags is None else self.bags.padding

    @property
    def values_used(self) -> np.ndarray:
        """Those of ``values`` that belong to a row, on the host."""
        backend = backend_of(self.values)
        values = backend.to_host(self.values)
        if self.bags is None:
            return values
        bags, _ = self.bags.of_positions(self.values.dtype)
        counting = backend.to_host(self.indices.flat) != self.padding
        return values[np.unique(backend.to_host(bags)[counting])]

    @property
    def segments_written(self) -> Segments | None:
        """The rows that an update writes, None for all."""
        return None if self.dense else self.indices.segments

    @property
    def clears(self) -> Sequence[Callable[[], object]]:
        """The calls that set the values to zero."""
        return [partial(values.fill, 0) for values in self.given]

    def find_winners(self, table: Array) -> None:
        """Find the rows of ``table`` that the maxima come from."""
        assert self.bags is not None
        self._winners = self.bags.pool_max(table)[1]

    def write_won(self, out: Array) -> None:
        """Write the gradient of each position, one to a row of ``out``; the winners are found."""
        bags_of, _ = self.sources()
        backend_of(out).won_rows(self.values, bags_of, self._winners, out)

    def sources(self) -> tuple[Array | None, Array | None]:
        """The row of ``values`` that each position has, None if position k has row k, and the factor on it,
        None where all are 1."""
        bags = self.bags
        if bags is None or (not self.takes_maxima and bags.weights is None and bags.bounds.one_each):
            return None, None
        return bags.of_positions(self.values.dtype)

    def by_row(self) -> TableGradient:
        """The gradient as kernels see it, its positions in the order of their rows."""
        if self._by_row is None:
            segments, take = self.indices.segments, backend_of(self.values).take
            source, weights = (None if own is None else take(own, segments) for own in self.sources())
            self._by_row = TableGradient(self.values, segments, source, weights, self._winners, self.padding)
        return self._by_row
