"""Setting the elements of arrays of a device."""

from typing import Any

import numpy as np

from fastopt.kernels.cuda import elementwise
from fastopt.kernels.cuda.driver import driver
from fastopt.kernels.cuda.elementwise import rows_of


def set_all(array: Any, value: int | float) -> None:
    """Set each element to a number."""
    if not array.size:
        return
    if np.ndim(value) or np.asarray(value).dtype.kind in "OSUMm":
        raise TypeError(f"the value is {value!r}: expected a number, or an array of a device or of NumPy")
    number = np.empty(1, array.dtype)
    number[0] = value
    bits = int.from_bytes(number.tobytes(), "little", signed=True)
    if not bits and array.flags.c_contiguous:
        driver().zero(array.device, array.address, array.nbytes)
        return
    made = elementwise.fill(array.itemsize)
    for part in rows_of(array.shape, array.strides):
        to = array.address + part.offsets[0], part.strides[0], part.steps[0]
        given = *to, part.rows, part.width, part.per_row, part.bits, bits
        made.ready(array.device, part.blocks, *given)()


def copy_all(array: Any, source: Any) -> None:
    """Set the elements to those of another array of a device, of the same shape, converted."""
    if not array.size:
        return
    if array.device != source.device and not _alike(array, source):
        source = source.copied_to(array.device)  # kernels read the memory of their own device
    if _alike(array, source):
        driver().copy(array.device, array.address, source.device, source.address, array.nbytes)
        return
    made = elementwise.copy(source.dtype, array.dtype)
    for part in rows_of(array.shape, array.strides, source.strides):
        to = array.address + part.offsets[0], part.strides[0], part.steps[0]
        begin = source.address + part.offsets[1], part.strides[1], part.steps[1]
        given = *to, *begin, part.rows, part.width, part.per_row, part.bits
        made.ready(array.device, part.blocks, *given)()


def _alike(array: Any, source: Any) -> bool:
    """Whether the bytes of both are the same."""
    return array.dtype == source.dtype and array.flags.c_contiguous and source.flags.c_contiguous
