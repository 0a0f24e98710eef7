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


def folded_by_count(
    counts: np.ndarray, rows: np.ndarray, rule: Rule, options: Mapping[str, Any]
) -> np.ndarray:
    """For ``step_per_row=True``: the counts that ``rows`` have after their next update, ascending, each with
    what the rule folds at it for the learning rate 1.

    counts: int64, how often each row of the table was updated.
    """
    steps = _distinct(np.maximum(counts[rows], 0)).astype(np.float64) + 1.0
    with np.errstate(all="ignore"):  # as Python's floats and kernels do
        h = rule.fold(steps, {**options, "lr": 1.0}, np.float64)
    found = np.empty((steps.size, 1 + len(h)))
    found[:, 0] = steps
    for k, number in enumerate(h):
        found[:, 1 + k] = number
    return found


def _distinct(counts: np.ndarray) -> np.ndarray:
    """The different ones, ascending, in a time and memory that go by how many are given."""
    if not counts.size:
        return counts
    least, most = int(counts.min()), int(counts.max())
    if most - least >= counts.size:
        ascending = np.sort(counts)
        return ascending[np.append(True, ascending[1:] != ascending[:-1])]
    seen = np.zeros(most - least + 1, bool)
    seen[counts - least] = True
    return np.flatnonzero(seen) + least
