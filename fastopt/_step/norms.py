"""The L2 norm over all gradients, dense and sparse."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from fastopt._core.arrays import DTYPES
from fastopt._core.backend import Backend, backend_of
from fastopt._core.state import computed_with, gradient_format
from fastopt.gradients.protocol import RowGradient
from fastopt.kernels.element import NORM_EPS
from fastopt.kernels.magnitude import unit_of
from fastopt.kernels.work import TableGradient


class DenseSquares:
    """Sums of squares of dense gradients of any dtypes.

    Args:
        gradients: of each where it lies, its dtype and its size.
    """

    def __init__(self, gradients: Iterable[tuple[Backend, np.dtype, int]]) -> None:
        alike: dict[tuple[Backend, np.dtype], dict[int, int]] = {}
        for i, (backend, dtype, size) in enumerate(gradients):
            alike.setdefault((backend, dtype), {})[i] = size
        self.has_double = any(dtype == DTYPES[1] for _, dtype in alike)
        self._parts = [
            (
                backend.Squares(computed_with(dtype), gradient_format(dtype), [*own.values()]),
                np.array([*own]),
            )
            for (backend, dtype), own in alike.items()
        ]

    def sum(self, addresses: np.ndarray, scale: float) -> float:
        """Of all gradients, which lie at ``addresses``, times ``scale**2``."""
        return sum(squares.sum(addresses[own], scale) for squares, own in self._parts)


def norm_of(dense: DenseSquares, addresses: np.ndarray, rows: Sequence[RowGradient]) -> float:
    """L2 norm over dense gradients and gradients by rows, rows named several times counted as their sum."""
    total, unit = _squares(dense, addresses, rows, 1.0), 1.0
    # Squares of float64 may have left its range; those of smaller types never do.
    if dense.has_double or any(gradient.values.dtype == np.float64 for gradient in rows):
        unit = unit_of(total)
        if unit != 1.0:
            total = _squares(dense, addresses, rows, 1.0 / unit)
    return math.sqrt(total) * unit


def _squares(dense: DenseSquares, addresses: np.ndarray, rows: Sequence[RowGradient], scale: float) -> float:
    """Their sum, times ``scale**2``."""
    total = dense.sum(addresses, scale)
    alike: dict[tuple[Backend, np.dtype], list[TableGradient]] = {}
    for gradient in rows:
        if gradient.values.size and gradient.indices.array.size:
            key = backend_of(gradient.values), gradient.values.dtype
            alike.setdefault(key, []).append(gradient.by_row())
    sums = (backend.sum_squares_rows(own, scale) for (backend, _), own in alike.items())
    return total + sum(sums)


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of norm ``norm`` are multiplied by; NaN for a NaN norm, as in torch."""
    factor = max_norm / (norm + NORM_EPS)
    return 1.0 if factor > 1.0 else factor
