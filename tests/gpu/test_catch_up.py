"""Rows on a CUDA device catch up as those on the CPU do."""

import math
import re
from typing import Any, NamedTuple

import numpy as np
import pytest
from devices import CUDA, INTERPRETED
from ptx.fault import Fault
from ptx.machine import Module

from fastopt.kernels import rules
from fastopt.kernels.cpu import backend as cpu
from fastopt.kernels.cuda import driver
from fastopt.kernels.cuda.array import empty
from fastopt.kernels.cuda.backend import Cuda, catch_up, counts
from fastopt.kernels.cuda.backend.catch_up import CatchUpLaunch
from fastopt.kernels.cuda.catch_up import catch_up_rows
from fastopt.kernels.cuda.elements import code_of
from fastopt.kernels.cuda.streams import Current
from fastopt.kernels.formats import (
    BFLOAT16,
    BFLOAT16_OF,
    BLOCK,
    HALF_OF,
    PLAIN,
    ROOT8,
    SIGNED8,
    SINGLE,
    STOCHASTIC,
    Format,
)
from fastopt.kernels.rule import L2, Adaptive, Decoupled, Linear, Loop, Rule, Scaled, Still
from fastopt.kernels.work import CountFold, Spec, StoredState, StoredTable

OPTIONS = {
    "lr": 0.0, "momentum": 0.8, "dampening": 0.3, "nesterov": True, "lr_decay": 0.1, "momentum_decay": 0.2,
    "alpha": 0.9, "betas": (0.8, 0.95), "beta": 0.8, "weight_decay": 0.125, "eps": 1e-3,
}  # fmt: skip
BASE = 5
KEY = 123456789012345


DEVICE = Cuda(0, cpu)


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
        return StoredTable(table, StoredState(tuple(state), self.row_state, master), 2**33 - 77, KEY)

    def catch_up(self, segments: Any = None) -> None:
        compute = np.dtype(self.case.compute)
        row_steps = self.history.of_rows(self.last_step, self.stored.table.shape[0], compute)
        launch = self.backend.catch_up(self.spec, self.stored, row_steps, self.history.now, segments)
        self.backend.run(launch.prepare())

    def got(self) -> list[np.ndarray]:
        arrays = [array for pair in self.arrays for array in pair if array is not None]
        return [self.backend.to_host(array) for array in (*arrays, *self.row_state, self.last_step)]

    def segments(self, indices: list[int], rows: int) -> Any:
        """Those of a table's indices, which were sorted after those of another."""
        others, own = (self.put(np.array(k)) for k in ([3, 1, 3], indices))
        return self.backend.segments_of([(others, 5), (own, rows)])[1]


def sides_of(case: Case, last_steps: np.ndarray) -> list[Side]:
    return [Side(backend, case, last_steps) for backend in (cpu, DEVICE)]


def missed_by(case: Case, rows: int) -> np.ndarray:
    """The last step of rows that have missed 0, 1, 7 or all steps."""
    now = BASE + case.steps
    return np.array([now - min((0, 1, 7, case.steps)[k % 4], case.steps) for k in range(rows)])


RULES_MADE_UP_FOR = [
    (rules.SGD, L2, Still),
    (rules.MOMENTUM, L2, Linear),
    (rules.ADAGRAD, Decoupled, Still),
    (rules.RMSPROP, Scaled, Still),
    (rules.RMSPROP_MOMENTUM, Decoupled, Linear),
    (rules.ADAM, Scaled, Adaptive),
    (rules.ADAM, Decoupled, Adaptive),
    (rules.AMSGRAD, Decoupled, Adaptive),
    (rules.RADAM, Decoupled, Adaptive),
    (rules.NADAM, Scaled, Adaptive),
    (rules.ROWWISE_ADAM, Decoupled, Adaptive),
    (rules.ROWWISE_ADAGRAD, Decoupled, Still),
    (rules.LION, Decoupled, Loop),
    (rules.ADAM, L2, Loop),
    (rules.RMSPROP_MOMENTUM, L2, Loop),
]
DIMS = 1, 5, 64, 130


def assert_same(sides: list[Side], exact: bool = True) -> None:
    for one, other in zip(sides[0].got(), sides[1].got(), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        if exact or one.dtype.kind != "f":
            np.testing.assert_array_equal(other, one)
        else:
            np.testing.assert_allclose(
                other, one, rtol=16 * np.finfo(one.dtype).eps, atol=4 * np.finfo(one.dtype).eps
            )


@pytest.mark.parametrize(
    ("case", "kind"),
    [(Case(rule, decay, DIMS[k % 4]), kind) for k, (rule, decay, kind) in enumerate(RULES_MADE_UP_FOR)],
    ids=str,
)
def test_rows_come_to_where_they_do_on_the_cpu(case, kind):
    sides = sides_of(case, missed_by(case, 8))
    before = sides[1].got()
    for side in sides:
        assert side.history.kind is kind
        side.catch_up()
    assert_same(sides)
    got = sides[1].got()
    np.testing.assert_array_equal(got[-1], BASE + case.steps)
    for array, own in zip(got[:-1], before[:-1], strict=True):
        np.testing.assert_array_equal(array[::4], own[::4])  # no step was missed
    assert any((array[1::4] != own[1::4]).any() for array, own in zip(got[:-1], before[:-1], strict=True))


MASTERS = BFLOAT16_OF, PLAIN, PLAIN, PLAIN
CODES = HALF_OF, PLAIN, SIGNED8, ROOT8
STORED = [
    Case(rules.ADAM, Decoupled, 64, MASTERS),
    Case(rules.ADAM, L2, 130, (BFLOAT16, PLAIN, STOCHASTIC, STOCHASTIC)),
    Case(rules.ADAM, Decoupled, 300, CODES),
    Case(rules.LION, Decoupled, 64, (PLAIN, PLAIN, SIGNED8)),
    Case(rules.ADAM, Decoupled, 5, (PLAIN, PLAIN, STOCHASTIC, STOCHASTIC)),
    Case(rules.ADAM, Decoupled, 64, together=True),
    Case(rules.ADAM, Decoupled, 5, together=True),
]


@pytest.mark.parametrize("case", STORED, ids=str)
def test_rows_may_be_stored_otherwise_than_they_are_computed_with(case):
    sides = sides_of(case, missed_by(case, 8))
    for side in sides:
        side.catch_up()
    assert_same(sides)


DOUBLES = [
    Case(rules.ADAM, Decoupled, 64, compute=np.float64),
    Case(rules.MOMENTUM, L2, 5, compute=np.float64),
    Case(rules.ADAM, Decoupled, 5, (PLAIN, PLAIN, SINGLE, SINGLE), np.float64),
    Case(rules.ADAM, L2, 64, (PLAIN, PLAIN, SINGLE, SINGLE), np.float64),
]


@pytest.mark.parametrize("case", DOUBLES, ids=str)
def test_float64_differs_by_the_logarithms_alone(case):
    sides = sides_of(case, missed_by(case, 8))
    for side in sides:
        side.catch_up()
    assert_same(sides, exact=False)


LONG = [
    Case(rules.ADAM, Decoupled, 64, steps=300),
    Case(rules.MOMENTUM, L2, 5, steps=300),
    Case(rules.ADAGRAD, Decoupled, 5, steps=300),
    Case(rules.LION, Decoupled, 5, steps=300),
]


@pytest.mark.parametrize("case", LONG, ids=str)
def test_hundreds_of_steps(case):
    sides = sides_of(case, missed_by(case, 8))
    for side in sides:
        side.catch_up()
    assert_same(sides)


@pytest.mark.parametrize(
    "case",
    [Case(rules.ROWWISE_ADAM, L2, 70), Case(rules.LAMB, Decoupled, 130, (PLAIN, PLAIN, SIGNED8, ROOT8))],
    ids=str,
)
def test_rules_that_look_at_the_whole_row_in_each_step(case):
    """Sums over a row are taken in another order."""
    sides = sides_of(case, missed_by(case, 8))
    for side in sides:
        assert side.history.kind is Loop
        side.catch_up()
    assert_same(sides, exact=False)


ADAM = Case(rules.ADAM, Decoupled, 8)


@pytest.mark.parametrize("blocks", [1, 2**20])
def test_rows_of_segments_alone_catch_up(blocks, monkeypatch):
    monkeypatch.setattr(catch_up, "MOST_BLOCKS", blocks)
    sides = sides_of(ADAM, missed_by(ADAM, 12))
    for side in sides:
        side.catch_up(side.segments([9, 2, 11, 9, 0, 9, 3, 1, 1], 12))
    assert_same(sides)
    assert (sides[1].got()[-1] == BASE + 8).sum() == 8  # five that were named, and three that had missed none


def test_indices_outside_the_table_name_no_row():
    sides = sides_of(ADAM, missed_by(ADAM, 12))
    sides[0].catch_up(sides[0].segments([9, 2], 12))
    sides[1].catch_up(sides[1].segments([9, -1, 12, 2, 2**31], 12))
    assert_same(sides)


def test_an_update_may_follow_and_a_row_be_left_out():
    [side] = sides_of(ADAM, missed_by(ADAM, 12))[1:]
    before, now = side.got(), side.history.now
    segments = side.segments([1, 8, 3, 2], 12)
    row_steps = side.history.of_rows(side.last_step, 4, np.dtype(np.float32))
    given = side.spec, side.stored, row_steps, now, segments
    launch = CatchUpLaunch(0, *given, mark=now + 1, skipped=3)
    DEVICE.run(launch.prepare())
    got = side.got()
    expected = before[-1].copy()
    expected[[1, 8, 2]] = now + 1
    np.testing.assert_array_equal(got[-1], expected)
    for array, own in zip(got[:-1], before[:-1], strict=True):
        changed = (array != own).any(axis=1)
        np.testing.assert_array_equal(np.flatnonzero(changed), [1, 2])  # and row 8 had missed none


@pytest.mark.parametrize("array", [0, 1, 2])
def test_rows_need_not_be_aligned(array):
    sides = sides_of(ADAM, missed_by(ADAM, 6))
    own, _ = sides[1].arrays[array]
    moved = empty(0, own.size + 1, own.dtype)[1:].reshape(own.shape)
    moved[...] = own
    sides[1].arrays[array] = moved, None
    for side in sides:
        side.catch_up()
    assert_same(sides)


@pytest.mark.parametrize("case", [ADAM, Case(rules.MOMENTUM, L2, 8), Case(rules.LION, Scaled, 8)], ids=str)
def test_later_steps_are_known_too(case):
    """A history goes on, beyond its first capacity, between the times that rows catch up."""
    sides = sides_of(case, missed_by(case, 6))
    for steps in (0, 1, 3, 70):
        for side in sides:
            side.advance(steps)
            side.catch_up(side.segments([steps % 5, 5], 6))
        assert_same(sides)


def test_the_history_is_uploaded_once_for_a_step(monkeypatch):
    [side] = sides_of(ADAM, missed_by(ADAM, 6))[1:]
    side.catch_up()
    first = side.history.of_rows(side.last_step, 6, np.dtype(np.float32))
    monkeypatch.setattr(driver.driver(), "upload", None)
    again = side.history.of_rows(side.last_step, 3, np.dtype(np.float32))
    assert again.tabulated is first.tabulated and again.history is first.history


@pytest.mark.parametrize("device", [INTERPRETED], indirect=True)
@pytest.mark.parametrize(("decay", "needed"), [(Decoupled, [True, True]), (L2, [True, True, True, False])])
def test_rows_race_without_a_barrier(decay, needed):
    """The last of those of the kind Loop orders what those before it do."""
    case = Case(rules.ROWWISE_ADAM, decay, 70)

    def launch():
        [side] = sides_of(case, missed_by(case, 8))[1:]
        row_steps, now = side.history.of_rows(side.last_step, 8, np.dtype(np.float32)), side.history.now
        made = CatchUpLaunch(0, side.spec, side.stored, row_steps, now, None, mark=now + 1)
        [call] = made.prepare()
        return made, side.spec, call.args  # of the interpreter: a kernel, a grid, threads and arguments

    alive, spec, _ = launch()
    [text], _ = catch_up_rows(code_of(spec), type(spec.mode)).code((9, 0))
    found = []
    for barrier in re.finditer(r"bar\.warp\.sync[^;]*;", text):
        alive, _, (_, *given) = launch()
        module = Module(text[: barrier.start()] + text[barrier.end() :])
        try:
            driver.driver().launcher(0, module, *given)()
            found.append(False)
        except Fault as fault:
            found.append(str(fault).startswith("racecheck"))
    assert found == needed
    del alive


@pytest.mark.parametrize(("rows", "dim"), [(0, 8), (3, 0)])
def test_nothing_is_launched_for_nothing(rows, dim):
    case = Case(rules.ADAM, Decoupled, dim)
    [side] = sides_of(case, missed_by(case, rows))[1:]
    row_steps = side.history.of_rows(side.last_step, rows, np.dtype(np.float32))
    assert not DEVICE.catch_up(side.spec, side.stored, row_steps, side.history.now, None).prepare()


# Rows that count their own updates

FOLD = CountFold(rules.ADAM, (("betas", (0.9, 0.999)), ("eps", 1e-8)))


def numbers_at(row_steps: Any, count: int) -> np.ndarray:
    """What is folded at a count, as kernels find it: in the last row whose count is not above it."""
    history = row_steps.history.copy_to_host()
    return history[np.searchsorted(history[:, 0], count, "right") - 1]


def test_tables_of_counts_grow_and_are_kept():
    backend = Cuda(0, cpu)
    counted = DEVICE.from_host(np.array([0, 4, 1000]))
    first = backend.counted_steps(counted, None, FOLD, 1000)
    assert first.counts is counted and first.history.dtype == np.float64
    equal = CountFold(rules.ADAM, (("betas", (0.9, 0.999)), ("eps", 1e-8)))
    assert backend.counted_steps(counted, None, equal, 3).history is first.history
    other = CountFold(rules.ADAM, (("betas", (0.8, 0.999)), ("eps", 1e-8)))
    assert backend.counted_steps(counted, None, other, 3).history is not first.history
    grown = backend.counted_steps(counted, None, FOLD, 1500)
    assert len(first.history) < 1502 <= len(grown.history)
    for row_steps, most in ((first, 1001), (grown, 1501)):
        for count in (1, 2, 5, most):
            np.testing.assert_array_equal(numbers_at(row_steps, count), FOLD(np.array([float(count)]))[0])


def test_tables_of_counts_are_used_after_they_were_brought_there(monkeypatch):
    """By an optimizer that works on another stream, too."""
    backend, counted, waited = Cuda(0, cpu), DEVICE.from_host(np.array([0])), []
    monkeypatch.setattr(driver.driver(), "wait_for", lambda device, stream: waited.append((device, stream)))
    monkeypatch.setattr(counts, "current", lambda device: Current(77, None))
    first = backend.counted_steps(counted, None, FOLD, 5).history
    monkeypatch.setattr(counts, "current", lambda device: Current(1, None))
    waited.clear()
    assert backend.counted_steps(counted, None, FOLD, 5).history is first
    assert waited == [(0, 77)]


def test_no_more_tables_are_kept_than_a_few(monkeypatch):
    monkeypatch.setattr(counts, "MOST_FOLDS", 2)
    backend, counted = Cuda(0, cpu), DEVICE.from_host(np.array([0]))
    folds = [CountFold(rules.ADAM, (("betas", (beta, 0.999)), ("eps", 1e-8))) for beta in (0.1, 0.2, 0.3)]
    tables = [backend.counted_steps(counted, None, folds[k], 5).history for k in (0, 1, 0, 2, 0, 1)]
    assert tables[4] is tables[2] is tables[0] and tables[5] is not tables[1]


def test_counts_beyond_any_table_are_looked_up():
    held = np.array([7, 10**12, 0, 7, -3])
    row_steps = DEVICE.counted_steps(DEVICE.from_host(held), None, FOLD, 10**12)
    assert len(row_steps.history) == 3
    for count in (1, 8, 10**12 + 1):
        np.testing.assert_array_equal(numbers_at(row_steps, count), FOLD(np.array([float(count)]))[0])
