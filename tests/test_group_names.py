"""Names of groups: kept, told in messages, saved and restored; none of the optimizer's options."""

import copy
import pickle
import re

import numpy as np
import pytest

import fastopt


def named(*names, **options):
    groups = [{"params": np.ones((3, 2), np.float32)} for _ in names]
    for group, name in zip(groups, names, strict=True):
        if name is not None:
            group["name"] = name
    return fastopt.Adam(groups, **options)


def names_of(opt):
    return [group.get("name") for group in opt.param_groups]


def test_names_stand_among_the_options_of_their_groups():
    opt = named("table", None, "")
    assert names_of(opt) == ["table", None, ""] and "name" not in opt.param_groups[1]
    opt.step([np.ones((3, 2), np.float32)] * 3)
    opt.param_groups[1]["name"] = "other"
    opt.step([np.ones((3, 2), np.float32)] * 3)
    assert names_of(opt) == ["table", "other", ""]
    assert "'table', 1 array, 6 parameters: lr=" in repr(opt)
    for copied in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert names_of(copied) == ["table", "other", ""]


def test_names_change_no_bit():
    options = {"rows": "dense", "weight_decay": 0.1}
    optimizers = named("a", "b", **options), named(None, None, **options)
    for step in range(3):
        own = fastopt.IndexedSlices(np.array([step]), np.ones((1, 2), np.float32))
        for opt in optimizers:
            opt.step([own, own])
        optimizers[0].param_groups[0]["name"] = f"step {step}"
    for opt in optimizers:
        opt.flush()
    for one, other in zip(*(opt.param_groups for opt in optimizers), strict=True):
        np.testing.assert_array_equal(one["params"], other["params"])


def test_messages_tell_the_name():
    opt = named(None, "table")
    opt.param_groups[1]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"lr of params\[1\] \('table'\) is -1.0"):
        opt.step([None, None])
    with pytest.raises(ValueError, match=r"params\[0\] \('table'\) has the option 'lrr'"):
        fastopt.Adam([{"params": np.ones(2), "name": "table", "lrr": 1}])
    opt.param_groups[1]["name"] = "renamed"
    with pytest.raises(ValueError, match=r"lr of params\[1\] \('renamed'\) is -1.0"):
        opt.step([None, None])


@pytest.mark.parametrize("wrong", [5, None, ["a"]])
def test_a_name_is_a_text(wrong):
    with pytest.raises(TypeError, match=rf"name of params\[0\] is {re.escape(repr(wrong))}: expected a str"):
        fastopt.Adam([{"params": np.ones(2), "name": wrong}])
    opt = named("table")
    opt.param_groups[0]["name"] = wrong
    with pytest.raises(TypeError, match=r"name of params\[0\] is .*: expected a str"):
        opt.step([None])
    with pytest.raises(TypeError, match="unexpected keyword argument 'name'"):
        fastopt.Adam(np.ones(2), name="table")


@pytest.mark.parametrize("by_file", [False, True])
def test_names_are_saved_and_restored(by_file, tmp_path):
    opt = named("table", "other", None)
    opt.step([np.ones((3, 2), np.float32)] * 3)

    def restored(into, **options):
        if by_file:
            opt.save(tmp_path / "opt")
            into.load(tmp_path / "opt", **options)
        else:
            into.load_state_dict(opt.state_dict(), **options)
        assert into.steps == 1
        into.step([np.ones((3, 2), np.float32)] * 3)
        return names_of(into)

    assert restored(named(None, "before", "own")) == ["table", "other", "own"]
    assert restored(named(None, "before", "own"), options=False) == [None, "before", "own"]


def test_a_saved_name_is_checked():
    state = named("table").state_dict()
    assert state["param_groups"][0]["name"] == "table"
    state["param_groups"][0]["name"] = 7
    opt = named("own")
    with pytest.raises(TypeError, match=r"name of state_dict\['param_groups'\]\[0\] is 7: expected a str"):
        opt.load_state_dict(state)
    assert names_of(opt) == ["own"]
