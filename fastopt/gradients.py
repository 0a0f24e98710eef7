"""Gradients: sparse ones, and the walk through the structures that hold gradients."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastopt import arrays
from fastopt.kernels.cpu.index import Groups, group


@dataclass(frozen=True, eq=False)
class IndexedSlices:
    """Sparse gradient of a 2-D parameter: ``values[k]`` belongs to row ``indices[k]``.

    Rows named several times get the sum of their values, and one update. The name and meaning
    are TensorFlow's (tf.IndexedSlices).

    Args:
        indices: int32 or int64 array of any shape, each in [0, number of rows).
        values: array of shape ``indices.shape + (dim,)`` and the parameter's dtype, C-contiguous.

    Both may be NumPy arrays or torch CPU tensors; they are checked where they are used.

    Example:
        >>> grad = IndexedSlices(np.array([3, 0, 3]), np.ones((3, 2), np.float32))
    """

    indices: Any
    values: Any


class DenseGradient(NamedTuple):
    """A checked gradient, flat."""

    values: np.ndarray


class RowGradient(NamedTuple):
    """A checked sparse gradient: [number of indices, dim] values, grouped by row."""

    values: np.ndarray
    groups: Groups


def checked_indices(indices: Any, label: str, rows: int | None) -> np.ndarray:
    """``indices`` as a NumPy array, every one in [0, rows)."""
    array = arrays.host_array(indices, label)
    if array.dtype not in (np.int32, np.int64):
        raise TypeError(
            f"{label} has dtype {array.dtype}: expected int32 or int64, pass {label}.astype(np.int64)"
        )
    if array.size:
        low, high = int(array.min()), int(array.max())
        if low < 0 or (rows is not None and high >= rows):
            bad = low if low < 0 else high
            limit = "not negative" if rows is None else f"in [0, {rows}), the rows of the table"
            raise ValueError(f"{label} holds {bad}: expected every index {limit}")
    return array


def checked_slices(slices: IndexedSlices, label: str, rows: int | None) -> tuple[np.ndarray, np.ndarray]:
    """1-D indices and 2-D values of ``slices``."""
    indices = checked_indices(slices.indices, f"{label}.indices", rows)
    values = arrays.host_array(slices.values, f"{label}.values")
    arrays.check_float(values, f"{label}.values")
    if values.ndim != indices.ndim + 1 or values.shape[:-1] != indices.shape:
        expected = ", ".join([*map(str, indices.shape), "dim"])
        raise ValueError(
            f"{label}.values has shape {values.shape}: expected ({expected}), indices.shape + (dim,)"
        )
    arrays.check_contiguous(values, f"{label}.values")
    return indices.reshape(-1), values.reshape(indices.size, values.shape[-1])


def row_gradient(
    slices: IndexedSlices, label: str, parameter: np.ndarray, parameter_label: str
) -> RowGradient:
    """``slices`` checked against its parameter and grouped."""
    if parameter.ndim != 2:
        raise ValueError(
            f"{label} is IndexedSlices but {parameter_label} has shape {parameter.shape}: "
            "expected a 2-D parameter, pass a dense gradient"
        )
    arrays.check_like(
        arrays.host_array(slices.values, f"{label}.values"), f"{label}.values", parameter, parameter_label
    )
    indices, values = checked_slices(slices, label, parameter.shape[0])
    if values.shape[1] != parameter.shape[1]:
        raise ValueError(
            f"{label}.values has rows of {values.shape[1]} but {parameter_label} of {parameter.shape[1]}: "
            "they must be the same"
        )
    return RowGradient(values, group(indices, parameter.shape[0]))


def leaves(grads: Any, label: str) -> Iterator[tuple[Any, str]]:
    """Each gradient of an array, IndexedSlices, or nested lists and dicts of them, with its label."""
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
