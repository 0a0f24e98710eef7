"""Norms and clipping of gradients."""

import math
import numbers
from typing import Any

import numpy as np

from fastopt import arrays
from fastopt.dense import Batch
from fastopt.gradients import (
    BagGradient,
    IndexedSlices,
    RowGradient,
    checked_rows,
    leaves,
    values_of,
)
from fastopt.kernels.cpu import norms
from fastopt.kernels.cpu.rows import coalesce
from fastopt.kernels.element import NORM_EPS
from fastopt.launch import sums_of_squares
from fastopt.plan import find_segments_of

SMALL, LARGE = 1e-140, 1e150  # norms beyond which squares lose digits or overflow


def norm_of(batch: Batch, rows: list[RowGradient]) -> float:
    """L2 norm over all gradients, rows named several times counted as their sum."""
    norm = _scaled_norm(batch, rows, 1.0)
    # squares of float64 may have left its range; those of smaller types never do
    if batch.has_double or any(gradient.values.dtype == np.float64 for gradient in rows):
        if norm < SMALL:
            norm = _scaled_norm(batch, rows, 2.0**540)
        elif norm > LARGE:
            norm = _scaled_norm(batch, rows, 2.0**-540)
    return norm


def _scaled_norm(batch: Batch, rows: list[RowGradient], scale: float) -> float:
    total = batch.sum_of_squares(scale)
    alike: dict[np.dtype, list[RowGradient]] = {}
    for gradient in rows:
        if gradient.values.size and gradient.indices.array.size:
            alike.setdefault(gradient.values.dtype, []).append(gradient)
    return math.sqrt(total + sum(sums_of_squares(many, scale) for many in alike.values())) / scale


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of norm ``norm`` are multiplied by; NaN for a NaN norm, as in torch."""
    factor = max_norm / (norm + NORM_EPS)
    return 1.0 if factor > 1.0 else factor


def check_limit(value: Any, name: str) -> float:
    """``value`` as a float that is not negative."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}: expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = -math.inf
    if not number >= 0:
        raise ValueError(f"{name} is {value!r}: expected at least 0, in the range of float64")
    return number


def grad_norm(grads: Any) -> float:
    """L2 norm of all gradients together, computed in float64.

    Args:
        grads: an array, ``IndexedSlices``, ``BagGradient``, or nested lists and dicts of them;
            ``None`` is skipped. Rows named several times count as their sum. Of a parameter's dtype,
            C-contiguous.

    Returns:
        The norm: NaN or infinite where a gradient is. The same bits for any number of threads.
    """
    return _norm(_prepared(grads, writable=False))


def clip_grad_norm(grads: Any, max_norm: float) -> float:
    """Scale all gradients in place by ``min(1, max_norm / (norm + 1e-6))``.

    The semantics of ``torch.nn.utils.clip_grad_norm_``. ``step(grads, clip_norm=...)`` does the
    same without writing the gradients.

    Args:
        grads: as for :func:`grad_norm`, and writable.
        max_norm: at least 0.

    Returns:
        The norm before clipping.
    """
    max_norm = check_limit(max_norm, "max_norm")
    prepared = _prepared(grads, writable=True)
    norm = _norm(prepared)
    factor = clip_factor(norm, max_norm)
    if factor != 1.0:
        for _, array, _ in prepared:
            if array.dtype in arrays.LOW_DTYPES:
                np.multiply(array, np.float32(factor), out=array, casting="unsafe")
            else:
                norms.scale_in_place(array.size, array.reshape(-1), array.dtype.type(factor))
    return norm


def clip_grad_value(grads: Any, clip_value: float) -> None:
    """Clip every element of the gradients in place to [-clip_value, clip_value].

    The semantics of ``torch.nn.utils.clip_grad_value_``. Rows that ``IndexedSlices`` name several
    times are summed first: the sum takes the first place, zeros the others, so that the row's
    gradient is what is clipped.

    Args:
        grads: as for :func:`grad_norm`, and writable.
        clip_value: at least 0.

    Raises:
        ValueError: there is a ``BagGradient``, which has no elements of its own to clip.
    """
    clip_value = check_limit(clip_value, "clip_value")
    prepared = _prepared(grads, writable=True)
    for gradient, array, label in prepared:
        if gradient is not None and gradient.bags is not None:
            raise ValueError(f"{label} belongs to a BagGradient, whose rows can't be clipped by value")
        if gradient is not None and array.dtype in arrays.LOW_DTYPES:
            raise TypeError(
                f"{label} has dtype {array.dtype}, in which sums of rows can't be stored: expected "
                "float32 or float64, or use step(clip_value=...)"
            )
    for gradient, array, _ in prepared:
        if gradient is not None:
            segments = gradient.indices.segments
            coalesce(array.size, gradient.values, segments.order, segments.starts, segments.first_position)
        if array.dtype in arrays.LOW_DTYPES:
            np.clip(array, array.dtype.type(-clip_value), array.dtype.type(clip_value), out=array)
        else:
            norms.clip_in_place(array.size, array.reshape(-1), array.dtype.type(clip_value))


def _norm(prepared: "list[_Prepared]") -> float:
    """The norm of all."""
    whole = [array for gradient, array, _ in prepared if gradient is None]
    batch = Batch(
        np.zeros(len(whole), np.int8), [a.dtype for a in whole], np.array([a.size for a in whole], np.int64)
    )
    batch.take_over(np.array([arrays.address(array) for array in whole], np.int64))
    return norm_of(batch, [gradient for gradient, _, _ in prepared if gradient is not None])


_Prepared = tuple[RowGradient | None, np.ndarray, str]


def _prepared(grads: Any, writable: bool) -> list[_Prepared]:
    """Every gradient checked: what it is if it is sparse, its array and label."""
    found: list[_Prepared] = []
    for value, label in leaves(grads, "grads"):
        gradient = None
        if isinstance(value, IndexedSlices | BagGradient):
            gradient = checked_rows(value, label, None)
            if gradient.bags is not None and gradient.bags.mode == "max":
                raise ValueError(
                    f"{label}.mode is 'max', whose gradient depends on the table: use step(clip_norm=...)"
                )
            value, label = values_of(value, label)
        array = arrays.host_array(value, label)
        arrays.check_float(array, label)
        arrays.check_contiguous(array, label)
        if writable and not array.flags.writeable:
            raise ValueError(
                f"{label} is read-only: expected a gradient to change in place, pass a copy of it"
            )
        found.append((gradient, array, label))
    find_segments_of([gradient.indices for gradient, _, _ in found if gradient is not None])
    if writable:
        arrays.check_apart([(array, label) for _, array, label in found])
    return found
