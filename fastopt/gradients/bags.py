"""Sparse gradients through pooled lookups."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastopt._core import arrays
from fastopt._core.arrays import LOW_DTYPES
from fastopt.gradients.pooling import check_weights, checked_bags, checked_table, weights_dtypes
from fastopt.gradients.protocol import SparseGradient
from fastopt.gradients.rows import RowGradient
from fastopt.kernels.work import Array


@dataclass(frozen=True, eq=False)
class BagGradient(SparseGradient):
    """Sparse gradient of a 2-D parameter through :func:`fastopt.embedding_bag`.

    Row ``indices[k]`` gets the gradient of its bag's output, ``grad_output[bag]``, once for each
    time that the bag holds it: times ``per_sample_weights[k]`` if there are weights, divided by the
    number of the bag's rows for mode "mean". The gradients of single indices are never stored.

    Args:
        indices, offsets, mode, per_sample_weights, padding_idx, include_last_offset, check_indices: as they
            were for :func:`fastopt.embedding_bag`; ``indices`` may be an :class:`fastopt.IndexPlan`.
            With mode "max" the gradient of an element goes to the row that the maximum came from,
            found anew in the table as it is when the gradient is used; the bag's other rows are named
            all the same, and get an update with what they have of it, which may be zeros.
        grad_output: gradient of the output, of shape (bags, dim) and the parameter's dtype, or float32
            for one of 16 bits, C-contiguous.

    Arrays may be NumPy arrays, torch tensors or CUDA arrays, where the parameter lies; they are checked where
    they are used.

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
    check_indices: bool = True

    def numbers(self, label: str) -> tuple[Any, str]:
        """``grad_output``."""
        return self.grad_output, f"{label}.grad_output"

    def checked(self, label: str, rows: int | None) -> RowGradient:
        """The gradient with its bags."""
        values = arrays.array_view(self.grad_output, f"{label}.grad_output")
        arrays.check_float(values, f"{label}.grad_output", self.grad_output, arrays.GRADIENT)
        # What tables there are with such gradients
        low = LOW_DTYPES if values.dtype == np.float32 else ()
        bags = checked_bags(self, label, rows, weights_dtypes(values.dtype, *low))
        given = bags.indices.array, f"{label}.indices", self.indices
        arrays.check_beside(*given, values, f"{label}.grad_output")
        if values.ndim != 2 or values.shape[0] != bags.count:
            raise ValueError(
                f"{label}.grad_output has shape {values.shape}: expected ({bags.count}, dim), a row for "
                "each bag"
            )
        arrays.check_contiguous(values, f"{label}.grad_output", self.grad_output, arrays.GRADIENT)
        return RowGradient(values, bags.indices, bags)

    def for_parameter(self, label: str, parameter: Array, parameter_label: str) -> RowGradient:
        """The gradient with its bags, whose weights are such as the lookup in this table takes."""
        checked = super().for_parameter(label, parameter, parameter_label)
        if self.per_sample_weights is not None:
            weights_label = f"{label}.per_sample_weights"
            weights = arrays.array_view(self.per_sample_weights, weights_label)
            check_weights(weights, weights_label, weights_dtypes(parameter.dtype))
        return checked

    def per_sample_weights_grad(self, table: Any) -> Any:
        """Gradient of ``per_sample_weights`` (of weights 1 if there were none).

        Args:
            table: the parameter, before it is updated.

        Returns:
            An array of the shape of ``indices``, a tensor for a table of torch: the product of each index's
            row with its bag's ``grad_output``, divided by the number of the bag's rows for mode "mean". Its
            dtype is that of the weights or, without any, the table's.

        Raises:
            ValueError, TypeError: as for a step, or the mode is "max".
        """
        source = checked_table(table)
        if self.mode == "max":
            raise ValueError("mode is 'max', which takes no per_sample_weights: expected 'sum' or 'mean'")
        bags = checked_bags(self, "", source.shape[0], weights_dtypes(source.dtype))
        values = arrays.array_view(self.grad_output, "grad_output")
        arrays.check_like(values, "grad_output", self.grad_output, source, "table")
        if values.shape != (bags.count, source.shape[1]):
            raise ValueError(
                f"grad_output has shape {values.shape}: expected {(bags.count, source.shape[1])}, "
                "(bags, dim of the table)"
            )
        arrays.check_contiguous(values, "grad_output", self.grad_output)
        shape, dtype = bags.indices.array.shape, source.dtype
        if self.per_sample_weights is not None:
            dtype = arrays.array_view(self.per_sample_weights, "per_sample_weights").dtype
        return arrays.in_kind(bags.products(source, values, dtype).reshape(shape), table)
