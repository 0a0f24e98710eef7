"""Missed steps: rows take them all at once, and come to where steps one by one would have led."""

import math

import numpy as np
import pytest
from backend.launches import (
    ADAM,
    SINGLE,
    StoredAdam,
    adam_numbers,
    adam_spec,
    adam_state,
    assert_close,
    assert_same,
    decay_numbers,
    segments,
    stepped,
)

from fastopt._core import backend as seam
from fastopt.kernels import rules
from fastopt.kernels.rule import L2, Decoupled, Scaled
from fastopt.kernels.work import TableGradient

BASE, NOW, ROWS, DIM = 3, 15, 12, 5
LRS = [0.25 * (1 + math.sin(step)) for step in range(BASE + 1, NOW + 1)]  # of each step after BASE
LAST_STEPS = np.array([15, 3, 4, 14, 3, 9, 15, 10, 3, 13, 12, 5])
# an approximation, of whose error kernels/catch_up.py says more; relative to how far a row moves
ERROR = 1e-5


def one_by_one(arrays, last_step, decay, now=NOW):
    """A row under steps with a zero gradient, after ``last_step`` up to ``now``, and how far it moved."""
    way = np.zeros(arrays[0].shape)
    for step in range(last_step + 1, now + 1):
        lr = LRS[step - BASE - 1]
        before = arrays[0]
        numbers = adam_numbers(step, lr), decay_numbers(decay, lr=lr)
        arrays = stepped(*numbers, before, np.zeros(DIM), *arrays[1:])
        way += np.abs(arrays[0] - before)
    return arrays, way


class Behind:
    """A table whose rows are up to date with the steps LAST_STEPS, and its history."""

    def __init__(self, device, rng, decay):
        self.device, self.decay = device, decay
        self.before = adam_state(rng, (ROWS, DIM))
        self.table = StoredAdam(device, *self.before, together=True)
        self.last_step = device.put(LAST_STEPS)
        self.history = device.backend.History(rules.ADAM, decay, dict(ADAM), BASE)
        for lr in LRS:
            self.device.backend.run(self.history.advance(lr))

    @property
    def spec(self):
        # the learning rate is the history's
        h, c = adam_numbers(NOW, 0.0), decay_numbers(self.decay, lr=0.0)
        return adam_spec(self.decay, mode=self.history.kind())._replace(h=h, c=c)

    def row(self, k, dtype=SINGLE):
        return [array[k].astype(dtype) for array in self.before]

    def catch_up(self, rows):
        count = ROWS if rows is None else rows.size
        row_steps = self.history.of_rows(self.last_step, count, SINGLE)
        given = None if rows is None else segments(self.device, rows, ROWS)
        launch = self.device.backend.catch_up(self.spec, self.table.stored, row_steps, NOW, given)
        calls = launch.prepare()
        assert_same(self.table.got(), self.before)
        np.testing.assert_array_equal(self.device.get(self.last_step), LAST_STEPS)
        self.device.backend.run(calls)
        return self.table.got(), self.device.get(self.last_step)

    def check_close(self, got, k, expected, way):
        p, *state = expected
        assert np.abs(p - self.before[0][k]).max() > 1e-3
        error = np.abs(got[0][k] - p)
        assert (error <= ERROR * way + 4 * np.finfo(np.float32).eps * np.abs(p)).all()
        for array, own in zip(got[1:], state, strict=True):
            assert_close(array[k], own, 4)


@pytest.mark.covers("History")
def test_history_keeps_the_steps(device):
    history = device.backend.History(rules.ADAM, Decoupled, dict(ADAM), BASE)
    names = {*seam.History.__annotations__, *vars(seam.History)}
    assert all(hasattr(history, name) for name in names if not name.startswith("_"))
    assert (history.base, history.now, history.full, list(history.lrs)) == (BASE, BASE, False, [])
    for k, lr in enumerate(LRS):
        device.backend.run(history.advance(lr))
        assert (history.base, history.now) == (BASE, BASE + k + 1)
    assert history.lrs.dtype == np.float64
    assert list(history.lrs) == LRS and isinstance(history.kind, type)
    for lr in (8.0, 9.0):  # times a weight decay of 1/8
        with pytest.raises(ValueError, match="lr \\* weight_decay"):
            device.backend.run(history.advance(lr))
        assert history.now == NOW and list(history.lrs) == LRS
    device.backend.run(history.advance(7.0))
    assert history.now == NOW + 1 and history.lrs[-1] == 7.0


@pytest.mark.covers("History")
def test_history_is_full_at_some_time(device):
    history = device.backend.History(rules.SGD, Scaled, {"weight_decay": 0.0}, 0)
    for _ in range(history.MOST_STEPS):
        assert not history.full
        device.backend.run(history.advance(0.5))
    assert history.full and history.lrs.size == history.MOST_STEPS


@pytest.mark.covers("History", "catch_up")
@pytest.mark.parametrize("rows", [None, np.array([8, 0, 11, 3])], ids=["all", "some"])
def test_rows_catch_up(device, rng, rows):
    behind = Behind(device, rng, Decoupled)
    got, last_step = behind.catch_up(rows)
    for k in range(ROWS):
        if LAST_STEPS[k] == NOW or (rows is not None and k not in rows):
            assert_same([array[k] for array in got], behind.row(k))  # as it was
            assert last_step[k] == LAST_STEPS[k]
        else:
            expected = one_by_one(behind.row(k, np.float64), LAST_STEPS[k], behind.decay)
            behind.check_close(got, k, *expected)
            assert last_step[k] == NOW


@pytest.mark.covers("History", "catch_up")
def test_rows_catch_up_step_by_step_where_there_is_no_other_way(device, rng):
    """With an L2 penalty Adam has no closed form, and the bits are those of single steps."""
    behind = Behind(device, rng, L2)
    got, last_step = behind.catch_up(None)
    for k in range(ROWS):
        expected, _ = one_by_one(behind.row(k), LAST_STEPS[k], behind.decay)
        assert_same([array[k] for array in got], expected)
    assert (last_step == NOW).all()


@pytest.mark.covers("History", "update_rows", "segments_of")
def test_rows_catch_up_before_their_update(device, rng):
    behind = Behind(device, rng, Decoupled)
    indices = np.array([4, 6, 4, 1, 11])
    values = rng.normal(size=(5, DIM)).astype(np.float32)
    h, c = adam_numbers(NOW + 1, 0.5), decay_numbers(Decoupled, 0.5, lr=0.5)
    found = segments(device, indices, ROWS)
    row_steps = behind.history.of_rows(behind.last_step, 4, SINGLE)
    gradient = TableGradient(device.put(values), found)
    work = behind.table.work(gradient, (*h, *c), step=NOW + 1, row_steps=row_steps)
    launch = device.backend.update_rows(behind.spec._replace(h=h, c=c), [work])
    device.backend.run(launch.prepare())
    got, last_step = behind.table.got(), device.get(behind.last_step)
    for k in range(ROWS):
        if k not in indices:
            assert_same([array[k] for array in got], behind.row(k))
            assert last_step[k] == LAST_STEPS[k]
            continue
        arrays, way = one_by_one(behind.row(k, np.float64), LAST_STEPS[k], behind.decay)
        g = values[indices == k].astype(np.float64).sum(axis=0)
        new = stepped(h, c, arrays[0], g, *arrays[1:])
        p, m, v = (array[k] for array in got)
        error = np.abs(p - new[0])
        assert (error <= ERROR * way + 8 * np.finfo(np.float32).eps * (1 + np.abs(p))).all()
        assert_close(m, new[1], 8, 1 + np.abs(new[1]))
        assert_close(v, new[2], 8)
        assert last_step[k] == NOW + 1
