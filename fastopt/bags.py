"""Bags of rows: which positions belong to each, checked, and what follows from it."""

import operator
from typing import Any

import numpy as np

from fastopt import arrays
from fastopt.kernels.cpu import bags as kernels
from fastopt.kernels.cpu.memory import empty
from fastopt.kernels.cpu.rows import gather
from fastopt.plan import Indices
from fastopt.precision import LOW, widened

MODES = ("sum", "mean", "max")
NO_WEIGHTS = {np.dtype(dtype): np.empty(0, dtype) for dtype in (np.float32, np.float64)}


def gathered(table: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """[number of indices, dim]: the rows of ``table`` that ``indices`` name."""
    out = empty((indices.size, table.shape[1]), table.dtype)
    if table.dtype in LOW:  # no dtype that Numba knows
        gather(out.size, table.view(np.uint16), indices, out.view(np.uint16))
    else:
        gather(out.size, table, indices, out)
    return out


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
        read = gathered(table, self.indices.flat)
        where = np.arange(len(read))
        if self.padding >= 0:
            where[self.indices.flat == self.padding] = len(read)
        alone = Bags(Indices.of_rows(where), self.offsets, self.mode, self.weights, len(read))
        return alone, widened(read)

    def pool(self, table: np.ndarray) -> np.ndarray:
        """[count, dim]: each bag's rows summed or averaged; rows of 16 bits are added in float32."""
        if table.dtype in LOW:
            bags, rows = self.of_rows_read(table)
            return bags.pool(rows).astype(table.dtype)
        out = empty((self.count, table.shape[1]), table.dtype)
        weights = NO_WEIGHTS[table.dtype] if self.weights is None else self.weights
        kernels.pool(
            self.indices.array.size * table.shape[1],
            *(table, self.indices.flat, self.offsets, weights, self.mode == "mean", self.padding, out),
        )
        return out

    def pool_max(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[count, dim]: the largest element of each bag's rows, and the position it comes from."""
        if table.dtype in LOW:
            bags, rows = self.of_rows_read(table)
            largest, winners = bags.pool_max(rows)
            return largest.astype(table.dtype), winners
        out = empty((self.count, table.shape[1]), table.dtype)
        winners = empty(out.shape, np.int32)
        work = self.indices.array.size * table.shape[1]
        kernels.pool_max(work, table, self.indices.flat, self.offsets, self.padding, out, winners)
        return out, winners

    def of_positions(self, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray | None]:
        """The bag of each position, and the factor on its row, None where all are 1."""
        size = self.indices.array.size
        bags = empty(size, np.int32)
        mean = self.mode == "mean"
        scales = None
        if self.weights is not None or mean:
            scales = empty(size, dtype)
            scales[:] = 1 if self.weights is None else self.weights
        given = NO_WEIGHTS[dtype] if scales is None else scales
        kernels.bags_of_positions(size, self.offsets, self.indices.flat, self.padding, mean, bags, given)
        return bags, scales


def checked_bags(given: Any, label: str, rows: int | None, dtype: np.dtype) -> Bags:
    """The arguments of a pooled lookup, attributes of ``given``, checked for a table of so many rows."""
    prefix = f"{label}." if label else ""
    if given.mode not in MODES:
        raise ValueError(f"{prefix}mode is {given.mode!r}: expected 'sum', 'mean' or 'max'")
    indices = Indices(given.indices, f"{prefix}indices", rows)
    offsets = _offsets(given, indices.array, prefix)
    weights = _weights(given, indices.array, dtype, prefix)
    return Bags(indices, offsets, given.mode, weights, _padding(given.padding_idx, rows, prefix))


def _offsets(given: Any, indices: np.ndarray, prefix: str) -> np.ndarray:
    if not isinstance(given.include_last_offset, bool):
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
        raise TypeError(
            f"{prefix}offsets has dtype {offsets.dtype}: expected int32 or int64, "
            "pass offsets.astype(np.int64)"
        )
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
        # without bags, all indices would belong to none
        got = f"begin with {own[0]}" if own.size > 1 else f"are empty, and there are {indices.size} indices"
        raise ValueError(f"{prefix}offsets {got}: expected the first to be 0")
    if (own[1:] < own[:-1]).any():
        at = int(np.argmax(own[1:] < own[:-1]))
        raise ValueError(
            f"{prefix}offsets has {own[at]} before {own[at + 1]}: expected numbers that do not fall, "
            f"up to {indices.size}"
        )
    return own


def _weights(given: Any, indices: np.ndarray, dtype: np.dtype, prefix: str) -> np.ndarray | None:
    if given.per_sample_weights is None:
        return None
    label = f"{prefix}per_sample_weights"
    if given.mode == "max":
        raise ValueError(f"{label} is given with mode 'max': expected mode 'sum' or 'mean'")
    weights = arrays.host_array(given.per_sample_weights, label)
    if weights.dtype != dtype:
        raise TypeError(f"{label} has dtype {weights.dtype}: expected {dtype}, that of the table")
    if weights.shape != indices.shape:
        raise ValueError(f"{label} has shape {weights.shape}: expected {indices.shape}, that of indices")
    return widened(np.ascontiguousarray(weights).reshape(-1))


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
