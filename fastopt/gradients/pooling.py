"""Bags of rows: which positions belong to each, checked, and what follows from it."""

import operator
from functools import cached_property
from typing import Any

import numpy as np

from fastopt._core import arrays
from fastopt._core.arrays import LOW_DTYPES
from fastopt._core.backend import backend_of
from fastopt._core.indices import Indices
from fastopt._core.options import is_flag
from fastopt._core.state import computed_with
from fastopt.kernels.work import Array, PooledLookup

MODES = ("sum", "mean", "max")


class Offsets:
    """Checked offsets of bags, which those of several tables may share.

    array: int64 [bags + 1], from 0 to the number of indices.
    """

    def __init__(self, array: Array) -> None:
        self.array = array
        self._bags: Array | None = None

    @cached_property
    def one_each(self) -> bool:
        """Whether each bag is known to have one index."""
        if not isinstance(self.array, np.ndarray) or self.array[-1] != self.array.size - 1:
            return False
        return bool((self.array[1:] - self.array[:-1] == 1).all())

    def bags_of(self, indices: Array) -> Array:
        """int32: the bag of each position of 1-D indices, as many as the last offset says."""
        if self._bags is None:
            self._bags = backend_of(self.array).bags_of_positions(self.array, indices, None, False, -1)
        return self._bags


class Bags:
    """Checked arguments of a pooled lookup.

    weights: one for each index, or None; padding: a row that counts for nothing, or -1.
    """

    def __init__(
        self, indices: Indices, bounds: Offsets, mode: str, weights: Array | None, padding: int
    ) -> None:
        self.indices = indices
        self.bounds = bounds
        self.mode = mode
        self.weights = weights
        self.padding = padding

    @property
    def offsets(self) -> Array:
        return self.bounds.array

    @property
    def count(self) -> int:
        return self.offsets.size - 1

    def pool(self, table: Array) -> Array:
        """[count, dim]: each bag's rows summed or averaged; rows of 16 bits are added in float32."""
        backend = backend_of(table)
        out = backend.empty((self.count, table.shape[1]), table.dtype)
        for bounds in backend.pool([self.lookup(table, out)]):
            self.indices.see(bounds)
        return out

    def lookup(self, table: Array, out: Array) -> PooledLookup:
        """What is to be written to ``out``, [count, dim]; not for "max"."""
        mean = self.mode == "mean"
        indices = self.indices.unseen.reshape(-1)
        return PooledLookup(table, indices, self.offsets, self.weights, mean, self.padding, out)

    def pool_max(self, table: Array) -> tuple[Array, Array]:
        """[count, dim]: the largest element of each bag's rows, and the position it comes from."""
        return backend_of(table).pool_max(table, self.indices.flat, self.offsets, self.padding)

    def products(self, table: Array, values: Array, dtype: np.dtype) -> Array:
        """The product of each position's row with its bag's row of ``values``, [count, dim], C-contiguous and
        of the dtypes of gradients; divided by the number of the bag's rows for a mean. Rounded to ``dtype``.
        It is the gradient of the weights."""
        backend = backend_of(table)
        without_weights = Bags(self.indices, self.bounds, self.mode, None, self.padding)
        of_positions, scales = without_weights.of_positions(computed_with(table.dtype))
        given = table, self.indices.flat, of_positions, scales, self.padding, backend.widen(values)
        products = backend.row_products(*given)
        if dtype == products.dtype:
            return products
        found = backend.empty(products.shape, dtype)
        found[...] = products
        return found

    def of_positions(self, dtype: np.dtype) -> tuple[Array, Array | None]:
        """The bag of each position, and the factor on its row, None where all are 1."""
        backend, mean = backend_of(self.offsets), self.mode == "mean"
        if self.weights is None and not mean:
            return self.bounds.bags_of(self.indices.flat), None
        scales = backend.empty(self.indices.array.size, dtype)
        scales[...] = 1 if self.weights is None else self.weights
        bags = backend.bags_of_positions(self.offsets, self.indices.flat, scales, mean, self.padding)
        return bags, scales


def checked_table(table: Any) -> Array:
    """``table``, which is to be read: of two dimensions, C-contiguous, of one of the dtypes of parameters."""
    source = arrays.array_view(table, "table", arrays.OWN)
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
    indices_label = f"{label}.indices" if label else "indices"
    indices = Indices.checked(given.indices, indices_label, rows, given.check_indices)
    return bags_of(given, label, indices, rows, weights)


def bags_of(
    given: Any, label: str, indices: Indices, rows: int | None, weights: tuple[np.dtype, ...]
) -> Bags:
    """The same for indices that are at hand."""
    prefix = f"{label}." if label else ""
    if given.mode not in MODES:
        raise ValueError(f"{prefix}mode is {given.mode!r}: expected 'sum', 'mean' or 'max'")
    offsets = _offsets(given, indices.unseen, prefix)
    factors = _weights(given, indices.unseen, weights, prefix)
    return Bags(indices, offsets, given.mode, factors, _padding(given.padding_idx, rows, prefix))


def _offsets(given: Any, indices: Array, prefix: str) -> Offsets:
    if isinstance(given.offsets, Offsets):
        return given.offsets
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
        return Offsets(backend_of(indices).regular_offsets(*indices.shape))
    if indices.ndim != 1:
        raise ValueError(
            f"{prefix}indices has shape {indices.shape} and there are offsets: expected 1-D indices, "
            "or no offsets"
        )
    offsets = arrays.array_view(given.offsets, f"{prefix}offsets")
    arrays.check_beside(offsets, f"{prefix}offsets", given.offsets, indices, f"{prefix}indices")
    if offsets.dtype not in (np.int32, np.int64):
        raise TypeError(f"{prefix}offsets has dtype {offsets.dtype}: expected int32 or int64")
    if offsets.ndim != 1:
        raise ValueError(f"{prefix}offsets has shape {offsets.shape}: expected one dimension")
    with_last = bool(given.include_last_offset)
    if with_last and not offsets.size:
        raise ValueError(
            f"the last of {prefix}offsets is missing: expected {indices.size}, the number of indices, as "
            "include_last_offset is True"
        )
    own, found = backend_of(indices).bag_offsets(offsets, indices.size, with_last, bool(given.check_indices))
    if found is not None:
        _check_offsets(found, own, indices, with_last, prefix)
    return Offsets(own)


def _check_offsets(
    found: tuple[int, int, int], own: Array, indices: Array, with_last: bool, prefix: str
) -> None:
    """Refuse offsets of which this was found (see Backend.bag_offsets)."""
    first, last, falls_at = found
    if with_last and last != indices.size:
        raise ValueError(
            f"the last of {prefix}offsets is {last}: expected {indices.size}, the number of indices, as "
            "include_last_offset is True"
        )
    if first != 0:
        # Without bags, all indices would belong to none.
        got = f"begin with {first}" if own.size > 1 else f"are empty, and there are {indices.size} indices"
        raise ValueError(f"{prefix}offsets {got}: expected the first to be 0")
    if falls_at >= 0:
        before, after = backend_of(own).to_host(own[falls_at : falls_at + 2]).tolist()
        raise ValueError(
            f"{prefix}offsets has {before} before {after}: expected numbers that do not fall, up to "
            f"{indices.size}"
        )


def check_weights(weights: Array, label: str, dtypes: tuple[np.dtype, ...]) -> None:
    """Refuse weights of other dtypes."""
    if weights.dtype not in dtypes:
        expected = " or ".join(map(str, dtypes))
        raise TypeError(f"{label} has dtype {weights.dtype}: expected {expected}")


def _weights(given: Any, indices: Array, dtypes: tuple[np.dtype, ...], prefix: str) -> Array | None:
    if given.per_sample_weights is None:
        return None
    label = f"{prefix}per_sample_weights"
    if given.mode == "max":
        raise ValueError(f"{label} is given with mode 'max': expected mode 'sum' or 'mean'")
    weights = arrays.array_view(given.per_sample_weights, label)
    arrays.check_beside(weights, label, given.per_sample_weights, indices, f"{prefix}indices")
    check_weights(weights, label, dtypes)
    if weights.shape != indices.shape:
        raise ValueError(f"{label} has shape {weights.shape}: expected {indices.shape}, that of indices")
    backend = backend_of(weights)
    return backend.widen(backend.contiguous(weights).reshape(-1))


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
