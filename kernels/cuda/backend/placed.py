"""What dense launches have in common: arrays that are placed, numbers, and calls for each step."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastopt.kernels.cuda.array import upload
from fastopt.kernels.cuda.driver import driver
from fastopt.kernels.cuda.elements import code_of
from fastopt.kernels.cuda.layout import ARRAY_ALIGNED, ARRAY_SHARED, ARRAY_SIZE, with_own_columns
from fastopt.kernels.cuda.settings import Settings
from fastopt.kernels.cuda.vectors import Vectors
from fastopt.kernels.layout import ARRAY_GRADIENT, ARRAY_PARAMETER, array_table
from fastopt.kernels.work import ArrayWork, Spec

Calls = Sequence[Callable[[], object]]


def place(array: Any) -> int:
    """The address of an array of the device, 0 for None."""
    return 0 if array is None else array.address


class PlacedLaunch:
    """A launch over arrays. What it needs in memory of the device lies where it is from the first, so that a
    step can be captured in a CUDA graph.

    Args:
        state: the addresses that kernels find in the row of each array (see layout.py), two for each slot.
        classes: how many rows of hyperparameters there are.
        row: elements of the rows that kernels work on apart, 0 where there are none.

    Attributes:
        numbers: float64 [class, fields of h and of c], the hyperparameters that the next run uses; written
            by the caller.
    """

    def __init__(
        self,
        device: int,
        spec: Spec,
        works: Sequence[ArrayWork],
        sizes: Sequence[int],
        state: Sequence[Sequence[int]],
        classes: int,
        row: int = 0,
    ) -> None:
        self.device = device
        self.code = code_of(spec)
        self.settings = Settings(device, self.code, classes)
        self.numbers = self.settings.host
        uses = [(work.numbers, work.position) for work in works]
        table = array_table(uses, [place(work.master) for work in works], state)
        self._table = with_own_columns(table, sizes)
        self.table = upload(device, self._table)
        self._vectors, self._row = Vectors(self.code.formats, self.code.compute), row
        self._moved = False  # whether the device's table is to be written again
        self._launches: dict[bool, list[Callable[[], object]]] = {}  # by whether they set gradients to zero
        self._alive = works

    def place(self, parameters: np.ndarray, gradients: np.ndarray) -> None:
        """Take over the addresses of the parameters and of their gradients."""
        places = self._table[:, ARRAY_SHARED + ARRAY_PARAMETER : ARRAY_SHARED + ARRAY_GRADIENT + 1 : 2]
        given = np.stack([parameters, gradients], axis=1)
        if np.array_equal(places, given):
            return
        places[...] = given
        widths = self._vectors.aligned
        aligned = self._table[:, [*widths]] % [*widths.values()] == 0
        self._table[:, ARRAY_ALIGNED] = aligned.all(axis=1) & (self._row % self._vectors.length == 0)
        self._moved = True

    def set_keys(self, keys: list[int]) -> None:
        """Set the keys of the random bits, one for each class."""
        self.settings.set_keys(keys)

    def refresh(self) -> Calls:
        """The calls that bring numbers, keys and places to the device, where a step that was captured in a
        graph finds them."""
        return (self._upload,) if self._table[:, ARRAY_SIZE].any() else ()

    def prepare(self, zero_grads: bool, factor: Any = None) -> Calls:
        """The calls that update the arrays, their machine code ready.

        zero_grads: whether they set gradients to zero. factor: an array of the device, by whose float64
        number the scale of gradients is multiplied.
        """
        refresh = self.refresh()
        if not refresh:
            return ()
        if zero_grads not in self._launches:
            self._launches[zero_grads] = self.launches(zero_grads)
        scaled = () if factor is None else (self.settings.scaled(factor),)
        launches = *scaled, *self._launches[zero_grads]
        if not driver().capturing(self.device):
            return (*refresh, *launches)
        if self._moved:
            raise ValueError(
                "a step that is captured in a CUDA graph has other parameters or gradients than the step "
                "before it: make a step with these, in the same memory, before the capture"
            )
        return launches

    def launches(self, zero_grads: bool) -> list[Callable[[], object]]:
        """The calls that find numbers and places on the device, and update the arrays."""
        raise NotImplementedError

    def _upload(self) -> None:
        if self._moved:
            driver().upload(self.device, self.table.address, self._table)
            self._moved = False
        self.settings.upload()
