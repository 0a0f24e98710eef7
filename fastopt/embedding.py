"""Reading rows of embedding tables, one by one or pooled."""

import math
from types import SimpleNamespace
from typing import Any, Protocol

from fastopt._core import arrays
from fastopt._core.backend import backend_of
from fastopt._core.indices import Indices
from fastopt._core.options import check_limit
from fastopt.gradients.pooling import bags_of, checked_table, weights_dtypes
from fastopt.kernels.work import Array


class CatchesUp(Protocol):
    """An optimizer, as lookups see it."""

    def catch_up(self, table: Any, indices: Any) -> None:
        """Bring the rows of ``table`` that ``indices`` name up to date."""


def embedding(
    table: Any,
    indices: Any,
    *,
    max_norm: float | None = None,
    optimizer: CatchesUp | None = None,
    check_indices: bool = True,
) -> Any:
    """The rows of ``table`` that ``indices`` name, as ``torch.nn.functional.embedding``.

    Args:
        table: float32, float64, float16 or bfloat16 array of shape (rows, dim), C-contiguous: of NumPy or
            torch, a CUDA array, or a :class:`fastopt.Table`.
        indices: int32 or int64 array of any shape, each in [0, rows), where the table lies, or an
            :class:`fastopt.IndexPlan` of them.
        max_norm: first scale those of the rows named whose L2 norm is larger down to it, in place,
            as ``torch.nn.Embedding(max_norm=)`` does.
        optimizer: one with ``rows="dense"`` that updates ``table``: first bring the rows named up
            to date, in place.
        check_indices: False leaves out the check of indices on a CUDA device, for which the host waits:
            lookups of those out of range give zeros. On the CPU they are checked all the same.

    Returns:
        A new array of shape ``indices.shape + (dim,)`` and the table's dtype, where the table lies: a tensor
        for one of torch, and else one of NumPy, or of a CUDA device, which offers the CUDA array interface
        and DLPack, so that ``cupy.asarray`` takes it without a copy. Autograd knows nothing of it.

    Raises:
        ValueError: an index out of range, a table that is not 2-D or not contiguous.
        TypeError: other dtypes.
    """
    source = _table(table, max_norm is not None)
    where = Indices.checked(indices, "indices", source.shape[0], check_indices)
    arrays.check_beside(where.array, "indices", indices, source, "table")
    _make_ready(table, source, where, max_norm, optimizer)
    found = backend_of(source).gather(source, where.flat).reshape(*where.array.shape, source.shape[1])
    return arrays.in_kind(found, table)


def embedding_bag(
    table: Any,
    indices: Any,
    offsets: Any = None,
    *,
    mode: str,
    per_sample_weights: Any = None,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    max_norm: float | None = None,
    optimizer: CatchesUp | None = None,
    check_indices: bool = True,
) -> Any:
    """Rows of ``table`` pooled by bags, as ``torch.nn.functional.embedding_bag``.

    Args:
        table: float32, float64, float16 or bfloat16 array of shape (rows, dim), C-contiguous: of NumPy or
            torch, a CUDA array, or a :class:`fastopt.Table`.
        indices: int32 or int64 array, each in [0, rows), or an :class:`fastopt.IndexPlan` of them;
            2-D, a bag in each row, or 1-D with ``offsets``.
        offsets: int32 or int64 array, where each bag begins in ``indices``: the first 0, none
            smaller than the one before.
        mode: "sum", "mean" or "max"; an empty bag gives zeros. There is no default: that of
            torch's function is "mean", that of FBGEMM "sum".
        per_sample_weights: a factor for each index, of the shape of ``indices`` and the table's
            dtype, or float32 for a table of 16 bits; for "sum" and, other than in torch, for "mean",
            which divides by the number of rows all the same, as FBGEMM does.
        padding_idx: a row that counts for nothing; may be negative, as in Python.
        include_last_offset: ``offsets`` ends with the number of indices.
        max_norm, optimizer: as for :func:`embedding`.
        check_indices: as for :func:`embedding`; of offsets too.

    Returns:
        A new array of shape (bags, dim) and the table's dtype, as that of :func:`embedding`. The rows of a
        bag are added in the order of their indices.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing has changed then.
    """
    source = _table(table, max_norm is not None)
    given = SimpleNamespace(
        indices=indices,
        offsets=offsets,
        mode=mode,
        per_sample_weights=per_sample_weights,
        padding_idx=padding_idx,
        include_last_offset=include_last_offset,
        check_indices=check_indices,
    )
    own = Indices.unchecked(indices, "indices", source.shape[0], check_indices)
    of_weights = () if per_sample_weights is None else weights_dtypes(source.dtype)
    bags = bags_of(given, "", own, source.shape[0], of_weights)
    arrays.check_beside(own.unseen, "indices", indices, source, "table")
    _make_ready(table, source, bags.indices, max_norm, optimizer)
    return arrays.in_kind(bags.pool_max(source)[0] if mode == "max" else bags.pool(source), table)


def _table(table: Any, written: bool) -> Array:
    source = checked_table(table)
    if written and source.dtype in arrays.LOW_DTYPES:
        raise TypeError(
            f"table has dtype {source.dtype}, whose rows can't be scaled to max_norm: expected float32 or "
            "float64"
        )
    if written and not source.flags.writeable:
        raise ValueError("table is read-only: expected one whose rows can be scaled to max_norm")
    return source


def _make_ready(
    table: Any, source: Array, indices: Indices, max_norm: float | None, optimizer: CatchesUp | None
) -> None:
    """Do to the rows named what must be done before they are read."""
    if max_norm is not None:
        max_norm = check_limit(max_norm, "max_norm")
    if optimizer is not None:
        if not hasattr(optimizer, "catch_up"):
            raise TypeError(f"optimizer is {optimizer!r}: expected one of fastopt's")
        optimizer.catch_up(table, indices)
    if max_norm is not None and not math.isinf(max_norm):
        segments = indices.segments
        arrays.before_writing(table, segments)
        backend_of(source).limit_norms(source, segments, max_norm)
