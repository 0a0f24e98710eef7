"""How far the rows of a table are: which steps they missed, or how many updates each has had."""

from collections.abc import Mapping
from typing import Any

from fastopt._core.backend import History, backend_of
from fastopt.kernels.rule import Rule
from fastopt.kernels.work import Array, CountFold

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
        self, rule: Rule, decay: type, options: Mapping[str, Any], step: int, last_step: Array
    ) -> None:
        self.last_step = last_step
        self.options = options
        self.history: History = backend_of(last_step).History(rule, decay, dict(options), step)


def fold_of(rule: Rule, options: Mapping[str, Any]) -> CountFold:
    """For ``step_per_row=True``: what the rule folds at the counts of rows."""
    return CountFold(rule, tuple(sorted((k, v) for k, v in options.items() if k not in ("lr", "params"))))
