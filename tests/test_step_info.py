"""What a step answers: values like those of a tuple, some of which may be on their way."""

import copy
import pickle

import pytest

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
