"""What does not fit is refused by every rank, and copies and batches ahead are what they were made of."""

import misfits
import pytest
import torch
from ranks import Ranks

WHEN_MADE = {
    "features": "features.a is ['x', 'y'] on rank 0 and ['x'] on rank 1",
    "kind": "the kind of plan['a'] is 'Whole' on rank 0 and 'ByRows' on rank 1",
    "one weight": "tables['a'] and tables['b'] have the same weight",
    "hook": "tables['a'] does more than look up",
    "parametrized": "tables['a'] does more than look up",
}


@pytest.mark.parametrize("case", WHEN_MADE)
def test_collections_that_do_not_fit_are_not_made(ranks, case):
    for told in ranks.run(misfits.refused_when_made, case):
        assert told.startswith("ValueError") and WHEN_MADE[case] in told


def test_processes_outside_of_the_group_are_refused():
    own = Ranks(4)
    try:
        *_, told = own.run(misfits.refused_when_made, "no group")
        *_, of_checkpoints = own.run(misfits.outside)
    finally:
        own.close()
    assert told == of_checkpoints == "ValueError: process 3 is not in group: expected its members alone"


IN_FORWARD = {
    "frozen": "tables['b'].requires_grad is True on rank 0 and False on rank 1",
    "double": "tables['a'].dtype is 'torch.float32' on rank 0 and 'torch.float64' on rank 1",
    "one table": "tables are of torch.float32 on cpu, torch.float64 on cpu",
    "rows": "rows is 'dense' in the group of table 'a'",
    "rule": "the optimizer of tables ['a', 'b'] is 'Adam' on rank 0 and 'SGD' on rank 1",
    "rate": "the group of tables ['a', 'b'].lr is 0.10000000149011612 on rank 0 and 0.050000",
    "Adafactor": "table 'b' is split, rows, on all ranks, and Adafactor needs the whole of it",
}


@pytest.mark.parametrize("case", IN_FORWARD)
def test_collections_that_no_longer_fit_are_not_called(ranks, case):
    for told in ranks.run(misfits.refused_in_forward, case):
        assert told.startswith("ValueError") and IN_FORWARD[case] in told


def test_tables_are_no_replicas(ranks):
    for told in ranks.run(misfits.refused_in_forward, "replicas"):
        assert told.startswith("ValueError: tables.a.weight is part of a table, and DistributedDataParallel")
    assert all(ranks.run(misfits.within_replicas))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_may_have_weights_of_no_indices(ranks, dtype):
    sizes = [len(own) for own in ranks.run(misfits.without_indices, dtype)]
    assert sizes == [2, 0, 2, 2]


def test_tables_on_the_meta_device_have_different_numbers(ranks):
    for answer in ranks.run(misfits.numbers_on_meta):
        for first, second in answer:
            assert first.shape == second.shape and not (first == second).any()


def test_copies_are_parts_of_tables_without_what_is_on_its_way(ranks):
    for answer in ranks.run(misfits.copies):
        assert len(answer) == 4 and all("clip_norm sees the parts of tables" in told for told in answer)


def test_a_batch_ahead_is_what_it_was(ranks):
    for ahead, later in ranks.run(misfits.weights_of_a_batch_ahead):
        assert ahead.all() and later is None


def test_checkpoints_that_one_rank_refuses_are_refused_by_all(ranks, tmp_path):
    (saved, loaded), (own_saved, own_loaded), *_ = ranks.run(misfits.refused_by_one, str(tmp_path))
    assert saved.startswith("ValueError: rank 1 was refused: ") and "pickle" in own_saved
    assert loaded.startswith("ValueError: rank 1 was refused: FileNotFoundError")
    assert own_loaded.startswith("FileNotFoundError")


def test_adafactor_goes_on_where_tables_are_whole(ranks, tmp_path):
    answers = ranks.run(misfits.adafactor, str(tmp_path / "saved"))
    assert torch.equal(answers[1][0]["a"], answers[2][1]["a"]) and answers[1][0]["a"].numel()
    assert torch.equal(answers[0][0]["b"], answers[0][1]["b"])


OF_ANOTHER = {
    "rows": "ValueError: model.tables.tables.b.weight has shape (21, 8): expected (20, 8), the checkpoint's",
    "tables": "ValueError: the checkpoint has no 'model.tables.tables.c.weight'",
    "groups": "ValueError: optimizers[0] has groups of",
}


@pytest.mark.parametrize("case", OF_ANOTHER)
def test_checkpoints_of_another_model_change_nothing(ranks, tmp_path, case):
    for told, same in ranks.run(misfits.loaded_by_another, str(tmp_path / "saved"), case):
        assert told.startswith(OF_ANOTHER[case]) and same


def test_a_save_waits_for_the_last_one(ranks, tmp_path):
    assert ranks.run(misfits.two_saves_at_once, str(tmp_path)) == [["a", "b"]] * 4
