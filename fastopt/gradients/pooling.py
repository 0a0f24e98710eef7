"""Bags of rows: which positions belong to each, checked, and what follows from it."""

import operator
from typing import Any

import numpy as np

from fastopt._core import arrays
from fastopt._core.arrays import LOW_DTYPES
from fastopt._core.backend import backend_of
from fastopt._core.indices import Indices
from fastopt._core.options import is_flag

MODES = ("sum", "mean", "max")


class Bags:
    """Checked arguments of a pooled lookup.

    indices; offsets: int64 [count + 1]; weights: one for each index, or None; padding: a row that
    counts for nothing, or -1.
    """

    def __init__(
        self, indices: Indices, offsets: np.ndarray, mode: str, weights: np.ndarray | None, padding: int
    ) -> None:
        self.indices = indices
        self.offsets = offsets
        self.mode = mode
        self.weights = weights
        self.padding = padding

    @property
    def count(self) -> int:
        return self.offsets.size - 1

    def of_rows_read(self, table: np.ndarray) -> "tuple[Bags, np.ndarray]":
        """The same bags over a table that holds a row for each position, in float32, for one of 16 bits."""
        read = backend_of(table).gather(table, self.indices.flat)
        where = np.arange(len(read))
        if self.padding >= 0:
            where[self.indices.flat == self.padding] = len(read)
        alone = Indices(where, where.size + 1)
        return Bags(alone, self.offsets, self.mode, self.weights, len(read)), backend_of(read).widen(read)

    def pool(self, table: np.ndarray) -> np.ndarray:
        """[count, dim]: each bag's rows summed or averaged; rows of 16 bits are added in float32."""
        if table.dtype in LOW_DTYPES:
            bags, rows = self.of_rows_read(table)
            return bags.pool(rows).astype(table.dtype)
        mean = self.mode == "mean"
        return backend_of(table).pool(
            table, self.indices.flat, self.offsets, self.weights, mean, self.padding
        )

    def pool_max(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[count, dim]: the largest element of each bag's rows, and the position it comes from."""
        if table.dtype in LOW_DTYPES:
            bags, rows = self.of_rows_read(table)
            largest, winners = bags.pool_max(rows)
            return largest.astype(table.dtype), winners
        return backend_of(table).pool_max(table, self.indices.flat, self.offsets, self.padding)

    def of_positions(self, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray | None]:
        """The bag of each position, and the factor on its row, None where all are 1."""
        backend, mean = backend_of(self.offsets), self.mode == "mean"
        scales = None
        if self.weights is not None or mean:
            scales = backend.empty(self.indices.array.size, dtype)
            scales[:] = 1 if self.weights is None else self.weights
        bags = backend.bags_of_positions(self.offsets, self.indices.flat, scales, mean, self.padding)
        return bags, scales


def checked_table(table: Any) -> np.ndarray:
    """``table``, which is to be read: of two dimensions, C-contiguous, of one of the dtypes of parameters."""
    source = arrays.host_array(table, "table", arrays.OWN)
    arrays.check_float(source, "table", table, arrays.OWN)
    if source.ndim != 2:
        raise ValueError(f"table has shape {source.shape}: expected (rows, dim)")
    arrays.check_contiguous(source, "table", table, arrays.OWN)
    return source


def weights_dtypes(*tables: np.dtype) -> tuple[np.dtype, ...]:
    """The dtypes that the weights of a lookup may have in tables of these: the table's, or float32 for one of
    16 bits."""
    low = any(table in LOW_DTYPES for table in tables)
    return tuple(dict.fromkeys((*tables, arrays.DTYPES[0]) if low else tables))


def checked_bags(given: Any, label: str, rows: int | None, weights: tuple[np.dtype, ...]) -> Bags:
    """The arguments of a pooled lookup, attributes of ``given``, checked for a table of so many rows, or for
    one that is not known; weights: the dtypes that ``per_sample_weights`` may have."""
    prefix = f"{label}." if label else ""
    if given.mode not in MODES:
        raise ValueError(f"{prefix}mode is {given.mode!r}: expected 'sum', 'mean' or 'max'")
    indices = Indices.checked(given.indices, f"{prefix}indices", rows)
    offsets = _offsets(given, indices.array, prefix)
    factors = _weights(given, indices.array, weights, prefix)
    return Bags(indices, offsets, given.mode, factors, _padding(given.padding_idx, rows, prefix))


def _offsets(given: Any, indices: np.ndarray, prefix: str) -> np.ndarray:
    if not is_flag(given.include_last_offset):
        raise TypeError(
            f"{prefix}include_last_offset is {given.include_last_offset!r}: expected True or False"
        )
    if given.offsets is None:
        if indices.ndim != 2:
            raise ValueError(
                f"{prefix}offsets is None but indices has shape {indices.shape}: expected 2-D indices, "
                "a bag a row, or offsets"
            )
        if given.include_last_offset:
            raise ValueError(f"{prefix}include_last_offset is True but offsets is None: expected offsets")
        bags, width = indices.shape
        return np.arange(bags + 1, dtype=np.int64) * width
    if indices.ndim != 1:
        raise ValueError(
            f"{prefix}indices has shape {indices.shape} and there are offsets: expected 1-D indices, "
            "or no offsets"
        )
    offsets = arrays.host_array(given.offsets, f"{prefix}offsets")
    if offsets.dtype not in (np.int32, np.int64):
        raise TypeError(f"{prefix}offsets has dtype {offsets.dtype}: expected int32 or int64")
    if offsets.ndim != 1:
        raise ValueError(f"{prefix}offsets has shape {offsets.shape}: expected one dimension")
    if given.include_last_offset:
        own = offsets.astype(np.int64)
        if not own.size or own[-1] != indices.size:
            last = own[-1] if own.size else "missing"
            raise ValueError(
                f"the last of {prefix}offsets is {last}: expected {indices.size}, the number of indices, "
                "as include_last_offset is True"
            )
    else:
        own = np.empty(offsets.size + 1, np.int64)
        own[:-1] = offsets
        own[-1] = indices.size
    if own[0] != 0:
        # Without bags, all indices would belong to none.
        got = f"begin with {own[0]}" if own.size > 1 else f"are empty, and there are {indices.size} indices"
        raise ValueError(f"{prefix}offsets {got}: expected the first to be 0")
    if (own[1:] < own[:-1]).any():
        at = int(np.argmax(own[1:] < own[:-1]))
        raise ValueError(
            f"{prefix}offsets has {own[at]} before {own[at + 1]}: expected numbers that do not fall, "
            f"up to {indices.size}"
        )
    return own


def check_weights(weights: np.ndarray, label: str, dtypes: tuple[np.dtype, ...]) -> None:
    """Refuse weights of other dtypes."""
    if weights.dtype not in dtypes:
        expected = " or ".join(map(str, dtypes))
        raise TypeError(f"{label} has dtype {weights.dtype}: expected {expected}")


def _weights(given: Any, indices: np.ndarray, dtypes: tuple[np.dtype, ...], prefix: str) -> np.ndarray | None:
    if given.per_sample_weights is None:
        return None
    label = f"{prefix}per_sample_weights"
    if given.mode == "max":
        raise ValueError(f"{label} is given with mode 'max': expected mode 'sum' or 'mean'")
    weights = arrays.host_array(given.per_sample_weights, label)
    check_weights(weights, label, dtypes)
    if weights.shape != indices.shape:
        raise ValueError(f"{label} has shape {weights.shape}: expected {indices.shape}, that of indices")
    return backend_of(weights).widen(np.ascontiguousarray(weights).reshape(-1))


def _padding(padding_idx: Any, rows: int | None, prefix: str) -> int:
    if padding_idx is None:
        return -1
    try:
        padding = operator.index(padding_idx)
    except TypeError:
        raise TypeError(f"{prefix}padding_idx is {padding_idx!r}: expected a whole number or None") from None
    if rows is None:
        if padding < 0:
            raise ValueError(f"{prefix}padding_idx is {padding}: expected at least 0 where no table is given")
        return padding
    if not -rows <= padding < rows:
        raise ValueError(
            f"{prefix}padding_idx is {padding}: expected a row of the table, from {-rows} to {rows - 1}"
        )
    return padding % rows
