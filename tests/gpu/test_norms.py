"""Norms on a CUDA device: partial sums have the CPU's bits, and sums differ from the CPU's in their order
alone."""

import math

import ml_dtypes
import numpy as np
import pytest
from devices import CUDA

import fastopt
from fastopt._core.state import computed_with, gradient_format
from fastopt._step.norms import DenseSquares, clip_factor, norm_of
from fastopt.kernels.cpu import backend as cpu
from fastopt.kernels.cpu import norms as cpu_norms
from fastopt.kernels.cpu.threads import run
from fastopt.kernels.cuda import driver
from fastopt.kernels.cuda.array import DeviceArray, empty, upload
from fastopt.kernels.cuda.backend import norms as launches
from fastopt.kernels.cuda.backend.basics import Basics
from fastopt.kernels.cuda.backend.norms import Norms
from fastopt.kernels.cuda.segments import DeviceSegments
from fastopt.kernels.cuda.streams import Current
from fastopt.kernels.formats import formats
from fastopt.kernels.work import Segments, TableGradient

DTYPES = [np.dtype(kind) for kind in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
# Two blocks of elements and more; arrays that end within a block and within a vector; none at all
SIZES = [3, 0, 8_189, 20_000, 1, 0, 17_408, 5]


class Backend(Basics, Norms):
    """What norms need of a backend."""


BACKEND = Backend(0, cpu)


@pytest.fixture(params=CUDA, autouse=True)
def device(request):
    return request.param()


@pytest.fixture
def waits(monkeypatch):
    """A list that grows whenever the host waits for numbers of the device."""
    own, times = driver.driver(), []
    download = own.download

    def counted(*given):
        times.append(given)
        download(*given)

    monkeypatch.setattr(own, "download", counted)
    return times


def ulps(got, want):
    """How many units in the last place of float64 two numbers are apart."""
    if math.isnan(got) or math.isnan(want):
        return 0 if math.isnan(got) and math.isnan(want) else math.inf
    return 0 if got == want else abs(got - want) / np.spacing(abs(want))


def gradients(dtype, sizes=SIZES, scale=1.0):
    rng = np.random.default_rng(5)
    return [(rng.standard_normal(size) * scale).astype(dtype) for size in sizes]


def on_device(arrays, offset=0):
    """Copies that begin ``offset`` elements after memory that is aligned."""
    copies = []
    for array in arrays:
        target = empty(0, array.size + offset, array.dtype)[offset:]
        target[...] = array
        copies.append(target)
    return copies


def addresses_of(arrays):
    return np.array([own.address if isinstance(own, DeviceArray) else cpu.address(own) for own in arrays])


def squares_of(backend, dtype, sizes=SIZES):
    return backend.Squares(computed_with(dtype), gradient_format(dtype), sizes)


def cpu_partials(arrays, scale):
    """The CPU's partial sums."""
    dtype, sizes = arrays[0].dtype, [array.size for array in arrays]
    like, kind = computed_with(dtype), gradient_format(dtype)
    bases = np.cumsum([0, *sizes])
    partials = np.zeros(-(-int(bases[-1]) // cpu_norms.SUMMED))
    arguments = like.type(0), formats(kind), addresses_of(arrays), bases, scale, partials
    run([cpu_norms.sum_squares_arrays.ready(int(bases[-1]), arguments, (like, kind))])
    return partials


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_partial_sums_have_the_bits_of_the_cpu(dtype, offset):
    host = gradients(dtype)
    arrays = on_device(host, offset)
    squares = squares_of(BACKEND, dtype)
    total = squares.sum(addresses_of(arrays), 0.3)
    want = cpu_partials(host, 0.3)
    np.testing.assert_array_equal(squares.partials.copy_to_host(), want)
    assert ulps(total, float(want.sum())) <= 2


def norm_on_device(groups, rows=()):
    """The norm of arrays, one list for each dtype, and of rows; what it is of lives as long."""
    parts = [on_device(group) for group in groups]
    squares = [
        (squares_of(BACKEND, group[0].dtype, [own.size for own in group]), addresses_of(part))
        for group, part in zip(groups, parts, strict=True)
    ]
    return BACKEND.norm(squares, rows), parts


def norm_on_host(groups):
    arrays = [own for group in groups for own in group]
    dense = DenseSquares((cpu, own.dtype, own.size) for own in arrays)
    return norm_of(dense, addresses_of(arrays), [])


@pytest.mark.parametrize("scale", [1.0, 1e200, 1e-200], ids=str)
def test_norms_are_those_of_the_cpu(waits, scale):
    groups = [gradients(dtype, [30, 9_000]) for dtype in DTYPES if scale == 1.0 or dtype == np.float64]
    norm, alive = norm_on_device(groups)
    assert not waits
    got = norm.value()
    assert ulps(got, norm_on_host(groups)) <= 2
    assert math.isfinite(got) and got > 0
    assert norm.value() == got and len(waits) == 1
    assert alive


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_seen(dtype, bad):
    [own] = gradients(np.dtype(dtype), [9_000])
    own[8_500] = bad
    norm, _alive = norm_on_device([[own]])
    assert str(norm.value()) == str(bad)
    found = norm.factor(1.0, 1.0).copy_to_host()
    assert str(found[0]) == ("nan" if np.isnan(bad) else "0.0")


def test_there_may_be_nothing_to_sum_up():
    assert BACKEND.norm([], []).value() == 0
    for dtype in DTYPES[:2]:
        norm, _alive = norm_on_device([[np.empty(0, dtype)]])
        assert norm.value() == 0 and norm.factor(1.0, 0.5).copy_to_host() == 1
        norm, _alive = norm_on_device([[np.zeros(5, dtype)]])
        assert norm.value() == 0


@pytest.mark.parametrize("scale", [1.0, 1e200])
def test_factors_are_those_of_the_cpu(waits, scale):
    norm, _alive = norm_on_device([gradients(DTYPES[1], [300], scale)])
    limits = [(1.0, 0.25 * scale), (0.125, 3.0 * scale), (0.125, 1e3 * scale), (1.0, 0.0)]
    factors = [norm.factor(*own) for own in limits]
    assert not waits
    assert norm.factor(*limits[0]) is factors[0]
    want = [clip_factor(grad_scale * norm.value(), most) for grad_scale, most in limits]
    assert [factor.copy_to_host()[0] for factor in factors] == want
    assert 0 < want[0] < 1 and want[2] == 1 and want[3] == 0
    assert all(factor.shape == (1,) and factor.dtype == np.float64 for factor in factors)


def test_norms_keep_their_values():
    host = gradients(DTYPES[0], [9_000])
    [array] = on_device(host)
    squares = [(squares_of(BACKEND, DTYPES[0], [9_000]), addresses_of([array]))]
    first = BACKEND.norm(squares, [])
    one = first.factor(1.0, 1.0)
    array[...] = host[0] * 2
    second = BACKEND.norm(squares, [])
    other = second.factor(1.0, 1.0)
    assert second.value() == 2 * first.value() == 2 * norm_on_host([host])
    assert one.copy_to_host()[0] == clip_factor(first.value(), 1.0)
    assert other.copy_to_host()[0] == clip_factor(second.value(), 1.0)


def test_a_norm_is_read_after_the_work_of_its_step(monkeypatch):
    """Which may be on another stream than that of the one who reads it."""
    [array] = on_device([np.ones(5, np.float32)])
    opt, waited = fastopt.SGD(array, lr=1.0), []
    monkeypatch.setattr(launches, "current", lambda device: Current(77, None))
    monkeypatch.setattr(driver.driver(), "wait_for", lambda device, stream: waited.append((device, stream)))
    info = opt.step(array.copy(), clip_norm=1.0)
    assert not waited
    assert info.norm == pytest.approx(5**0.5)
    assert info.clipped
    assert waited == [(0, 77)]


def test_a_captured_norm_is_that_of_the_last_replay(monkeypatch):
    """Nothing is allocated or uploaded, and its memory stays when nobody has the norm any more."""
    host = gradients(DTYPES[1], [9_000])
    [array] = on_device(host)
    squares = [(squares_of(BACKEND, DTYPES[1], [9_000]), addresses_of([array]))]
    before = BACKEND.norm(squares, [])
    before.factor(1.0, 1.0)
    own, calls = driver.driver(), []
    with monkeypatch.context() as patch:
        patch.setattr(own, "capturing", lambda device: True)
        patch.setattr(own, "launcher", lambda *given, make=own.launcher: recorded(calls, make(*given)))
        for name in ("allocate", "upload", "download", "zero", "copy"):
            patch.setattr(own, name, None)
        captured = BACKEND.norm(squares, [])
        factor = captured.factor(1.0, 0.5)
        with pytest.raises(ValueError, match="grad_scale and max_norm"):
            captured.factor(1.0, 0.25)
        with pytest.raises(ValueError, match="other gradients"):
            BACKEND.norm([(squares[0][0], squares[0][1] + 8)], [])
    for times in (2.0, 1e200):
        array[...] = host[0] * times
        for call in calls:
            call()
        assert captured.value() == norm_on_host([[host[0] * times]])
        assert factor.copy_to_host()[0] == clip_factor(captured.value(), 0.5)
    assert before.value() == norm_on_host([host])


def recorded(calls, call):
    """A launch that is put into a graph."""
    return lambda: calls.append(call)


def test_a_norm_that_was_not_taken_before_cannot_be_captured(monkeypatch):
    [array] = on_device(gradients(DTYPES[0], [5]))
    squares = squares_of(BACKEND, DTYPES[0], [5])
    squares.sum(addresses_of([array]), 1.0)
    rows = Table(3, np.float32).gradients()[1]
    monkeypatch.setattr(driver.driver(), "capturing", lambda device: True)
    with pytest.raises(ValueError, match="before the capture"):
        BACKEND.norm([(squares, addresses_of([array]))], [])
    with pytest.raises(ValueError, match="gradients by rows"):
        BACKEND.norm([], [rows])


class Table:
    """Indices and gradients of one of two tables that were sorted together: more than one block of segments,
    rows named many times, and indices outside the table.

    Args:
        dim: of the rows. dtype: of the values. options: ``sourced`` for a source and weights, ``won`` for
            winners, ``skipped`` for a row without gradient.
    """

    ROWS, POSITIONS = 150, 400
    FIRST_ROW, FIRST_POSITION, BEFORE = 1000, 37, 9  # there are so many segments before the table's

    def __init__(self, dim, dtype, **options):
        rng = np.random.default_rng(dim)
        indices = rng.integers(0, self.ROWS, self.POSITIONS)
        indices[:90], indices[[5, 100]] = 7, self.ROWS  # what is outside has the row past the last
        order = np.argsort(indices, kind="stable")
        rows, starts = np.unique(indices[order], return_index=True)
        self.count, room = rows.size, self.FIRST_POSITION + self.POSITIONS
        self.order = np.full(room, -(2**20), np.int32)
        self.order[self.FIRST_POSITION :] = order + self.FIRST_POSITION
        self.starts, self.rows = np.full(room + 1, -(2**20), np.int32), np.full(room, -(2**40), np.int64)
        last = self.BEFORE + self.count
        self.rows[self.BEFORE : last] = rows + self.FIRST_ROW
        self.starts[self.BEFORE : last + 1] = [*(starts + self.FIRST_POSITION), room]
        self.skipped = 11 if options.get("skipped") else -1
        self.source = self.weights = self.winners = None
        height = self.POSITIONS
        if options.get("sourced"):
            height = 60
            self.source = rng.integers(0, height, self.POSITIONS).astype(np.int32)
            self.weights = rng.standard_normal(self.POSITIONS).astype(dtype)
        self.values = rng.standard_normal((height, dim)).astype(dtype)
        if options.get("won"):
            self.source, self.weights = rng.integers(0, height, self.POSITIONS).astype(np.int32), None
            self.winners = np.zeros((height, dim), np.int32)
            for j, at in enumerate(self.source):
                mine = rng.random(dim) < 0.5
                self.winners[at, mine] = order[j]
        assert self.count > 64 and self.skipped in (-1, *rows)

    def gradients(self):
        """The gradient on the CPU, without indices outside the table, and that on the device."""
        last = self.BEFORE + self.count - 1
        own = Segments(
            self.rows[self.BEFORE : last],
            self.order,
            self.starts[self.BEFORE : last + 1],
            self.FIRST_ROW,
            self.FIRST_POSITION,
        )
        more = self.source, self.weights, self.winners
        host = TableGradient(self.values, own, *more, self.skipped)
        bounds = upload(0, np.array([0, self.BEFORE, self.BEFORE + self.count], np.int64))
        arrays = (upload(0, array) for array in (self.order, self.starts, self.rows))
        own = DeviceSegments(
            *arrays, bounds, 1, self.FIRST_ROW, self.FIRST_POSITION, self.POSITIONS, self.ROWS
        )
        more = (None if array is None else upload(0, array) for array in more)
        return host, TableGradient(upload(0, self.values), own, *more, self.skipped)


ROWS = [{}, {"skipped": True}, {"sourced": True}, {"won": True, "skipped": True}]


@pytest.mark.parametrize("options", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_squares_of_rows_are_those_of_the_cpu(dtype, options):
    pairs = [Table(dim, dtype, **options).gradients() for dim in (1, 8, 37)]
    host, there = zip(*pairs, strict=True)
    want = cpu.sum_squares_rows(host, 0.3)
    assert ulps(BACKEND.sum_squares_rows(there, 0.3), want) <= 8
    assert want > 0


def test_norms_of_rows_and_arrays():
    tables = [Table(8, np.float32), Table(5, np.float64, sourced=True), Table(3, np.float32)]
    tables[1].values *= 1e200
    host, there = zip(*(table.gradients() for table in tables), strict=True)
    group = gradients(DTYPES[0], [300])
    norm, _alive = norm_on_device([group], there)
    over = 2.0**-540
    want = cpu.Squares(DTYPES[0], gradient_format(DTYPES[0]), [300]).sum(addresses_of(group), over)
    want += sum(cpu.sum_squares_rows([own], over) for own in host)
    assert ulps(norm.value(), math.sqrt(want) / over) <= 8


def test_bits_do_not_depend_on_the_grid(monkeypatch):
    """Nor on what a launch takes to be the number of tables."""
    there = [Table(dim, np.float32).gradients()[1] for dim in (8, 37)]
    groups = [gradients(dtype) for dtype in DTYPES[:2]]
    usual = norm_on_device(groups, there)[0].value()
    monkeypatch.setattr(launches, "MOST_BLOCKS", 2)
    assert norm_on_device(groups, there)[0].value() == usual
