"""Opening a table, and creating one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fastopt._core import arrays
from fastopt._core.files import replacing, sync
from fastopt.tables.contents import write_beside
from fastopt.tables.folder import META, WEIGHTS, Folder, Paths
from fastopt.tables.mapped import fill, fill_by
from fastopt.tables.meta import Meta, Slot, check_size, checked_dtype, checked_sizes
from fastopt.tables.sums import Sums, filling
from fastopt.tables.table import Table


def open_table(
    path: Any,
    rows: int | None = None,
    dim: int | None = None,
    dtype: DTypeLike | None = None,
    *,
    init: Callable[[int, int], Any] | None = None,
) -> Table:
    """Open the table in the folder ``path``, or create it.

    Args:
        path: the folder. A new one is built beside its place and renamed, so that a crash leaves none.
        rows: rows of the table, at least 1; needed for a new one.
        dim: elements of a row, at least 1; needed for a new one.
        dtype: float32, the default of a new table, or float64.
        init: ``init(first, last)`` returns the rows from first to last of a new table, an array of shape
            [last - first, dim]; it is called for blocks of about 8 MiB. Without it all weights are 0, and
            the files take no space on the disk where nothing was written.

    Returns:
        The table as at its last flush.

    Raises:
        ValueError, TypeError: an argument does not fit, or differs from what is stored; or the folder holds
            no table, or a file in it is not as it was written, or no regular file: nothing has changed then.
        BlockingIOError: the table is open already, here or in another process.
        RuntimeError: the table was in use when the machine stopped, or its undo log is damaged, cut short or
            missing; its content can't be trusted.
        OSError: it can't be read or written.
    """
    for name, size in (("rows", rows), ("dim", dim)):
        if size is not None:
            check_size(size, name)
    dtype = None if dtype is None else checked_dtype(dtype, "dtype")
    target = Path(os.path.realpath(path))
    if not target.exists():
        if rows is None or dim is None:
            raise ValueError(
                f"rows is {rows} and dim is {dim}: expected both, for there is no table {target} yet"
            )
        _create(target, checked_sizes(int(rows), int(dim), dtype or arrays.DTYPES[0]), init)
    if not os.path.lexists(target / META):
        raise ValueError(f"{target} holds no table: expected a folder that open_table made, or none yet")
    folder = Folder(target)
    try:
        meta = Meta.read(target / META)
        for name, got in (("rows", rows), ("dim", dim), ("dtype", dtype)):
            stored = getattr(meta, name)
            if got is not None and got != stored:
                raise ValueError(
                    f"{name} is {got} but {target} holds {meta.rows} rows of {meta.dim} {meta.dtype}: "
                    f"pass {stored}, or no {name}"
                )
        return Table(folder, meta)
    except BaseException:
        folder.release()
        raise


def _create(target: Path, weights: Slot, init: Callable[[int, int], Any] | None) -> None:
    rows, dim = weights.shape
    sums = Sums.zeros(rows, 1)
    with replacing(target) as folder:
        folder.mkdir()  # with the permissions of a new folder; the one around it is private
        path = folder / WEIGHTS
        if init is None:
            fill(path, weights, 0.0)
        else:
            fill_by(path, weights, filling(sums, lambda first, last: _initial(init, first, last, weights)))
        sync(path)
        meta = write_beside(Paths(folder), Meta(rows, dim, weights.dtype, {}, 0, None), sums)
        meta.write(folder / META)


def _initial(init: Callable[[int, int], Any], first: int, last: int, weights: Slot) -> np.ndarray:
    """The rows that ``init`` returns, checked, in the dtype of the table."""
    label, shape, dtype = f"init({first}, {last})", (last - first, weights.shape[1]), weights.dtype
    block = arrays.host_array(init(first, last), label)
    if block.shape != shape:
        raise ValueError(f"{label} has shape {block.shape}: expected {shape}")
    if not np.can_cast(block.dtype, dtype, "same_kind"):
        raise TypeError(f"{label} has dtype {block.dtype}: expected {dtype}")
    with np.errstate(over="ignore"):
        block = np.ascontiguousarray(block, dtype)
    if not np.isfinite(block).all():
        raise ValueError(f"{label} holds NaN or infinity in {dtype}: expected finite numbers")
    return block
