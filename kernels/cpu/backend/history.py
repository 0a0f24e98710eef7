"""What is kept of past steps, so that rows of a table can take them later, all at once."""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastopt.kernels import catch_up
from fastopt.kernels.cpu.catch_up import add_adaptive, add_linear, tabulate
from fastopt.kernels.rule import L2, Adaptive, Decoupled, Linear, Loop, Rule, Scaled, Still
from fastopt.kernels.work import RowSteps

FIRST_CAPACITY = 64
ROWS_PER_COEFFICIENTS = 4
MOVES_PER_COEFFICIENTS = 100  # elements that a dense update handles in the time of one look-up


class History:
    """The steps of a table since ``base``, as steps with a zero gradient.

    What ``steps`` holds, and how it is read, is said in ``fastopt.kernels.catch_up``.

    Args:
        rule, decay: the rule, and Scaled, L2 or Decoupled.
        options: its options, checked; the learning rate among them is not used.
        base: the parameter's step from which on steps are kept.

    Attributes:
        kind: how missed steps are made up for: Still, Linear, Adaptive or Loop.
        steps: float64, of shape (capacity, columns); row i belongs to step base + i.
        window: for how many steps a row of ``steps`` goes on changing.
        now: the last step known.
    """

    MOST_STEPS = 1 << 14  # 2 MB; then all rows are brought up to date, and a history starts anew

    def __init__(self, rule: Rule, decay: type, options: dict[str, Any], base: int) -> None:
        self.kind = catch_up.missed_kind(rule, decay, options)
        self.base = self.now = base
        self.window = 0
        self._rule, self._options, self._decay_type = rule, dict(options), decay
        weight_decay = float(options.get("weight_decay", 0.0))
        self._decoupled = weight_decay if decay is Decoupled else 0.0
        self._penalty = weight_decay if decay is L2 else 0.0
        self._decay = float(getattr(self._fold(base + 1, 0.0), "alpha", 1.0))
        if self.kind is Adaptive:
            self.window = catch_up.window_of(rule, options)
            self._growth = catch_up.growth_of(rule, options)
        self._tabulated = -1, np.empty((0, 0))
        adding: dict[type, Callable[[int, float], Callable[[], object]]] = {
            Still: self._adding_still,
            Linear: self._adding_linear,
            Adaptive: self._adding_adaptive,
            Loop: self._adding_loop,
        }
        self._adding = adding[self.kind]
        self.steps = np.zeros((FIRST_CAPACITY, self._columns()))
        self._lrs = np.zeros(FIRST_CAPACITY)
        self._set_first()

    @property
    def lrs(self) -> np.ndarray:
        """The learning rates of the steps since ``base``."""
        return self._lrs[: self.now - self.base]

    @property
    def full(self) -> bool:
        """Whether it holds as many steps as it can."""
        return self.now - self.base >= self.MOST_STEPS

    def of_rows(self, last_step: np.ndarray, rows: int, compute: np.dtype) -> RowSteps:
        """What kernels need for ``rows`` of a table's rows to catch up: ``last_step`` is int64 [rows of the
        table], the step that each is up to date with.

        For rows that were updated in one of the latest steps coefficients are computed beforehand, for so
        few steps that it pays.
        """
        now, table = self._tabulated
        count = min(self.now - self.base + 1, rows // ROWS_PER_COEFFICIENTS)
        if self.kind is Loop:
            count = 0
        if now != self.now or len(table) < count or table.dtype != compute:
            table = np.empty((count, catch_up.coefficient_count(self.kind) if count else 0), compute)
            if count:
                given = self.kind(), self.steps, self.window, self.base, self.now - count + 1, self.now
                tabulate(count * MOVES_PER_COEFFICIENTS, *given, table)
            self._tabulated = self.now, table
        return RowSteps(last_step, self.steps, self.base, self.window, table, self.now - len(table) + 1)

    def advance(self, lr: float) -> Sequence[Callable[[], object]]:
        """The calls that take in step ``now + 1``, whose learning rate is ``lr``.

        Raises:
            ValueError: ``lr * weight_decay`` is too large.
        """
        i = self.now - self.base + 1
        if i == len(self.steps):
            self._lrs = np.concatenate([self._lrs, np.zeros_like(self._lrs)])
            self.steps = np.concatenate([self.steps, np.zeros_like(self.steps)])
        return (
            self._adding(i, lr),
            functools.partial(operator.setitem, self._lrs, i - 1, lr),
            functools.partial(setattr, self, "now", self.now + 1),
        )

    def _columns(self) -> int:
        if self.kind is Loop:
            return len(self._numbers(self.base + 1, 0.0))
        return catch_up.COLUMNS[self.kind]

    def _set_first(self) -> None:
        """Row 0: nothing has happened yet."""
        first = self.steps[0]
        if self.kind is Still:
            first[catch_up.DECAY] = 1.0
        elif self.kind is Linear:
            first[catch_up.POWER] = 1.0
        elif self.kind is Adaptive:
            first[[catch_up.DECAY1, catch_up.DECAY2, catch_up.FIRST]] = 1.0

    def _set_row(self, i: int, row: Sequence[float]) -> Callable[[], object]:
        # NumPy asks numbers in a tuple, in code of Python, whether they are arrays.
        return functools.partial(operator.setitem, self.steps, i, np.array(row, np.float64))

    def _adding_still(self, i: int, lr: float) -> Callable[[], object]:
        # An L2 penalty is SGD's alone here, and does to p what decoupled decay does.
        keep = self._positive(1.0 - lr * (self._decoupled or self._penalty), lr)
        before = self.steps[i - 1]
        row = before[catch_up.LOG_KEEP] + math.log(keep), before[catch_up.DECAY] * self._decay
        return self._set_row(i, row)

    def _adding_linear(self, i: int, lr: float) -> Callable[[], object]:
        h = self._fold(self.base + i, lr)
        nesterov, undampened = getattr(h, "nesterov", False), getattr(h, "undampened", 1.0)
        keep = 1.0 - lr * self._decoupled
        given = keep, self._penalty, lr, h.momentum, undampened, nesterov, self._decay
        return add_linear.ready(0, (self.steps, i, *given), ())

    def _adding_adaptive(self, i: int, lr: float) -> Callable[[], object]:
        keep = self._positive(1.0 - lr * self._decoupled, lr)
        h = self._fold(self.base + i, lr)
        root = 1.0 / getattr(h, "root_correction", 1.0)
        rectified = getattr(h, "rectified", True)
        given = self.window, root, self._growth, h.step_size, keep, rectified, h.beta1, h.beta2
        return add_adaptive.ready(0, (self.steps, i, *given), ())

    def _adding_loop(self, i: int, lr: float) -> Callable[[], object]:
        return self._set_row(i, self._numbers(self.base + i, lr))

    def _positive(self, keep: float, lr: float) -> float:
        if keep > 0:
            return keep
        weight_decay = self._options["weight_decay"]
        raise ValueError(
            f"lr is {lr!r} and weight_decay {weight_decay!r}: rows='dense' needs lr * weight_decay below 1"
        )

    def _fold(self, step: int, lr: float) -> Any:
        return self._rule.fold(step, {**self._options, "lr": lr}, np.float64)

    def _numbers(self, step: int, lr: float) -> list[float]:
        """The hyperparameters of a step, then those of its weight decay but for the scale."""
        decay: dict[type, list[float]] = {
            Scaled: [],
            L2: [self._penalty],
            Decoupled: [1.0 - lr * self._decoupled],
        }
        return [float(number) for number in (*self._fold(step, lr), *decay[self._decay_type])]
