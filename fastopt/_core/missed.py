"""How far the rows of a table are: which steps they missed, or how many updates each has had."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt._core.backend import History, backend_of
from fastopt.kernels.rule import Rule

ROW_STEPS = "row_steps"  # with step_per_row: how often each row was updated
LAST_STEP, LR_HISTORY = "last_step", "lr_history"  # with rows="dense", while rows are behind
MOST_COUNTED = 2**53  # steps, which float64 still counts


class Tracking:
    """For ``rows="dense"``: the last step of each row, and what happened since.

    Rows that were never behind have no tracking: it starts with the first sparse gradient after all
    rows were up to date.

    Attributes:
        last_step: int64 [rows], the step of the parameter that each row is up to date with.
        history: the steps since tracking started.
        options: those of these steps, but for the learning rate.
    """

    def __init__(
        self, rule: Rule, decay: type, options: Mapping[str, Any], step: int, last_step: np.ndarray
    ) -> None:
        self.last_step = last_step
        self.options = options
        self.history: History = backend_of(last_step).History(rule, decay, dict(options), step)


class Counts:
    """For ``step_per_row=True``: what the rule folds at each number of updates, for the learning rate 1."""

    def __init__(self) -> None:
        self._numbers = np.empty((0, 0))
        self._size = 0
        self._key: tuple | None = None

    def up_to(self, count: int, rule: Rule, options: Mapping[str, Any]) -> np.ndarray:
        """Row t - 1 is that of the t-th update; of fewer than ``count`` rows the last is for all later."""
        own = {**options, "lr": 1.0}
        final = rule.fold(MOST_COUNTED, own, np.float64)
        key = rule.hyper, rule.fold(1, own, np.float64), rule.fold(2, own, np.float64), final
        if key != self._key:
            self._key, self._size = key, 0
            self._numbers = np.empty((64, len(final)))
        while self._size < count and (not self._size or tuple(self._numbers[self._size - 1]) != tuple(final)):
            if self._size == len(self._numbers):
                self._numbers = np.concatenate([self._numbers, np.empty_like(self._numbers)])
            self._numbers[self._size] = rule.fold(self._size + 1, own, np.float64)
            self._size += 1
        return self._numbers[: self._size]
