"""Arrays that lie in one buffer."""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastopt.arrays import ALL_DTYPES, NAMES
from fastopt.kernels.cpu.memory import ALIGNMENT, aligned

Shape = int | Sequence[int]


class FlatBuffer:
    """One contiguous buffer, and arrays of given shapes that lie in it one after another, without gaps.

    For a trainer that wants its parameters, or gradients, in one array: to clear, copy, send or save them at
    once. An optimizer takes ``flat`` or ``views``, with the same results to the bit where all have the same
    options (with 8-bit state, where sizes are multiples of 256); of thousands of small arrays ``flat`` is
    faster.

    Args:
        shapes: a sequence of shapes, or a dict name -> shape; a number stands for one dimension.
        dtype: float32, the default, float64, float16 or bfloat16 (``ml_dtypes.bfloat16``).

    Attributes:
        flat: 1-D array of all elements, zeros at first; it begins with a cache line.
        views: a list of arrays, or a dict name -> array, in the order of ``shapes``; they share the memory
            of ``flat``.

    Raises:
        TypeError, ValueError: a shape or the dtype does not fit.

    Example:
        >>> params = FlatBuffer({"weight": (3, 4), "bias": 4})
        >>> grads = FlatBuffer({"weight": (3, 4), "bias": 4})
        >>> params.views["weight"][...] = 1.0
        >>> params.flat.shape
        (16,)
    """

    def __init__(self, shapes: Sequence[Shape] | Mapping[str, Shape], dtype: Any = np.float32) -> None:
        try:
            own = np.dtype(dtype)
        except TypeError:
            own = np.dtype(object)
        if own not in ALL_DTYPES:
            raise TypeError(f"dtype is {dtype!r}: expected {NAMES}")
        if isinstance(shapes, str) or not isinstance(shapes, Mapping | Sequence):
            raise TypeError(f"shapes is {shapes!r}: expected a sequence of shapes or a dict name -> shape")
        named = shapes if isinstance(shapes, Mapping) else dict(enumerate(shapes))
        checked = {key: _shape(shape, f"shapes[{key!r}]") for key, shape in named.items()}
        sizes = [math.prod(shape) for shape in checked.values()]
        count = sum(sizes) * own.itemsize
        self.flat = aligned(np.zeros(count + ALIGNMENT, np.uint8), count).view(own)
        views, first = {}, 0
        for (key, shape), size in zip(checked.items(), sizes, strict=True):
            views[key] = self.flat[first : first + size].reshape(shape)
            first += size
        self.views: Any = views if isinstance(shapes, Mapping) else list(views.values())

    def __reduce__(self) -> Any:  # a copy's views are of its own buffer
        named = self.views if isinstance(self.views, dict) else dict(enumerate(self.views))
        shapes = {key: view.shape for key, view in named.items()}
        return _rebuilt, (shapes if isinstance(self.views, dict) else list(shapes.values()), self.flat.copy())

    def __repr__(self) -> str:
        return f"FlatBuffer({len(self.views)} arrays, {self.flat.size:,} elements, {self.flat.dtype})"


def _rebuilt(shapes: Any, flat: np.ndarray) -> FlatBuffer:
    buffer = FlatBuffer(shapes, flat.dtype)
    buffer.flat[...] = flat
    return buffer


def _shape(shape: Any, label: str) -> tuple[int, ...]:
    try:
        extents = (
            tuple(map(operator.index, shape)) if hasattr(shape, "__iter__") else (operator.index(shape),)
        )
    except TypeError:
        raise TypeError(f"{label} is {shape!r}: expected whole numbers") from None
    if any(extent < 0 for extent in extents):
        raise ValueError(f"{label} is {shape!r}: expected extents of at least 0")
    return extents
