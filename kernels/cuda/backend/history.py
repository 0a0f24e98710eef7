"""What is kept of past steps, on a device: kernels read there what the host's history holds."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastopt.kernels.catch_up import coefficient_count
from fastopt.kernels.cuda.array import DeviceArray, empty, upload
from fastopt.kernels.cuda.catch_up import THREADS, tabulate
from fastopt.kernels.cuda.driver import driver
from fastopt.kernels.rule import Loop
from fastopt.kernels.work import RowSteps


class History:
    """The steps of a table since ``base``, for rows on a device.

    Args:
        host: a history of the host's backend, which takes in the steps.

    Attributes:
        base, now, kind, lrs, full: the host's.
    """

    def __init__(self, device: int, host: Any) -> None:
        self._device, self._host = device, host
        self.MOST_STEPS: int = host.MOST_STEPS
        self._steps: DeviceArray | None = None
        self._known = host.base  # the last step that was uploaded
        self._tabulated: dict[np.dtype, tuple[int, DeviceArray]] = {}  # and the step that it is for

    @property
    def base(self) -> int:
        return self._host.base

    @property
    def now(self) -> int:
        return self._host.now

    @property
    def kind(self) -> type:
        return self._host.kind

    @property
    def lrs(self) -> np.ndarray:
        return self._host.lrs

    @property
    def full(self) -> bool:
        return self._host.full

    def advance(self, lr: float) -> Sequence[Callable[[], object]]:
        """The calls that take in the next step, whose learning rate is ``lr``.

        Raises:
            ValueError: ``lr * weight_decay`` is too large.
        """
        return self._host.advance(lr)

    def of_rows(self, last_step: DeviceArray, rows: int, compute: np.dtype) -> RowSteps:
        """What kernels need for rows to catch up: ``last_step`` is int64 [rows of the table], the step that
        each is up to date with. Coefficients are found beforehand for all steps since ``base``."""
        steps, base, window = self._uploaded(), self.base, self._host.window
        if self.kind is Loop:
            return RowSteps(last_step, steps, base, window)
        return RowSteps(last_step, steps, base, window, self._coefficients(steps, compute), base)

    def _uploaded(self) -> DeviceArray:
        """The steps of the host, of which those are uploaded that have changed."""
        steps = self._host.steps
        if self._steps is None or self._steps.shape != steps.shape:
            self._steps = upload(self._device, steps)
        elif self._known < self.now:
            first = max(self._known + 1 - self._host.window - self.base, 0)
            last = self.now + 1 - self.base
            driver().upload(self._device, self._steps[first:last].address, steps[first:last])
        self._known = self.now
        return self._steps

    def _coefficients(self, steps: DeviceArray, compute: np.dtype) -> DeviceArray:
        now, table = self._tabulated.get(compute, (-1, steps))
        if now == self.now:
            return table
        count = self.now - self.base + 1
        table = empty(self._device, (count, coefficient_count(self.kind)), compute)
        given = steps.address, *steps.shape, self._host.window, self.base, self.now, count, table.address
        tabulate(self.kind, compute).ready(self._device, -(-count // THREADS), *given)()
        self._tabulated[compute] = self.now, table
        return table
