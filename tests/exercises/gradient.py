"""A kind of gradient in one file: rows of values for rows of the parameter that follow one another."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastopt import SparseGradient
from fastopt._core import arrays
from fastopt._core.indices import Indices
from fastopt.gradients.rows import RowGradient


@dataclass(frozen=True, eq=False)
class RowRange(SparseGradient):
    """``values[k]`` belongs to row ``first + k``."""

    first: int
    values: Any

    def numbers(self, label):
        return self.values, f"{label}.values"

    def checked(self, label, rows):
        values = arrays.array_view(self.values, f"{label}.values")
        last = self.first + len(values)
        if self.first < 0 or (rows is not None and last > rows):
            raise ValueError(f"{label} has the rows {self.first} to {last}: expected rows of the table")
        return RowGradient(values, Indices(np.arange(self.first, last), last if rows is None else rows))
