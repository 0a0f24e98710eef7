"""What a kind of sparse gradient has to say, so that steps, norms and clipping can use it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from fastopt._core import arrays
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
        values: in the dtype that is computed with.
    """

    def __init__(
        self, values: Array, indices: Indices, bags: Bags | None = None, *, dense: bool = False
    ) -> None:
        self._given = values
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
    def values_used(self) -> np.ndarray:
        """Those of ``values`` that belong to a row, on the host."""
        backend = backend_of(self.values)
        values = backend.to_host(self.values)
        if self.bags is None:
            return values
        bags, _ = self.bags.of_positions(self.values.dtype)
        counting = backend.to_host(self.indices.flat) != self.bags.padding
        return values[np.unique(backend.to_host(bags)[counting])]

    @property
    def segments_written(self) -> Segments | None:
        """The rows that an update writes, None for all."""
        return None if self.dense else self.indices.segments

    @property
    def clear(self) -> Callable[[], object]:
        """The call that sets the values to zero."""
        return partial(self._given.fill, 0)

    def find_winners(self, table: Array) -> None:
        """Find the rows of ``table`` that the maxima come from."""
        assert self.bags is not None
        self._winners = self.bags.pool_max(table)[1]

    def by_row(self) -> TableGradient:
        """The gradient as kernels see it, its positions in the order of their rows."""
        if self._by_row is None:
            segments = self.indices.segments
            if self.bags is None:
                self._by_row = TableGradient(self.values, segments)
            else:
                source, weights = self.bags.of_positions(self.values.dtype)
                take = backend_of(self.values).take
                weights = None if weights is None else take(weights, segments)
                padding = self.bags.padding
                self._by_row = TableGradient(
                    self.values, segments, take(source, segments), weights, self._winners, padding
                )
        return self._by_row


class SparseGradient(ABC):
    """A gradient of a 2-D parameter that names the rows it belongs to.

    A new kind of gradient derives from this class and says what it is in the two methods; a step, norms and
    clipping then take it wherever they take :class:`fastopt.IndexedSlices`.
    """

    @abstractmethod
    def numbers(self, label: str) -> tuple[Any, str]:
        """The array that it takes its numbers from, of the parameter's dtype, and what that is called where
        the gradient is called ``label``."""

    @abstractmethod
    def checked(self, label: str, rows: int | None) -> RowGradient:
        """What it says, checked for a table of so many rows, or for one that is not known.

        Raises:
            TypeError, ValueError: it contradicts itself, or names rows that the table does not have.
        """

    def for_parameter(self, label: str, parameter: Array, parameter_label: str) -> RowGradient:
        """What it says, checked against its parameter; its indices are not sorted yet."""
        if parameter.ndim != 2:
            name = type(self).__name__
            name = name if name.endswith("s") else arrays.article(name)
            raise ValueError(
                f"{label} is {name} but {parameter_label} has shape "
                f"{parameter.shape}: expected a 2-D parameter, pass a dense gradient"
            )
        values, values_label = self.numbers(label)
        array = arrays.array_view(values, values_label, arrays.GRADIENT)
        arrays.check_like(array, values_label, values, parameter, parameter_label)
        checked = self.checked(label, parameter.shape[0])
        if checked.values.shape[1] != parameter.shape[1]:
            raise ValueError(
                f"{values_label} has rows of {checked.values.shape[1]} but {parameter_label} of "
                f"{parameter.shape[1]}: they must be the same"
            )
        return checked


def numbers_of(gradient: Any, label: str) -> tuple[Any, str]:
    """The array that a gradient of any kind takes its numbers from, with its label."""
    return gradient.numbers(label) if isinstance(gradient, SparseGradient) else (gradient, label)
