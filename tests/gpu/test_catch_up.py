"""Rows on a CUDA device catch up as those on the CPU do."""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from devices import CUDA

from fastopt.kernels.cpu import backend as cpu
from fastopt.kernels.cuda.backend.basics import Basics
from fastopt.kernels.cuda.backend.catch_up import CatchUp
from fastopt.kernels.formats import (
    BLOCK,
    PLAIN,
    Format,
)
from fastopt.kernels.rule import L2, Decoupled, Rule, Scaled
from fastopt.kernels.work import Spec, StoredTable

OPTIONS = {
    "lr": 0.0, "momentum": 0.8, "dampening": 0.3, "nesterov": True, "lr_decay": 0.1, "momentum_decay": 0.2,
    "alpha": 0.9, "betas": (0.8, 0.95), "beta": 0.8, "weight_decay": 0.125, "eps": 1e-3,
}  # fmt: skip
BASE = 5
KEY = 123456789012345


class Both(Basics, CatchUp):
    """As much of a backend as is tested here."""


DEVICE = Both(0, cpu)


@pytest.fixture(params=CUDA, autouse=True)
def device(request):
    return request.param()


class Case(NamedTuple):
    """A rule with weight decay and formats, computed with a dtype, and rows of so many elements."""

    rule: Rule
    decay: type
    dim: int
    formats: tuple[Format, ...] = ()
    compute: Any = np.float32
    steps: int = 8
    together: bool = False

    @property
    def members(self) -> tuple[Format, ...]:
        return self.formats or (PLAIN,) * (2 + len(self.rule.state_slots))

    def __str__(self) -> str:
        formats = "-".join(kind.name for kind in self.formats)
        parts = self.rule.hyper.__name__, self.decay.__name__, self.dim, np.dtype(self.compute), self.steps
        return "-".join(map(str, (*parts, formats)))


class Side:
    """A table of a case on a backend, its history, and how far its rows are."""

    def __init__(self, backend: Any, case: Case, last_steps: np.ndarray, steps: int | None = None) -> None:
        self.backend, self.case = backend, case
        self.history = backend.History(case.rule, case.decay, dict(OPTIONS), BASE)
        self.advance(case.steps)
        rng = np.random.default_rng(7)
        shape = rows, _ = len(last_steps), case.dim
        arrays = [self._array(k, kind, shape, rng) for k, kind in enumerate(case.members) if k != 1]
        if case.together:
            both = self.put(np.stack([array for array, _ in arrays[1:]], axis=1))
            self.arrays = [arrays[0], *((both[:, k], None) for k in range(len(arrays) - 1))]
            self.arrays[0] = tuple(self.put(array) for array in arrays[0])
        else:
            self.arrays = [tuple(self.put(array) for array in pair) for pair in arrays]
        values = np.abs(rng.standard_normal((len(case.rule.row_slots), rows))).astype(case.compute)
        self.row_state = tuple(self.put(own) for own in values)
        self.last_step = self.put(last_steps)

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            lr = 0.25 * (1 + math.sin(self.history.now))
            self.backend.run(self.history.advance(lr))

    def _array(self, k: int, kind: Format, shape: tuple[int, int], rng: Any) -> tuple[Any, Any]:
        x = rng.standard_normal(shape).astype(self.case.compute)
        x = np.abs(x) if k > 1 and self.case.rule.state_slots[k - 2] in self.case.rule.not_negative else x
        if kind.coded:
            scales = np.abs(rng.standard_normal((shape[0], -(-shape[1] // BLOCK)))) + 0.1
            return rng.integers(0, 256, shape).astype(np.uint8), scales.astype(np.float32)
        if kind.stored is None:
            return x, None
        held = x.astype(kind.dtype)
        return held.view(np.uint16) if held.itemsize == 2 else held, x if kind.master else None

    def put(self, array: np.ndarray | None) -> Any:
        return None if array is None else self.backend.from_host(array)

    @property
    def spec(self) -> Spec:
        case, own = self.case, {Scaled: (), L2: (0.125,), Decoupled: (1.0,)}
        h = case.rule.fold(self.history.now, OPTIONS, np.dtype(case.compute))
        c = case.decay(1.0, math.inf, *own[case.decay])
        return Spec(h, c, np.dtype(case.compute), case.members, self.history.kind())

    @property
    def stored(self) -> StoredTable:
        (table, master), *state = self.arrays
        return StoredTable(table, tuple(state), self.row_state, master, 2**33 - 77, KEY)

    def catch_up(self, segments: Any = None) -> None:
        compute = np.dtype(self.case.compute)
        row_steps = self.history.of_rows(self.last_step, self.stored.table.shape[0], compute)
        launch = self.backend.catch_up(self.spec, self.stored, row_steps, self.history.now, segments)
        self.backend.run(launch.prepare())

    def got(self) -> list[np.ndarray]:
        arrays = [array for pair in self.arrays for array in pair if array is not None]
        return [self.backend.to_host(array) for array in (*arrays, *self.row_state, self.last_step)]


def sides_of(case: Case, last_steps: np.ndarray) -> list[Side]:
    return [Side(backend, case, last_steps) for backend in (cpu, DEVICE)]


def missed_by(case: Case, rows: int) -> np.ndarray:
    """The last step of rows that have missed 0, 1, 7 or all steps."""
    now = BASE + case.steps
    return np.array([now - min((0, 1, 7, case.steps)[k % 4], case.steps) for k in range(rows)])
