"""Launches over arrays: dense updates, and sums of squares."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastopt.kernels.cpu import norms
from fastopt.kernels.cpu.backend.addresses import address
from fastopt.kernels.cpu.backend.rows import PARTS_PER_THREAD
from fastopt.kernels.cpu.dense import update_arrays
from fastopt.kernels.cpu.factored import tile_arguments, update_tiles
from fastopt.kernels.cpu.memory import empty
from fastopt.kernels.cpu.runs import RUN
from fastopt.kernels.cpu.threads import run, runs_serial, thread_count
from fastopt.kernels.cpu.trust import update_whole_arrays
from fastopt.kernels.formats import Format, formats
from fastopt.kernels.layout import ARRAY_GRADIENT, ARRAY_KEY, ARRAY_NUMBERS, ARRAY_PARAMETER, array_table
from fastopt.kernels.work import ArrayWork, Spec, TableGradient


class ArraysLaunch:
    """One launch over any number of arrays.

    Attributes:
        numbers: float64 [class, fields of h and of c], the hyperparameters that the next run uses; written
            by the caller.
    """

    def __init__(self, spec: Spec, works: Sequence[ArrayWork], classes: int) -> None:
        self._trust = spec.rule.trust_ratio is not None
        sizes = [math.prod(work.shape) for work in works]
        self._table = array_table(
            [(work.numbers, work.position) for work in works],
            [_place(work.master) for work in works],
            [[_place(array) for pair in work.state for array in pair] for work in works],
        )
        self._bases = np.cumsum([0, *sizes])
        self._size = int(self._bases[-1])
        self._kinds = formats(*spec.formats)
        self._compute = spec.compute
        self._hyper = spec.h, spec.c  # Python's floats, which cost least to pass
        self._types = spec.key
        self.numbers = np.zeros((classes, len(spec.h) + len(spec.c)))
        self._prepared: tuple = ()  # what the calls and their arguments were made for
        self._calls: list[Callable[[], object]] = []
        self._alive = works

    def place(self, parameters: np.ndarray, gradients: np.ndarray) -> None:
        """Take over the addresses of the parameters and of their gradients."""
        self._table[:, ARRAY_PARAMETER] = parameters
        self._table[:, ARRAY_GRADIENT] = gradients

    def set_keys(self, keys: list[int]) -> None:
        """Set the keys of the random bits, one for each class."""
        self._table[:, ARRAY_KEY] = np.array(keys)[self._table[:, ARRAY_NUMBERS]]

    def prepare(self, zero_grads: bool, factor: None = None) -> Sequence[Callable[[], object]]:
        """The calls that update the arrays, their machine code ready; ``zero_grads``: whether they set
        gradients to zero. There is no ``factor``, since norms are at hand at once (see :func:`norm`)."""
        serial = runs_serial(self._size)
        parts = 1 if serial else PARTS_PER_THREAD * thread_count()
        prepared = serial, zero_grads, parts
        if prepared != self._prepared:
            self._prepared = ()  # until all is ready, since compiling may fail
            chunk = max(-(-self._size // (parts * RUN)), 1) * RUN
            given = self._kinds, self._table, self._bases, self.numbers, zero_grads, chunk
            self._arguments = *self._hyper, self._compute.type(0), *given
            if self._size and not self._trust:
                self._calls = [update_arrays.ready(self._size, self._arguments, self._types)]
            self._prepared = prepared
        return update_whole_arrays(self._size, self._types, *self._arguments) if self._trust else self._calls

    def refresh(self) -> Sequence[Callable[[], object]]:
        """Nothing: kernels read ``numbers`` where they are written."""
        return ()


class MatrixLaunch:
    """The update of a parameter whose state is of rows and columns (Adafactor), with the methods and
    attributes of :class:`ArraysLaunch`."""

    def __init__(self, spec: Spec, work: ArrayWork) -> None:
        self._shape = math.prod(work.shape[:-2]), work.shape[-2], work.shape[-1]
        self._work = math.prod(work.shape)
        self._state = [array.reshape(-1) for array, _ in work.state]
        self._places = np.array([0, _place(work.master), 0, 0], np.int64)
        self._like = spec.compute.type(0)
        self._hyper = spec.h, spec.c
        self._types = spec.key
        self._kinds = formats(*spec.formats)
        self.numbers = np.zeros((1, len(spec.h) + len(spec.c)))
        self._alive = work

    def place(self, parameters: np.ndarray, gradients: np.ndarray) -> None:
        self._places[::2] = parameters[0], gradients[0]

    def set_keys(self, keys: list[int]) -> None:
        """Nothing of this state is rounded at random."""

    def prepare(self, zero_grads: bool, factor: None = None) -> Sequence[Callable[[], object]]:
        if not self._work:
            return ()
        row_var, col_var = self._state
        given = self._like, self._kinds, self._places, self._shape, row_var, col_var
        h, c = self._hyper
        arguments = tile_arguments(h, c, *given, self.numbers[0], zero_grads)
        return (update_tiles.ready(self._work, arguments, self._types),)

    def refresh(self) -> Sequence[Callable[[], object]]:
        return ()


def _place(array: np.ndarray | None) -> int:
    return 0 if array is None else address(array)


class Squares:
    """Sums of squares of arrays of one format."""

    def __init__(self, compute: np.dtype, kind: Format, sizes: Sequence[int]) -> None:
        self._like, self._kinds = compute.type(0), formats(kind)
        self._types = compute, kind
        self._bases = np.cumsum([0, *sizes])

    def sum(self, addresses: np.ndarray, scale: float) -> float:
        """The sum of squares of all arrays, which lie at ``addresses``, times ``scale**2``."""
        size = int(self._bases[-1])
        if not size:
            return 0.0
        partials = empty(-(-size // norms.SUMMED), np.float64)
        arguments = self._like, self._kinds, addresses, self._bases, scale, partials
        run([norms.sum_squares_arrays.ready(size, arguments, self._types)])
        return float(partials.sum())


def norm(squares: Sequence[tuple[Squares, np.ndarray]], gradients: Sequence[TableGradient]) -> Any:
    """None: sums of squares are at hand at once."""
    return None
