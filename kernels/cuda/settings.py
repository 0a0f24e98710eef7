"""The numbers and keys of the steps of a launch, in memory of the device that never moves: a step that was
captured in a graph finds there what later steps are to use."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from fastopt.kernels.cuda.array import empty
from fastopt.kernels.cuda.driver import driver
from fastopt.kernels.cuda.elements import Code, prototypes
from fastopt.kernels.cuda.launch import kernel
from fastopt.kernels.cuda.memory import load, store

THREADS = 64


@kernel("iiii", THREADS)
def scale_gradients(code: Code) -> Any:
    """``(exact, numbers, classes, factor)``: set the gradient's scale in rows of numbers to that of the
    float64 ones times the float64 at the address ``factor``."""
    h, c, like = prototypes(code)
    width, at, size, cast = len(h) + len(c), len(h), like.itemsize, type(like)
    double = np.float64(0)

    def scale_gradients(exact, numbers, classes, factor):
        own = np.int64(cuda.blockIdx.x) * THREADS + np.int64(cuda.threadIdx.x)
        if own < classes:
            place = own * width + at
            store(numbers + place * size, cast(load(exact + place * 8, double) * load(factor, double)))

    return scale_gradients


class Settings:
    """Hyperparameters and keys of classes of arrays.

    Attributes:
        host: float64 [class, fields of h and of c], which the next upload takes; written by others.
        keys, exact, numbers: addresses of int64 keys, of float64 hyperparameters, and of these in the type
            that is computed with.
    """

    def __init__(self, device: int, code: Code, classes: int) -> None:
        self._device, self._code = device, code
        self.host = np.zeros((classes, code.width))
        self._own_keys = np.zeros(classes, np.int64)
        self._memory = empty(device, classes * 8 + self.host.size * (8 + code.compute.itemsize), np.uint8)
        self.keys = self._memory.address
        self.exact = self.keys + classes * 8
        self.numbers = self.exact + self.host.nbytes

    def set_keys(self, keys: list[int]) -> None:
        """Set the key of each class."""
        self._own_keys[:] = keys

    def upload(self) -> None:
        """Take over keys and hyperparameters."""
        numbers = self.host.astype(self._code.compute)
        parts = self._own_keys, self.host, numbers
        together = np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])
        driver().upload(self._device, self._memory.address, together)

    def scaled(self, factor: Any) -> Callable[[], object]:
        """The call that multiplies the scale of gradients by the float64 number of an array of the device."""
        classes = len(self.host)
        given = self.exact, self.numbers, classes, factor.address
        return scale_gradients(self._code).ready(self._device, -(-classes // THREADS), *given)
