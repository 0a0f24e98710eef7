"""What is done to whole arrays of a device: made contiguous, converted, scaled, clipped."""

import numpy as np

from fastopt.kernels.cuda import elementwise
from fastopt.kernels.cuda.array import DeviceArray, empty
from fastopt.kernels.cuda.elementwise import blocks_for, vector_length
from fastopt.kernels.cuda.reblock import MOST_BLOCKS, reblock
from fastopt.kernels.formats import Format


class Elementwise:
    """What a backend does to the elements of arrays (see ``fastopt._core.backend``)."""

    device: int

    def contiguous(self, array: DeviceArray) -> DeviceArray:
        """``array`` if it is C-contiguous, or a copy that is."""
        return array if array.flags.c_contiguous else array.copy()

    def widen(self, array: DeviceArray) -> DeviceArray:
        """``array``, in float32 if it is of 16 bits, and C-contiguous."""
        if array.itemsize != 2:
            return self.contiguous(array)
        out = empty(self.device, array.shape, np.float32)
        out[...] = array
        return out

    def scale(self, array: DeviceArray, factor: float) -> None:
        """Multiply an array by a number, in place."""
        if array.size:
            length = vector_length(array.dtype, array.address)
            blocks = blocks_for(-(-array.size // length))
            made = elementwise.scale(array.dtype, length)
            made.ready(self.device, blocks, array.address, array.size, float(factor))()

    def clip(self, array: DeviceArray, limit: float) -> None:
        """Clip each element to [-limit, limit], in place; NaN stays NaN."""
        if array.size:
            length = vector_length(array.dtype, array.address)
            blocks, most = blocks_for(-(-array.size // length)), float(array.dtype.type(limit))
            made = elementwise.clip(array.dtype, length)
            made.ready(self.device, blocks, array.address, array.size, most)()

    def reblock(
        self,
        kind: Format,
        codes: DeviceArray,
        scales: DeviceArray,
        new: DeviceArray,
        new_scales: DeviceArray,
    ) -> None:
        """Set ``new`` and ``new_scales``, [rows, blocks], to 8-bit codes whose blocks end with the rows, of
        codes whose blocks go on over them; rounded to the nearest."""
        blocks = new_scales.size
        if codes.size:
            rows, per_row = new_scales.shape
            addresses = codes.address, scales.address, new.address, new_scales.address
            given = *addresses, codes.size // rows, per_row, blocks
            reblock(kind).ready(self.device, min(blocks, MOST_BLOCKS), *given)()
