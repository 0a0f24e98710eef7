"""Setting the elements of arrays of a device."""

from typing import Any

import numpy as np

from fastopt.kernels.cuda import elementwise
from fastopt.kernels.cuda.driver import driver
from fastopt.kernels.cuda.elementwise import blocks_for, stored_type


def rows_of(array: Any) -> tuple[int, int, int]:
    """How many rows of elements next to each other an array has, how long they are, and the bytes from one to
    the next."""
    if array.flags.c_contiguous:
        return 1, array.size, 0
    rows, stride = array.shape[0], array.strides[0]
    if not array[0].flags.c_contiguous:
        raise ValueError(f"an array of strides {array.strides} is none of rows")
    return rows, array[0].size, stride


def set_all(array: Any, value: int | float, upload: Any) -> None:
    """Set each element to a number. ``upload``: what makes an array of the device of one of the host."""
    rows, width, stride = rows_of(array)
    if not array.size:
        return
    bits = np.array([value]).astype(array.dtype).view(stored_type(array.dtype))
    if rows == 1 and not bits.view(np.uint8).any():
        driver().zero(array.device, array.address, array.nbytes)
        return
    number, per_row = upload(array.device, bits), blocks_for(width)
    given = array.address, width, stride, per_row, number.address
    elementwise.fill(bits.dtype).ready(array.device, rows * per_row, *given)()


def copy_all(array: Any, source: Any) -> None:
    """Set the elements to those of another array of the device of the same shape, converted."""
    if not array.size:
        return
    (rows, width, stride), (from_rows, from_width, from_stride) = rows_of(array), rows_of(source)
    if array.dtype == source.dtype and rows == from_rows == 1:
        driver().copy(array.device, array.address, source.address, array.nbytes)
        return
    if rows < from_rows:
        rows, width, stride = from_rows, from_width, from_width * array.itemsize
    elif from_rows < rows:
        from_stride = width * source.itemsize
    per_row = blocks_for(width)
    made = elementwise.copy(source.dtype, array.dtype)
    given = array.address, stride, source.address, from_stride, width, per_row
    made.ready(array.device, rows * per_row, *given)()
