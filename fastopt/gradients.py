"""Gradients: sparse ones, and the walk through the structures that hold gradients."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastopt import arrays
from fastopt.bags import Bags, checked_bags
from fastopt.kernels import layout
from fastopt.kernels.cpu.bags import take
from fastopt.kernels.cpu.memory import empty
from fastopt.plan import Indices
from fastopt.precision import widened


@dataclass(frozen=True, eq=False)
class IndexedSlices:
    """Sparse gradient of a 2-D parameter: ``values[k]`` belongs to row ``indices[k]``.

    Rows named several times get the sum of their values, and one update. The name and meaning
    are TensorFlow's (tf.IndexedSlices).

    Args:
        indices: int32 or int64 array of any shape, each in [0, number of rows), or an
            :class:`fastopt.IndexPlan` of them.
        values: array of shape ``indices.shape + (dim,)`` and the parameter's dtype, C-contiguous.

    Both may be NumPy arrays or torch CPU tensors; they are checked where they are used.

    Example:
        >>> grad = IndexedSlices(np.array([3, 0, 3]), np.ones((3, 2), np.float32))
    """

    indices: Any
    values: Any


@dataclass(frozen=True, eq=False)
class BagGradient:
    """Sparse gradient of a 2-D parameter through :func:`fastopt.embedding_bag`.

    Row ``indices[k]`` gets the gradient of its bag's output, ``grad_output[bag]``, once for each
    time that the bag holds it: times ``per_sample_weights[k]`` if there are weights, divided by the
    number of the bag's rows for mode "mean". The gradients of single indices are never stored.

    Args:
        indices, offsets, mode, per_sample_weights, padding_idx, include_last_offset: as they were
            for :func:`fastopt.embedding_bag`; ``indices`` may be an :class:`fastopt.IndexPlan`.
            With mode "max" the gradient of an element goes to the row that the maximum came from,
            found anew in the table as it is when the gradient is used; the bag's other rows are named
            all the same, and get an update with what they have of it, which may be zeros.
        grad_output: gradient of the output, of shape (bags, dim) and the parameter's dtype,
            C-contiguous.

    Arrays may be NumPy arrays or torch CPU tensors; they are checked where they are used.

    Example:
        >>> grad = BagGradient(np.array([3, 0, 3]), np.array([0, 2]), np.ones((2, 4), np.float32))
    """

    indices: Any
    offsets: Any
    grad_output: Any
    mode: str = "sum"
    per_sample_weights: Any = None
    padding_idx: int | None = None
    include_last_offset: bool = False

    def per_sample_weights_grad(self, table: Any) -> np.ndarray:
        """Gradient of ``per_sample_weights`` (of weights 1 if there were none).

        Args:
            table: the parameter, before it is updated.

        Returns:
            An array of the shape of ``indices``: the product of each index's row with its bag's
            ``grad_output``, divided by the number of the bag's rows for mode "mean".

        Raises:
            ValueError, TypeError: as for a step, or the mode is "max".
        """
        from fastopt.lookup import per_sample_weights_grad

        return per_sample_weights_grad(table, self)


class RowGradient:
    """A checked sparse gradient: rows of values, and which of them make up the gradient of a row.

    values: [number of indices, dim], or the gradients of bags, [bags, dim], in the type that is computed
    with. bags: None for :class:`IndexedSlices`. dense: whether it is a dense gradient, used by rows.
    """

    def __init__(
        self, values: np.ndarray, indices: Indices, bags: Bags | None = None, *, dense: bool = False
    ) -> None:
        self.given = values
        self.values = widened(values)
        self.dense = dense
        self.indices = indices
        self.bags = bags
        self.winners: np.ndarray | None = None
        self._sorted: tuple[np.ndarray, np.ndarray | None] | None = None

    @property
    def work(self) -> int:
        """Elements that are added up."""
        return self.indices.array.size * self.values.shape[1]

    @property
    def values_used(self) -> np.ndarray:
        """Those that belong to a row."""
        if self.bags is None:
            return self.values
        bags, _ = self.bags.of_positions(self.values.dtype)
        return self.values[np.unique(bags[self.indices.flat != self.skipped])]

    @property
    def skipped(self) -> int:
        return -1 if self.bags is None else self.bags.padding

    @property
    def rows_written(self) -> np.ndarray | None:
        """The rows that an update writes, None for all."""
        return None if self.dense else self.indices.segments.own_rows()

    def clear(self) -> None:
        """Set the values to zero."""
        self.given[...] = 0

    def find_winners(self, table: np.ndarray) -> None:
        """For mode "max": which rows the maxima come from."""
        assert self.bags is not None
        self.winners = self.bags.pool_max(table)[1]

    def describe(self, table: np.ndarray) -> np.ndarray:
        """The gradient's and the table's columns of a row for kernels (see kernels/layout.py);
        what they point to lives as long as the gradient."""
        segments = self.indices.segments
        row = np.zeros(layout.TABLE_STATE, np.int64)
        row[layout.TABLE_PARAMETER] = arrays.address(table)
        row[layout.TABLE_DIM] = table.shape[1]
        row[layout.TABLE_VALUES] = arrays.address(self.values)
        if self.bags is None:
            row[layout.TABLE_SOURCE] = arrays.address(segments.order)
            row[layout.TABLE_SOURCE_BASE] = segments.first_position
        else:
            source, weights = self._by_row()
            row[layout.TABLE_SOURCE] = arrays.address(source)
            row[layout.TABLE_SOURCE_ORIGIN] = segments.starts[0]
            row[layout.TABLE_WEIGHTS] = 0 if weights is None else arrays.address(weights)
        row[layout.TABLE_WINNERS] = 0 if self.winners is None else arrays.address(self.winners)
        row[layout.TABLE_ORDER] = arrays.address(segments.order)
        row[layout.TABLE_FIRST_POSITION] = segments.first_position
        row[layout.TABLE_ROWS] = arrays.address(segments.rows)
        row[layout.TABLE_FIRST_ROW] = segments.first_row
        row[layout.TABLE_STARTS] = arrays.address(segments.starts)
        row[layout.TABLE_SEGMENTS] = segments.rows.size
        row[layout.TABLE_SKIPPED] = self.skipped
        return row

    def _by_row(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Bag and weight of each position, in the order of rows."""
        assert self.bags is not None
        if self._sorted is None:
            segments = self.indices.segments
            order = segments.order[segments.starts[0] : segments.starts[-1]]
            bags, scales = self.bags.of_positions(self.values.dtype)
            source = empty(order.size, np.int32)
            take(order.size, bags, order, segments.first_position, source)
            weights = None
            if scales is not None:
                weights = empty(order.size, scales.dtype)
                take(order.size, scales, order, segments.first_position, weights)
            self._sorted = source, weights
        return self._sorted


def checked_slices(slices: IndexedSlices, label: str, rows: int | None) -> RowGradient:
    """``slices`` with 2-D values."""
    indices = Indices(slices.indices, f"{label}.indices", rows)
    values = arrays.host_array(slices.values, f"{label}.values")
    arrays.check_float(values, f"{label}.values")
    shape = indices.array.shape
    if values.ndim != len(shape) + 1 or values.shape[:-1] != shape:
        expected = ", ".join([*map(str, shape), "dim"])
        raise ValueError(
            f"{label}.values has shape {values.shape}: expected ({expected}), indices.shape + (dim,)"
        )
    arrays.check_contiguous(values, f"{label}.values")
    return RowGradient(values.reshape(indices.array.size, values.shape[-1]), indices)


def checked_bag_gradient(gradient: BagGradient, label: str, rows: int | None) -> RowGradient:
    """``gradient`` with its bags."""
    values = arrays.host_array(gradient.grad_output, f"{label}.grad_output")
    arrays.check_float(values, f"{label}.grad_output")
    bags = checked_bags(gradient, label, rows, values.dtype)
    if values.ndim != 2 or values.shape[0] != bags.count:
        raise ValueError(
            f"{label}.grad_output has shape {values.shape}: expected ({bags.count}, dim), a row for each bag"
        )
    arrays.check_contiguous(values, f"{label}.grad_output")
    return RowGradient(values, bags.indices, bags)


def values_of(gradient: IndexedSlices | BagGradient, label: str) -> tuple[Any, str]:
    """The array that a sparse gradient takes its numbers from, with its label."""
    if isinstance(gradient, IndexedSlices):
        return gradient.values, f"{label}.values"
    return gradient.grad_output, f"{label}.grad_output"


def checked_rows(gradient: IndexedSlices | BagGradient, label: str, rows: int | None) -> RowGradient:
    """A sparse gradient, checked for a table of so many rows."""
    if isinstance(gradient, IndexedSlices):
        return checked_slices(gradient, label, rows)
    return checked_bag_gradient(gradient, label, rows)


def row_gradient(
    gradient: IndexedSlices | BagGradient, label: str, parameter: np.ndarray, parameter_label: str
) -> RowGradient:
    """A sparse gradient checked against its parameter; its segments are not known yet."""
    if parameter.ndim != 2:
        noun = "IndexedSlices" if isinstance(gradient, IndexedSlices) else "a BagGradient"
        raise ValueError(
            f"{label} is {noun} but {parameter_label} has shape {parameter.shape}: "
            "expected a 2-D parameter, pass a dense gradient"
        )
    values, values_label = values_of(gradient, label)
    arrays.check_like(arrays.host_array(values, values_label), values_label, parameter, parameter_label)
    checked = checked_rows(gradient, label, parameter.shape[0])
    if checked.values.shape[1] != parameter.shape[1]:
        raise ValueError(
            f"{values_label} has rows of {checked.values.shape[1]} but {parameter_label} of "
            f"{parameter.shape[1]}: they must be the same"
        )
    return checked


def leaves(grads: Any, label: str) -> Iterator[tuple[Any, str]]:
    """Each gradient of an array, a sparse gradient, or nested lists and dicts of them, with its label."""
    if grads is None:
        return
    if isinstance(grads, dict):
        for key, value in grads.items():
            yield from leaves(value, f"{label}[{key!r}]")
    elif isinstance(grads, list | tuple):
        for position, value in enumerate(grads):
            yield from leaves(value, f"{label}[{position}]")
    else:
        yield grads, label
