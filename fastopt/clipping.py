"""Norms and clipping of gradients."""

from typing import Any, NamedTuple

import numpy as np

from fastopt._core import arrays
from fastopt._core.backend import backend_of
from fastopt._core.indices import sort_together
from fastopt._core.options import check_limit
from fastopt._core.structure import leaves
from fastopt._core.versions import written
from fastopt._step.norms import DenseSquares, clip_factor, norm_of
from fastopt.gradients.given import as_gradient
from fastopt.gradients.protocol import SparseGradient, numbers_of
from fastopt.gradients.rows import RowGradient
from fastopt.kernels.work import Array


def grad_norm(grads: Any) -> float:
    """L2 norm of all gradients together, computed in float64.

    Args:
        grads: an array, ``IndexedSlices``, ``BagGradient``, or nested lists, tuples and dicts of them;
            ``None`` is skipped. Rows named several times count as their sum, within one gradient: several of
            one parameter are to be given as their sum, ``a + b``, since a list of them is taken for those of
            as many parameters. Of a parameter's dtype, C-contiguous.

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
        _written(prepared)
        for _, numbers in prepared:
            for one in numbers:
                backend_of(one.array).scale(one.array, factor)
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
        ValueError: there is a ``BagGradient``, or a sum of several, which have no elements of their own to
            clip.
    """
    clip_value = check_limit(clip_value, "clip_value")
    prepared = _prepared(grads, writable=True)
    for gradient, numbers in prepared:
        _check_places(gradient, numbers)
    _written(prepared)
    for gradient, numbers in prepared:
        for one in numbers:
            backend = backend_of(one.array)
            if gradient is not None:
                backend.coalesce(gradient.values, gradient.indices.segments)
            backend.clip(one.array, clip_value)


class _Numbers(NamedTuple):
    """An array of the caller that a gradient has its numbers from, a view of it, and its label."""

    value: Any
    array: Array
    label: str


class _Prepared(NamedTuple):
    """A gradient, checked: what it is if it is sparse, and its numbers, of several arrays if it is a sum."""

    gradient: RowGradient | None
    numbers: list[_Numbers]


def _check_places(gradient: RowGradient | None, numbers: list[_Numbers]) -> None:
    """Refuse to clip the elements of a gradient whose rows have no place of their own."""
    if gradient is None:
        return
    array, label = numbers[0].array, numbers[0].label
    if len(numbers) > 1:
        raise ValueError(
            f"{label} belongs to a sum of gradients, whose rows can't be clipped by value: use "
            "step(clip_value=...)"
        )
    if gradient.bags is not None:
        raise ValueError(f"{label} belongs to a BagGradient, whose rows can't be clipped by value")
    if array.dtype in arrays.LOW_DTYPES:
        raise TypeError(
            f"{label} has dtype {array.dtype}, in which sums of rows can't be stored: expected "
            "float32 or float64, or use step(clip_value=...)"
        )


def _written(prepared: list[_Prepared]) -> None:
    """Have torch know of gradients that are about to change."""
    written([one.value for _, numbers in prepared for one in numbers])


def _norm(prepared: list[_Prepared]) -> float:
    """The norm of all."""
    whole = [one.array for gradient, numbers in prepared for one in numbers if gradient is None]
    squares = DenseSquares((backend_of(array), array.dtype, array.size) for array in whole)
    addresses = np.array([backend_of(array).address(array) for array in whole], np.int64)
    return norm_of(squares, addresses, [one.gradient for one in prepared if one.gradient is not None])


def _prepared(grads: Any, writable: bool) -> list[_Prepared]:
    """Every gradient, checked."""
    found: list[_Prepared] = []
    for value, label in leaves(grads, "grads"):
        value, gradient = as_gradient(value, label, writable), None
        if isinstance(value, SparseGradient):
            gradient = value.checked(label, None)
            if gradient.takes_maxima:
                label = next(own for part, own in value.parts(label) if part.checked(own, None).takes_maxima)
                raise ValueError(
                    f"{label}.mode is 'max', whose gradient depends on the table: use step(clip_norm=...)"
                )
        numbers = [_checked_numbers(own, own_label, writable) for own, own_label in numbers_of(value, label)]
        found.append(_Prepared(gradient, numbers))
    sort_together([one.gradient.indices for one in found if one.gradient is not None])
    if writable:
        arrays.check_apart([(one.array, one.label) for _, numbers in found for one in numbers])
    return found


def _checked_numbers(value: Any, label: str, writable: bool) -> _Numbers:
    """An array that a gradient has its numbers from."""
    remedy = arrays.CLIPPED if writable else arrays.READ
    array = arrays.array_view(value, label, remedy)
    arrays.check_float(array, label, value, remedy)
    arrays.check_contiguous(array, label, value, remedy)
    if writable:
        arrays.check_writeable(array, label, value, "a gradient to change in place", remedy)
    return _Numbers(value, array, label)
