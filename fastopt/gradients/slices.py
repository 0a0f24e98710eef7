"""Sparse gradients with a row of values for each index."""

from dataclasses import dataclass
from typing import Any

from fastopt._core import arrays
from fastopt._core.indices import Indices
from fastopt.gradients.protocol import SparseGradient
from fastopt.gradients.rows import RowGradient


@dataclass(frozen=True, eq=False)
class IndexedSlices(SparseGradient):
    """Sparse gradient of a 2-D parameter: ``values[k]`` belongs to row ``indices[k]``.

    Rows named several times get the sum of their values, and one update. The name and meaning
    are TensorFlow's (tf.IndexedSlices).

    Args:
        indices: int32 or int64 array of any shape, each in [0, number of rows), or an
            :class:`fastopt.IndexPlan` of them.
        values: array of shape ``indices.shape + (dim,)`` and the parameter's dtype, or float32 for one of
            16 bits, C-contiguous.

        check_indices: False leaves out the check of indices on a CUDA device, for which the host waits: those
            out of range are then left out. On the CPU they are checked all the same.

    Both may be NumPy arrays, torch tensors or CUDA arrays, where the parameter lies; they are checked where
    they are used.

    Example:
        >>> grad = IndexedSlices(np.array([3, 0, 3]), np.ones((3, 2), np.float32))
    """

    indices: Any
    values: Any
    check_indices: bool = True

    def numbers(self, label: str) -> tuple[Any, str]:
        """``values``."""
        return self.values, f"{label}.values"

    def checked(self, label: str, rows: int | None) -> RowGradient:
        """The slices with values in two dimensions."""
        indices = Indices.checked(self.indices, f"{label}.indices", rows, self.check_indices)
        values = arrays.array_view(self.values, f"{label}.values")
        arrays.check_beside(indices.array, f"{label}.indices", self.indices, values, f"{label}.values")
        arrays.check_float(values, f"{label}.values", self.values, arrays.GRADIENT)
        shape = indices.array.shape
        if values.ndim != len(shape) + 1 or values.shape[:-1] != shape:
            expected = ", ".join([*map(str, shape), "dim"])
            raise ValueError(
                f"{label}.values has shape {values.shape}: expected ({expected}), indices.shape + (dim,)"
            )
        arrays.check_contiguous(values, f"{label}.values", self.values, arrays.GRADIENT)
        return RowGradient(values.reshape(indices.array.size, values.shape[-1]), indices)
