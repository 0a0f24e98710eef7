"""Sparse gradients through pooled lookups."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastopt._core import arrays
from fastopt._core.backend import backend_of
from fastopt.gradients.pooling import Bags, checked_bags, checked_table
from fastopt.gradients.protocol import RowGradient, SparseGradient


@dataclass(frozen=True, eq=False)
class BagGradient(SparseGradient):
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
        >>> grad = BagGradient(np.array([3, 0, 3]), np.array([0, 2]), np.ones((2, 4), np.float32), mode="sum")
    """

    indices: Any
    offsets: Any
    grad_output: Any
    mode: str
    per_sample_weights: Any = None
    padding_idx: int | None = None
    include_last_offset: bool = False

    def numbers(self, label: str) -> tuple[Any, str]:
        """``grad_output``."""
        return self.grad_output, f"{label}.grad_output"

    def checked(self, label: str, rows: int | None) -> RowGradient:
        """The gradient with its bags."""
        values = arrays.host_array(self.grad_output, f"{label}.grad_output")
        arrays.check_float(values, f"{label}.grad_output", self.grad_output, arrays.GRADIENT)
        bags = checked_bags(self, label, rows, values.dtype)
        if values.ndim != 2 or values.shape[0] != bags.count:
            raise ValueError(
                f"{label}.grad_output has shape {values.shape}: expected ({bags.count}, dim), a row for "
                "each bag"
            )
        arrays.check_contiguous(values, f"{label}.grad_output", self.grad_output, arrays.GRADIENT)
        return RowGradient(values, bags.indices, bags)

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
        source = checked_table(table)
        if self.mode == "max":
            raise ValueError("mode is 'max', which takes no per_sample_weights: expected 'sum' or 'mean'")
        bags = checked_bags(self, "", source.shape[0], source.dtype)
        values = arrays.host_array(self.grad_output, "grad_output")
        arrays.check_like(values, "grad_output", self.grad_output, source, "table")
        if values.shape != (bags.count, source.shape[1]):
            raise ValueError(
                f"grad_output has shape {values.shape}: expected {(bags.count, source.shape[1])}, "
                "(bags, dim of the table)"
            )
        arrays.check_contiguous(values, "grad_output", self.grad_output)
        shape = bags.indices.array.shape
        bags = Bags(bags.indices, bags.offsets, bags.mode, None, bags.padding)
        rows = source
        if source.dtype in arrays.LOW_DTYPES:
            bags, rows = bags.of_rows_read(source)
        of_positions, scales = bags.of_positions(rows.dtype)
        flat = bags.indices.flat
        backend = backend_of(source)
        values = backend.widen(values)
        products = backend.row_products(rows, flat, of_positions, scales, bags.padding, values)
        return products.astype(source.dtype, copy=False).reshape(shape)
