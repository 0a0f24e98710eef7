"""What a step answers: values like those of a tuple, some of which may be on their way."""

import copy
import pickle

import numpy as np
import pytest

import fastopt
from fastopt import StepInfo


class Norm:
    """A norm that replays change."""

    found = 2.0

    def value(self):
        return self.found


@pytest.mark.parametrize("given", [(), (2.0, True), (None, False, True, "w"), (float("inf"), False, True, 3)])
def test_its_values_are_attributes_and_a_sequence(given):
    info = StepInfo(*given)
    values = (*given, *(None, False, False, None)[len(given) :])
    norm, clipped, skipped, nonfinite = info
    assert (norm, clipped, skipped, nonfinite) == values
    assert (info.norm, info.clipped, info.skipped, info.nonfinite) == values
    assert tuple(info) == values == info[:]
    assert info == values
    assert info == StepInfo(*values)
    assert hash(info) == hash(StepInfo(*values)) == hash(values)
    assert len(info) == 4
    assert info[-1] == nonfinite


def test_others_are_not_equal():
    infos = [
        StepInfo(),
        StepInfo(1.0),
        StepInfo(1.0, True),
        StepInfo(1.0, True, True),
        StepInfo(nonfinite="a"),
    ]
    assert [[one == other for other in infos] for one in infos] == [
        [i == j for j in range(len(infos))] for i in range(len(infos))
    ]
    assert StepInfo() != (None, False, False)
    assert StepInfo() != [None, False, False, None]


def test_it_names_its_values():
    text = "StepInfo(norm=2.0, clipped=True, skipped=False, nonfinite=None)"
    assert repr(StepInfo(2.0, clipped=True)) == text
    assert eval(text) == StepInfo(2.0, True)


@pytest.mark.parametrize("name", ["norm", "clipped", "skipped", "nonfinite", "other"])
def test_it_can_not_be_changed(name):
    with pytest.raises(AttributeError):
        setattr(StepInfo(), name, None)


def test_learning_rates_stand_beside_the_values():
    info = StepInfo(2.0, True, rates=[0.5])
    assert info.lr == 0.5 and type(info.lr) is float
    assert info == StepInfo(2.0, True) and len(info) == 4
    assert StepInfo(rates=[0.5, 0.25]).lr == (0.5, 0.25)
    for copied in (copy.copy(info), pickle.loads(pickle.dumps(info))):
        assert copied.lr == 0.5 and copied == info
    with pytest.raises(AttributeError):
        info.lr = 1.0


def test_it_matches_patterns():
    match StepInfo(2.0, skipped=True, nonfinite="w"):
        case StepInfo(_, _, True, name):
            assert name == "w"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda info: pickle.loads(pickle.dumps(info))])
def test_copies_hold_the_values(copied):
    norm = Norm()
    info = StepInfo.unread(norm, 0.5, 0.25)
    found = copied(info)
    norm.found = 0.0
    assert found == StepInfo(1.0, True)
    assert info == StepInfo(0.0, False)


def test_a_norm_on_its_way_is_read_at_each_question():
    norm = Norm()
    info = StepInfo.unread(norm, 0.5, 3.0)
    assert (info.norm, info.clipped, info.skipped, info.nonfinite) == (1.0, False, False, None)
    norm.found = 8.0
    assert (info.norm, info.clipped) == (4.0, True)
    norm.found = float("nan")
    assert info.norm != info.norm
    assert info.clipped


def test_a_norm_that_clips_nothing_is_read_too():
    norm = Norm()
    info = StepInfo.unread(norm, 0.5, None, [0.1])
    assert info == (1.0, False, False, None) and info.lr == 0.1
    norm.found = float("nan")
    assert not info.clipped


def test_steps_say_their_learning_rates():
    params, g = [np.zeros(2), np.zeros(2)], np.array([3.0, 4.0])
    opt = fastopt.SGD(params[0], lr=2.0 * fastopt.schedules.step(1, 0.5))
    assert [opt.step(g).lr for _ in range(3)] == [2.0, 1.0, 0.5]
    assert opt.step(g, clip_norm=1.0).lr == 0.25
    skipped = opt.step(np.array([np.inf, 0]), skip_nonfinite=True)
    assert skipped.skipped and skipped.lr == 0.125 == opt.step(g, skip_nonfinite=True).lr
    groups = [{"params": params[0], "lr": 0.5}, {"params": params[1]}]
    opt = fastopt.SGD(groups, lr=0.25)
    first = opt.step([g, g])
    opt.param_groups[1]["lr"] = 1.0
    second = opt.step([g, g], norm=True)
    assert (first.lr, second.lr) == ((0.5, 0.25), (0.5, 1.0))


def test_a_step_finds_the_norm_that_is_asked_for():
    p = np.zeros(2)
    opt = fastopt.SGD(p, lr=1.0)
    assert opt.step(np.array([3.0, 4.0]), norm=True, grad_scale=0.5) == (2.5, False, False, None)
    np.testing.assert_array_equal(p, [-1.5, -2.0])  # which nothing was clipped to
    assert opt.step(np.array([3.0, 4.0]), norm=False).norm is None
    assert opt.step(np.array([3.0, 4.0]), norm=True, clip_value=0.5) == (5.0, False, False, None)
    for wrong in (1, "yes", None):
        with pytest.raises(TypeError, match=f"norm is {wrong!r}: expected True or False"):
            opt.step(np.array([3.0, 4.0]), norm=wrong)
    assert opt.steps == 3
