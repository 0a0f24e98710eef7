"""Sparse updates on a CUDA device are those of the CPU."""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from devices import CUDA

from fastopt.kernels import rules
from fastopt.kernels.cpu import backend as cpu
from fastopt.kernels.cuda.array import empty, upload
from fastopt.kernels.cuda.backend import Cuda
from fastopt.kernels.cuda.backend import rows as launches
from fastopt.kernels.cuda.backend.rows import Rows
from fastopt.kernels.cuda.row_sums import LONG, SLOT
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
from fastopt.kernels.rule import L2, Decoupled, Lazy, PerRow, Rule, Scaled
from fastopt.kernels.work import CountFold, Spec, StoredState, StoredTable, TableGradient, TableWork

OPTIONS = {
    "lr": 0.03, "momentum": 0.8, "dampening": 0.3, "nesterov": True, "lr_decay": 0.1, "momentum_decay": 0.2,
    "alpha": 0.9, "betas": (0.8, 0.95), "beta": 0.8, "weight_decay": 0.125, "eps": 1e-3,
}  # fmt: skip
KEY, MISSED_KEY = 123456789012345, 987654321098765


class Device(Cuda, Rows):
    """The backend of a device with its sparse updates."""


DEVICE = Device(0, cpu)


@pytest.fixture(params=CUDA, autouse=True)
def device(request):
    return request.param()


class Case(NamedTuple):
    """A rule with weight decay, formats, and tables with so many columns each."""

    rule: Rule
    decay: type
    dims: tuple[int, ...]
    formats: tuple[Format, ...] = ()
    compute: Any = np.float32
    limit: float = math.inf

    @property
    def members(self) -> tuple[Format, ...]:
        return self.formats or (PLAIN,) * (2 + len(self.rule.state_slots))

    def __str__(self) -> str:
        formats = "-".join(kind.name for kind in self.formats)
        parts = self.rule.hyper.__name__, self.decay.__name__, *self.dims, np.dtype(self.compute), formats
        return "-".join(map(str, (*parts, self.limit)))

    def spec(self, step: int = 3, scale: float = 0.5, mode: Any = Lazy()) -> Spec:  # noqa: B008
        own = {Scaled: (), L2: (0.1,), Decoupled: (0.99,)}[self.decay]
        h = self.rule.fold(step, OPTIONS, np.dtype(self.compute))
        return Spec(h, self.decay(scale, 1.5, *own), np.dtype(self.compute), self.members, mode)


ROWS = 11
INDICES = [3, 9, 3, 0, 10, 3, 3, 7, 9, 3, 3, 3, 1]


class Side:
    """Tables of a case on a backend, and gradients of theirs.

    Args:
        gradient: of each table a change of its TableGradient, by arrays of the host.
    """

    def __init__(
        self,
        backend: Any,
        case: Case,
        indices: list[list[int]] | None = None,
        gradient: dict[str, Any] | None = None,
        large: float = 1.0,
        rows: int = ROWS,
    ) -> None:
        self.backend, self.case, self.rows = backend, case, rows
        self.tables, self.gradients = [], []
        indices = indices or [INDICES[t:] for t in range(len(case.dims))]
        lists = [(self.put(np.array(own)), rows) for own in ([2, 1, 2], *indices)]  # the first is left out
        segments = backend.segments_of(lists)[1:]
        for t, dim in enumerate(case.dims):
            rng = np.random.default_rng(dim)
            members = [kind for k, kind in enumerate(case.members) if k != 1]
            arrays = [self._array(k, kind, dim, rng) for k, kind in enumerate(members)]
            row_state = np.abs(rng.standard_normal((len(case.rule.row_slots), rows))).astype(case.compute)
            self.tables.append((arrays, [self.put(own) for own in row_state]))
            own = gradient or {}
            count = own.get("count", len(indices[t]))
            values = (rng.standard_normal((count, dim)) * large).astype(case.compute)
            given = {
                k: self.put(v) if isinstance(v, np.ndarray) else v for k, v in own.items() if k != "count"
            }
            self.gradients.append(TableGradient(self.put(values), segments[t], **given))

    def put(self, array: np.ndarray | None) -> Any:
        return None if array is None else self.backend.from_host(array)

    def _array(self, slot: int, kind: Format, dim: int, rng: Any) -> tuple[Any, Any]:
        x = rng.standard_normal((self.rows, dim)).astype(self.case.compute)
        x = np.abs(x) if slot and self.case.rule.state_slots[slot - 1] in self.case.rule.not_negative else x
        if kind.coded:
            scales = np.abs(rng.standard_normal((self.rows, -(-dim // BLOCK)))) + 0.1
            return self.put(rng.integers(0, 256, x.shape).astype(np.uint8)), self.put(
                scales.astype(np.float32)
            )
        if kind.stored is None:
            return self.put(x), None
        held = x.astype(kind.dtype)
        return self.put(held.view(np.uint16) if held.itemsize == 2 else held), self.put(
            x
        ) if kind.master else None

    def works(self, spec: Spec, row_steps: Any = None) -> list[TableWork]:
        works = []
        for t, ((table, *state), row_state) in enumerate(self.tables):
            own = StoredState(tuple(state), tuple(row_state), table[1])
            stored = StoredTable(table[0], own, 2**33 - 77 + t, KEY + t)
            numbers = (*spec.h, *spec.c)
            given = stored, self.gradients[t], numbers, self.case.limit
            works.append(TableWork(*given, 4 + t, row_steps, MISSED_KEY))
        return works

    def run(self, spec: Spec | None = None, row_steps: Any = None, **given: Any) -> None:
        spec = spec or self.case.spec()
        launch = self.backend.update_rows(spec, self.works(spec, row_steps), **given)
        self.backend.run(launch.prepare())

    def got(self) -> list[np.ndarray]:
        """The contents of parameters and state."""
        arrays = [
            array
            for own, row_state in self.tables
            for array in (*(array for pair in own for array in pair), *row_state)
            if array is not None
        ]
        return [self.backend.to_host(array) for array in arrays]


def sides_of(case: Case, *given: Any, **options: Any) -> list[Side]:
    return [Side(backend, case, *given, **options) for backend in (cpu, DEVICE)]


def assert_same(sides: list[Side], exact: bool = True) -> None:
    for one, other in zip(sides[0].got(), sides[1].got(), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        if exact or one.dtype.kind != "f":
            np.testing.assert_array_equal(other, one)
        else:
            eps = np.finfo(one.dtype).eps
            np.testing.assert_allclose(other, one, rtol=32 * eps, atol=8 * eps)


DIMS = 1, 3, 8, 20, 64, 128, 260, 1028
MASTERS = BFLOAT16_OF, PLAIN, PLAIN, PLAIN
CODES = HALF_OF, PLAIN, SIGNED8, ROOT8
SAME_BITS = [
    Case(rules.SGD, L2, (8, 3)),
    Case(rules.ADAM, L2, DIMS),
    Case(rules.ADAM, Decoupled, (20, 128)),
    Case(rules.ADAGRAD, Decoupled, (64, 1)),
    Case(rules.LION, Decoupled, (260, 20)),
    Case(rules.ADAM, L2, (20, 3), MASTERS),
    Case(rules.ADAM, L2, (64, 130), (BFLOAT16, PLAIN, STOCHASTIC, STOCHASTIC)),
    Case(rules.ADAM, Decoupled, (8, 3, 300), CODES),
    Case(rules.ADAM, Decoupled, (8, 3), compute=np.float64),
    Case(rules.ADAM, Decoupled, (8, 3), (PLAIN, PLAIN, SINGLE, SINGLE), np.float64),
    Case(rules.ADAM, Decoupled, (300, 20), (PLAIN, PLAIN, SIGNED8, ROOT8), np.float64),
]


@pytest.mark.parametrize("case", SAME_BITS, ids=str)
def test_bits_are_those_of_the_cpu(case):
    sides = sides_of(case)
    before = sides[1].got()
    for side in sides:
        side.run()
        side.run(case.spec(4, -0.75))
    assert_same(sides)
    assert any((one != other).any() for one, other in zip(before, sides[1].got(), strict=True))


NEARLY = [
    Case(rules.ROWWISE_ADAGRAD, L2, (1, 3, 20, 128, 260)),
    Case(rules.ROWWISE_ADAM, Decoupled, (8, 64)),
    Case(rules.ROWWISE_ADAM, Decoupled, (8, 3), compute=np.float64),
    Case(rules.LAMB, Scaled, (3, 20, 128, 260)),
    Case(rules.LAMB, Scaled, (8,), compute=np.float64),
    Case(rules.ADAM, L2, (1, 3, 20, 128, 260), limit=0.5),
    Case(rules.ROWWISE_ADAGRAD, L2, (20, 7), limit=3.0),
    Case(rules.LAMB, Scaled, (20, 7), limit=0.5),
]


@pytest.mark.parametrize("case", NEARLY, ids=str)
def test_sums_over_rows_are_in_another_order(case):
    sides = sides_of(case)
    for side in sides:
        side.run()
    assert_same(sides, exact=False)


def test_norms_of_coded_state():
    """What is near the CPU's may round to the next code."""
    case = Case(rules.LAMB, Scaled, (300,), (PLAIN, PLAIN, SIGNED8, ROOT8))
    sides = sides_of(case)
    for side in sides:
        side.run()
    one, other = sides[0].got(), sides[1].got()
    np.testing.assert_allclose(other[0], one[0], rtol=1e-5, atol=1e-6)
    for k in (1, 3):
        assert np.abs(one[k].astype(int) - other[k]).max() <= 1


@pytest.mark.parametrize("large", [1e25, 1e38])
@pytest.mark.parametrize("rule", [rules.ROWWISE_ADAGRAD, rules.ADAM], ids=["mean", "limit"])
def test_squares_may_be_too_large(rule, large):
    case = Case(rule, Scaled, (8, 20), limit=0.5 if rule is rules.ADAM else math.inf)
    sides = sides_of(case, large=large / 8)
    spec = case.spec()
    spec = spec._replace(c=Scaled(0.5, math.inf))
    for side in sides:
        side.run(spec)
    assert_same(sides, exact=False)


@pytest.mark.parametrize("large", [1e-200, 1e170, 0.0])
def test_squares_beyond_float64_in_trust_ratios(large):
    case = Case(rules.LAMB, Scaled, (8, 3), compute=np.float64)
    sides = sides_of(case, large=large)
    spec = case.spec()
    spec = spec._replace(c=Scaled(0.5, math.inf))
    for side in sides:
        for own, _ in side.tables:
            for array, _ in own:
                array[...] = side.put(side.backend.to_host(array) * large)
        side.run(spec)
    for one, other in zip(sides[0].got(), sides[1].got(), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-13)


ADAM = Case(rules.ADAM, L2, (20, 3))


@pytest.mark.parametrize(
    "case", [ADAM, Case(rules.ROWWISE_ADAGRAD, L2, (20, 3), limit=0.5)], ids=["elements", "rows"]
)
def test_infinity_and_nan_stay_in_their_rows(case):
    sides = sides_of(case)
    for side in sides:
        values = side.backend.to_host(side.gradients[0].values)
        values[3, 2], values[7, 1] = np.nan, np.inf  # of the rows 0 and 7
        side.gradients[0] = side.gradients[0]._replace(values=side.put(values))
        side.run()
    assert_same(sides, exact=case is ADAM)
    assert np.isnan(sides[1].got()[0][0]).any() and np.isfinite(sides[1].got()[0][9]).all()


def test_rows_of_values_may_be_shared_and_have_weights():
    rng = np.random.default_rng(3)
    source = rng.integers(0, 4, len(INDICES)).astype(np.int32)
    weights = rng.standard_normal(len(INDICES)).astype(np.float32)
    case = Case(rules.ADAM, L2, (20,))
    sides = sides_of(case, gradient={"source": source, "weights": weights, "count": 4})
    others = sides_of(case, gradient={"source": source, "count": 4})
    for side in (*sides, *others):
        side.run()
    assert_same(sides)
    assert_same(others)
    assert (sides[1].got()[0] != others[1].got()[0]).any()


@pytest.mark.parametrize("dim", [3, 20])
def test_winners_alone_count(dim):
    """Positions 0 to 12 are in bags of four."""
    rng = np.random.default_rng(3)
    bags = np.arange(len(INDICES)) // 4
    order = np.argsort(INDICES, kind="stable")
    source = bags[order].astype(np.int32)
    winners = (4 * np.arange(4)[:, None] + rng.integers(0, 4, (4, dim))).astype(np.int32)
    sides = sides_of(
        Case(rules.ADAM, L2, (dim,)), gradient={"source": source, "winners": winners, "count": 4}
    )
    for side in sides:
        side.run()
    assert_same(sides)


def test_a_row_may_be_skipped():
    sides = sides_of(ADAM, gradient={"skipped": 3})
    before = sides[1].got()
    for side in sides:
        side.run()
    assert_same(sides)
    np.testing.assert_array_equal(sides[1].got()[0][3], before[0][3])


@pytest.mark.parametrize("case", [ADAM, Case(rules.ROWWISE_ADAM, L2, (20, 3))], ids=str)
def test_indices_outside_the_table_name_no_row(case):
    sides = [
        Side(cpu, case, [[0, 5, 5], [0, 5, 5]]),
        Side(DEVICE, case, [[0, 5, 5, -1, ROWS, 2**31]] * 2),
    ]
    for side, other in ((sides[1], sides[0]),):
        for t in range(2):
            values = side.backend.to_host(side.gradients[t].values)[:3]
            other.gradients[t] = other.gradients[t]._replace(values=values)
    for side in sides:
        side.run()
    assert_same(sides, exact=case is ADAM)


LONG_ONE = [4] * (LONG + 3 * SLOT) + [0, 7, 7] + [5] * (LONG + 1) + [8] * LONG + [9]


@pytest.mark.parametrize("case", [Case(rules.ADAM, Scaled, (3, 8)), Case(rules.SGD, L2, (140,))], ids=str)
def test_long_segments_are_summed_up_in_parts(case):
    indices = [np.random.default_rng(t).permutation(LONG_ONE).tolist() for t in range(len(case.dims))]
    sides = sides_of(case, indices)
    for side in sides:
        side.run(case.spec()._replace(c=case.decay(0.5, math.inf, *case.spec().c[2:])))
    short = [k for k in range(ROWS) if k not in (4, 5)]
    eps = np.finfo(np.float32).eps
    for one, other in zip(sides[0].got(), sides[1].got(), strict=True):
        np.testing.assert_array_equal(other[short], one[short])
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1000 * eps)


def test_sums_of_parts_are_those_of_all_positions():
    """Whole numbers have exact sums, in whatever order."""
    case = Case(rules.SGD, Scaled, (3, 8, 140))
    sides = sides_of(case, [np.random.default_rng(t).permutation(LONG_ONE).tolist() for t in range(3)])
    spec = case.spec()._replace(c=Scaled(0.5, math.inf))
    for side in sides:
        for t, own in enumerate(side.gradients):
            values = np.round(side.backend.to_host(own.values) * 8)
            side.gradients[t] = own._replace(values=side.put(values))
        side.run(spec)
    assert_same(sides)


@pytest.mark.parametrize(
    "case", [Case(rules.ADAM, L2, (3, 20)), Case(rules.LAMB, Scaled, (20,), limit=0.5)], ids=str
)
def test_bits_do_not_depend_on_the_grid(case, monkeypatch):
    indices = [LONG_ONE + list(range(200)) * 2] * len(case.dims)
    sides = [Side(DEVICE, case, indices, rows=200) for _ in range(3)]
    for side, blocks in zip(sides, (2**20, 1, 3), strict=True):
        monkeypatch.setattr(launches, "MOST_BLOCKS", blocks)
        side.run()
    assert_same(sides[:2])
    assert_same(sides[::2])


@pytest.mark.parametrize("array", [0, 1, 2])
def test_rows_need_not_be_aligned(array):
    sides = sides_of(Case(rules.ADAM, L2, (20, 8)))

    def moved(own: Any) -> Any:
        new = empty(0, own.size + 1, own.dtype)[1:].reshape(own.shape)
        new[...] = own
        return new

    arrays, gradient = sides[1].tables[0][0], sides[1].gradients[0]
    if array == 2:
        sides[1].gradients[0] = gradient._replace(values=moved(gradient.values))
    else:
        arrays[array] = moved(arrays[array][0]), None
    for side in sides:
        side.run()
    assert_same(sides)


def test_gradients_are_scaled_by_a_factor_of_the_device():
    sides = sides_of(ADAM)
    sides[0].run(ADAM.spec(scale=0.3 * 0.7))
    sides[1].run(ADAM.spec(scale=0.3), factor=upload(0, np.array([0.7])))
    assert_same(sides)


@pytest.mark.parametrize("case", [Case(rules.ADAM, L2, (20,)), Case(rules.ROWWISE_ADAM, L2, (3,))], ids=str)
def test_rows_count_their_own_updates(case):
    sides = sides_of(case)
    counts = np.array([0, 5, 2, 17, 0, 1, 3, 4, 9, 8, 1])
    options = tuple((name, value) for name, value in OPTIONS.items() if name != "lr")
    spec = case.spec(mode=PerRow())
    spec = spec._replace(
        h=case.rule.fold(1, {**OPTIONS, "lr": 1.0}, np.float32)._replace(**{case.rule.hyper._fields[0]: 0.03})
    )
    for side in sides:
        own = side.put(counts)
        side.tables[0][1].append(own)  # so that they are compared
        fold = CountFold(case.rule, options)
        row_steps = side.backend.counted_steps(own, side.gradients[0].segments, fold, 17)
        [work] = side.works(spec, row_steps)
        state = work.stored.state
        stored = work.stored._replace(state=StoredState(state.slots, state.of_rows[:-1], state.master))
        works = [work._replace(stored=stored)]
        launch = side.backend.update_rows(spec, works)
        side.backend.run(launch.prepare())
    assert_same(sides, exact=case.rule is rules.ADAM)
    counts[[0, 1, 3, 7, 9, 10]] += 1
    np.testing.assert_array_equal(sides[1].got()[-1], counts)


@pytest.mark.parametrize(
    "rule", [rules.ADAGRAD, rules.MOMENTUM, rules.ADAM, rules.LION], ids=lambda r: r.hyper.__name__
)
def test_rows_take_the_steps_that_they_missed_first(rule):
    """Row 3 gets no gradient, and stays behind."""
    case = Case(rule, L2 if rule is rules.MOMENTUM else Scaled, (20,))
    sides = sides_of(case, gradient={"skipped": 3})
    last_step = np.array([5, 5, 0, 1, 2, 3, 4, 2, 5, 1, 0])
    for side in sides:
        own = side.put(last_step)
        history = side.backend.History(rule, case.decay, dict(OPTIONS), 0)
        for _ in range(5):
            side.backend.run(history.advance(0.03))
        row_steps = history.of_rows(own, len(INDICES), np.dtype(np.float32))
        spec = case.spec(6, mode=history.kind())
        [work] = side.works(spec, row_steps)
        launch = side.backend.update_rows(spec, [work._replace(step=6)])
        side.backend.run(launch.prepare())
        side.tables[0][1].append(own)
    assert_same(sides)
    last_step[[0, 1, 7, 9, 10]] = 6
    np.testing.assert_array_equal(sides[1].got()[-1], last_step)


def test_missed_steps_and_the_update_round_with_different_random_bits():
    """Both are rounded, each with the bits of its own key."""
    case = Case(rules.ADAM, Scaled, (64,), (PLAIN, PLAIN, STOCHASTIC, STOCHASTIC))
    together, apart, same = (Side(DEVICE, case) for _ in range(3))
    for side, key in ((together, None), (apart, MISSED_KEY), (same, KEY)):
        last_step = side.put(np.full(ROWS, 1))
        history = DEVICE.History(case.rule, case.decay, dict(OPTIONS), 0)
        for _ in range(5):
            DEVICE.run(history.advance(0.03))
        row_steps = history.of_rows(last_step, len(INDICES), np.dtype(np.float32))
        spec = case.spec(6, mode=history.kind())
        [work] = side.works(spec, row_steps)
        if key is not None:
            given = work.stored._replace(key=key), row_steps, 5, side.gradients[0].segments
            launch = DEVICE.catch_up(spec, *given)
            DEVICE.run(launch.prepare())
        launch = DEVICE.update_rows(spec, [work._replace(step=6)])
        DEVICE.run(launch.prepare())
    assert_same([together, apart])
    assert any((one != other).any() for one, other in zip(together.got(), same.got(), strict=True))


def test_nothing_is_launched_for_nothing():
    for case, indices in ((Case(rules.ADAM, L2, (0,)), [[1]]), (Case(rules.ADAM, L2, (4,)), [[]])):
        side = Side(DEVICE, case, [np.array(own, np.int64) for own in indices])
        assert not DEVICE.update_rows(case.spec(), side.works(case.spec())).prepare()


def test_prepare_changes_nothing():
    side = Side(DEVICE, ADAM)
    before = side.got()
    DEVICE.update_rows(ADAM.spec(), side.works(ADAM.spec())).prepare()
    for one, other in zip(side.got(), before, strict=True):
        np.testing.assert_array_equal(one, other)
