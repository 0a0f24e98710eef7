"""Reading rows of embedding tables."""

from typing import Any

import numpy as np

from fastopt import arrays
from fastopt.gradients import checked_indices
from fastopt.kernels.cpu.rows import gather


def embedding(table: Any, indices: Any) -> np.ndarray:
    """The rows of ``table`` that ``indices`` name, as ``torch.nn.functional.embedding``.

    Args:
        table: float32 or float64 array of shape (rows, dim), C-contiguous; NumPy or torch, CPU.
        indices: int32 or int64 array of any shape, each in [0, rows).

    Returns:
        A new array of shape ``indices.shape + (dim,)`` and the table's dtype.

    Raises:
        ValueError: an index out of range, a table that is not 2-D or not contiguous.
        TypeError: other dtypes.
    """
    source = arrays.host_array(table, "table")
    arrays.check_float(source, "table")
    if source.ndim != 2:
        raise ValueError(f"table has shape {source.shape}: expected (rows, dim)")
    arrays.check_contiguous(source, "table")
    where = checked_indices(indices, "indices", source.shape[0])
    out = np.empty((where.size, source.shape[1]), source.dtype)
    gather(out.size, source, np.ascontiguousarray(where).reshape(-1), out)
    return out.reshape(*where.shape, source.shape[1])
