"""The L2 norm over all gradients, dense and sparse.

Where all of them lie on one device it is not waited for: the device finds it, and the factor that clips
gradients to it, in time for the updates that follow.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from fastopt._core.arrays import DTYPES
from fastopt._core.backend import Backend, Norm, Squares, backend_of
from fastopt._core.state import computed_with, gradient_format
from fastopt.gradients.rows import RowGradient
from fastopt.kernels.element import NORM_EPS
from fastopt.kernels.magnitude import unit_of
from fastopt.kernels.work import TableGradient

Placed = list[tuple[Squares, np.ndarray]]  # sums of squares, with the addresses of what is summed up
Tables = dict[tuple[Backend, np.dtype], list[TableGradient]]  # those that are summed up together


class DenseSquares:
    """Sums of squares of dense gradients of any dtypes.

    Args:
        gradients: of each where it lies, its dtype and its size.

    Attributes:
        backends: where they lie. has_double: whether some are float64.
    """

    def __init__(self, gradients: Iterable[tuple[Backend, np.dtype, int]]) -> None:
        alike: dict[tuple[Backend, np.dtype], dict[int, int]] = {}
        for i, (backend, dtype, size) in enumerate(gradients):
            alike.setdefault((backend, dtype), {})[i] = size
        self.backends = {backend for backend, _ in alike}
        self.has_double = any(dtype == DTYPES[1] for _, dtype in alike)
        self._parts = [
            (
                backend.Squares(computed_with(dtype), gradient_format(dtype), [*own.values()]),
                np.array([*own]),
            )
            for (backend, dtype), own in alike.items()
        ]

    def placed(self, addresses: np.ndarray) -> Placed:
        """Its parts, of gradients that lie at ``addresses``."""
        return [(squares, addresses[own]) for squares, own in self._parts]


def norm_of(dense: DenseSquares, addresses: np.ndarray, rows: Sequence[RowGradient]) -> float:
    """L2 norm over dense gradients and gradients by rows, rows named several times counted as their sum;
    waits for it."""
    return known(unread_norm(dense, addresses, rows))


def known(norm: float | Norm) -> float:
    """A norm as a number; waits for one that is on its way."""
    return norm if isinstance(norm, float) else norm.value()


def unread_norm(dense: DenseSquares, addresses: np.ndarray, rows: Sequence[RowGradient]) -> float | Norm:
    """The same norm, on its way if all gradients lie with one backend that makes it without a wait."""
    placed, tables = dense.placed(addresses), _tables(rows) if rows else {}
    backends = dense.backends.union([backend for backend, _ in tables]) if tables else dense.backends
    if len(backends) == 1:
        (backend,) = backends
        norm = backend.norm(placed, [table for own in tables.values() for table in own])
        if norm is not None:
            return norm
    total, unit = _squares(placed, tables, 1.0), 1.0
    # Squares of float64 may have left its range; those of smaller types never do.
    if dense.has_double or (tables and any(dtype == DTYPES[1] for _, dtype in tables)):
        unit = unit_of(total)
        if unit != 1.0:
            total = _squares(placed, tables, 1.0 / unit)
    return math.sqrt(total) * unit


def _tables(rows: Sequence[RowGradient]) -> Tables:
    """Those of gradients by rows that are not empty."""
    alike: Tables = {}
    for gradient in rows:
        if gradient.values.size and gradient.indices.array.size:
            key = backend_of(gradient.values), gradient.values.dtype
            alike.setdefault(key, []).append(gradient.by_row())
    return alike


def _squares(placed: Placed, tables: Tables, scale: float) -> float:
    """The sum of all squares, times ``scale**2``."""
    total = sum([squares.sum(addresses, scale) for squares, addresses in placed])
    return total + sum([backend.sum_squares_rows(own, scale) for (backend, _), own in tables.items()])


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of norm ``norm`` are multiplied by; NaN for a NaN norm, as in torch."""
    factor = max_norm / (norm + NORM_EPS)
    return 1.0 if factor > 1.0 else factor
