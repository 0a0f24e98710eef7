"""Our optimizers train dense parameters over several ranks as torch's do."""

import pytest
import replicas
import torch

CASES = {
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "Adagrad": {"lr": 0.01},
    "AdamW": {"lr": 0.01},
    "RAdam": {"lr": 0.01},
}


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", replicas.WAYS)
def test_training_is_that_of_torch(ranks, way, name, clip):
    answers = ranks.run(replicas.both, way, name, CASES[name], clip)
    for ours, theirs in answers:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert all(map(torch.equal, ours[0], answers[0][0][0]))  # parameters, to the bit on all ranks


def test_checkpoints_of_shards_go_on_to_the_bit(ranks, tmp_path):
    for went_on, resumed in ranks.run(replicas.resumed, str(tmp_path)):
        assert all(map(torch.equal, went_on, resumed))
