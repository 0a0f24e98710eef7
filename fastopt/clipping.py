"""Norms and clipping of gradients."""

import math
import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np

from fastopt import arrays
from fastopt.gradients import (
    BagGradient,
    DenseGradient,
    IndexedSlices,
    RowGradient,
    checked_rows,
    leaves,
    values_of,
)
from fastopt.kernels.cpu import norms
from fastopt.kernels.cpu.rows import coalesce
from fastopt.kernels.elements import NORM_EPS
from fastopt.launch import sums_of_squares
from fastopt.plan import group_all

SMALL, LARGE = 1e-140, 1e150  # norms beyond which squares lose digits or overflow


def total_norm(gradients: Iterable[DenseGradient | RowGradient]) -> float:
    """L2 norm over all gradients, rows named several times counted as their sum."""
    gradients = list(gradients)
    norm = _scaled_norm(gradients, 1.0)
    # squares of float64 may have left its range; those of float32 never do
    if any(gradient.values.dtype == np.float64 for gradient in gradients):
        if norm < SMALL:
            norm = _scaled_norm(gradients, 2.0**540)
        elif norm > LARGE:
            norm = _scaled_norm(gradients, 2.0**-540)
    return norm


def _scaled_norm(gradients: list[DenseGradient | RowGradient], scale: float) -> float:
    total = 0.0
    sparse: dict[np.dtype, list[RowGradient]] = {}
    for gradient in gradients:
        if not gradient.values.size:
            continue
        if isinstance(gradient, DenseGradient):
            total += _sum_squares(gradient.values, scale)
        elif gradient.indices.array.size:
            sparse.setdefault(gradient.values.dtype, []).append(gradient)
    return math.sqrt(total + sum(sums_of_squares(many, scale) for many in sparse.values())) / scale


def _sum_squares(values: np.ndarray, scale: float) -> float:
    partials = np.empty(-(-values.size // norms.BLOCK))
    norms.sum_squares(values.size, values, scale, partials)
    return float(partials.sum())


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
            ``None`` is skipped. Rows named several times count as their sum. float32 or float64,
            C-contiguous.

    Returns:
        The norm: NaN or infinite where a gradient is. The same bits for any number of threads.
    """
    return total_norm(gradient for gradient, _, _ in _prepared(grads, writable=False))


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
    norm = total_norm(gradient for gradient, _, _ in prepared)
    factor = clip_factor(norm, max_norm)
    if factor != 1.0:
        for gradient, _, _ in prepared:
            flat = gradient.values.reshape(-1)
            norms.scale_in_place(flat.size, flat, flat.dtype.type(factor))
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
    for gradient, _, label in prepared:
        if isinstance(gradient, RowGradient) and gradient.bags is not None:
            raise ValueError(f"{label} belongs to a BagGradient, whose rows can't be clipped by value")
    for gradient, _, _ in prepared:
        flat = gradient.values.reshape(-1)
        if isinstance(gradient, RowGradient):
            groups = gradient.indices.groups
            coalesce(flat.size, gradient.values, groups.order, groups.starts, groups.first_position)
        norms.clip_in_place(flat.size, flat, flat.dtype.type(clip_value))


def _prepared(grads: Any, writable: bool) -> list[tuple[DenseGradient | RowGradient, np.ndarray, str]]:
    """Every gradient checked, with its array and label."""
    found: list[tuple[DenseGradient | RowGradient, np.ndarray, str]] = []
    for value, label in leaves(grads, "grads"):
        if isinstance(value, IndexedSlices | BagGradient):
            gradient = checked_rows(value, label, None)
            if gradient.bags is not None and gradient.bags.mode == "max":
                raise ValueError(
                    f"{label}.mode is 'max', whose gradient depends on the table: use step(clip_norm=...)"
                )
            found.append((gradient, gradient.values, values_of(value, label)[1]))
        else:
            array = arrays.host_array(value, label)
            arrays.check_float(array, label)
            arrays.check_contiguous(array, label)
            found.append((DenseGradient(array.reshape(-1)), array, label))
        if writable and not found[-1][1].flags.writeable:
            raise ValueError(
                f"{found[-1][2]} is read-only: expected a gradient to change in place, pass a copy of it"
            )
    group_all([gradient.indices for gradient, _, _ in found if isinstance(gradient, RowGradient)])
    if writable:
        arrays.check_apart([(array, label) for _, array, label in found], [])
    return found
