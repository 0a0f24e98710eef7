"""Checkpoints of sharded tables on other ranks, with other plans, and in one process."""

import pytest
import sharded
import torch

import fastopt.distributed as fd
import fastopt.torch as ft

MAKERS = {"Adam": "columns", "RowwiseAdagrad": "rows"}


@pytest.mark.parametrize("make", MAKERS)
def test_checkpoints_move_between_ranks_and_plans(ranks, make, tmp_path):
    model, optimizer = sharded.model_of_one(make)
    sharded.train_on_one(model, optimizer, 0, 6)  # first: what it compiles, the ranks load
    chain = [(4, "uneven", 0) if make == "Adam" else (4, "rows", 0), (2, "rows", 2), (4, MAKERS[make], 4)]
    for number, (count, plan, first) in enumerate(chain):
        folders = str(tmp_path / f"{number - 1}") if number else None, str(tmp_path / f"{number}")
        ranks.run(sharded.go_on, count, plan, make, first, *folders)
    other, its_optimizer = sharded.model_of_one(make)
    state = fd.TrainingState(other, its_optimizer)
    assert fd.latest(tmp_path) == tmp_path / "2"
    assert state.load(tmp_path / "2") == {"next": 6}
    for got, want in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(got, want)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[p].keys() == its_optimizer.state[q].keys()
        for key, want in optimizer.state[p].items():
            assert torch.equal(its_optimizer.state[q][key], want), key
    sharded.train_on_one(model, optimizer, 6, 7)
    sharded.train_on_one(other, its_optimizer, 6, 7)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_save_in_the_background_is_of_the_instant_when_it_began(ranks, tmp_path):
    ranks.run(sharded.saved_in_the_background, str(tmp_path))
    found = []
    for name in ("now", "later"):
        model, optimizer = sharded.model_of_one("Adam")
        fd.TrainingState(model, optimizer).load(tmp_path / name)
        found.append([*model.parameters(), *(own["exp_avg"] for own in optimizer.state.values())])
    for now, later in zip(*found, strict=True):
        assert torch.equal(now, later)


def test_what_does_not_fit_is_refused(tmp_path):
    model, optimizer = sharded.model_of_one("Adam")
    sharded.train_on_one(model, optimizer, 0, 1)
    state = fd.TrainingState(model, optimizer)
    assert fd.latest(tmp_path) is None
    state.save(tmp_path / "a", progress=3)
    with pytest.raises(FileExistsError, match="is a checkpoint"):
        state.save(tmp_path / "a")
    with pytest.raises(ValueError, match="that is not the model's"):
        fd.TrainingState(model, ft.SGD([torch.nn.Parameter(torch.zeros(3))]))
    half = ft.Adam([*model.parameters()][:2])
    with pytest.raises(ValueError, match=r"the checkpoint has state of '.*': expected one of"):
        fd.TrainingState(model, half).load(tmp_path / "a")
    two = ft.Adam([{"params": [p]} for p in model.parameters()])
    with pytest.raises(ValueError, match=r"optimizers\[0\] has groups of"):
        fd.TrainingState(model, two).load(tmp_path / "a")
