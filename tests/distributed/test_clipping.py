"""Gradients are clipped by the norm of all of them, wherever they are."""

import math

import clipped
import pytest
import sharded
import torch

from fastopt.distributed import clip_grad_norm_
from fastopt.torch import EmbeddingBag


@pytest.mark.parametrize("limit", [0.5, 1e9])
@pytest.mark.parametrize(("count", "plan"), [(2, "rows"), (2, "columns"), (4, "uneven")])
def test_norms_and_gradients_are_those_of_one_process(ranks, count, plan, limit):
    norm, of_tables, of_layer = clipped.on_one(count, limit)
    assert 1 < norm < 1e9
    answers = ranks.run(clipped.on_each, count, plan, limit)[:count]
    for _, _, own, gradients in answers:
        assert own == pytest.approx(norm, rel=1e-6)
        torch.testing.assert_close(gradients, of_layer, rtol=1e-5, atol=1e-6)
    for name, want in of_tables.items():
        got = sharded.assembled(answers, name, lambda rest, name=name: rest[0][name], want)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_without_a_process_group_it_is_torchs():
    """Rows named several times, a sum of lookups, a sparse and a half gradient, and none."""
    torch.manual_seed(0)
    bag, other = EmbeddingBag(5, 3, mode="sum"), torch.nn.Embedding(4, 3, sparse=True)
    half, alone = torch.nn.Linear(3, 2, dtype=torch.bfloat16), torch.nn.Linear(2, 2)
    model = torch.nn.ModuleList([bag, other, half, alone])
    indices = torch.tensor([[1, 1, 2], [2, 0, 1]])
    for _ in range(2):
        out = bag(indices) + other(torch.tensor([1, 1]))
        half(out.bfloat16()).float().square().sum().backward()
    want = [p.grad.to_dense().clone() for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([own.float() for own in want])
    assert clip_grad_norm_(model, 0.1) == pytest.approx(float(norm), rel=1e-6)
    factor = 0.1 / (norm + 1e-6)
    for p, own in zip([p for p in model.parameters() if p.grad is not None], want, strict=True):
        tolerance = 1e-2 if own.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(p.grad.to_dense(), own * factor.to(own.dtype), rtol=tolerance, atol=1e-7)
    assert len(bag.weight.grad.lookups) == 2  # still by rows


def test_norms_that_are_not_finite():
    layer = torch.nn.Linear(2, 1)
    layer.weight.grad, layer.bias.grad = torch.tensor([[math.nan, 1.0]]), torch.ones(1)
    assert math.isnan(clip_grad_norm_(layer, 1.0))
    assert layer.bias.grad.isnan().all()
    layer.weight.grad, layer.bias.grad = torch.tensor([[math.inf, 1.0]]), torch.ones(1)
    assert clip_grad_norm_(layer, 1.0) == math.inf
    assert layer.bias.grad.item() == 0


@pytest.mark.parametrize("limit", [-1, "1", None])
def test_limits_that_are_refused(limit):
    with pytest.raises((TypeError, ValueError), match="max_norm is"):
        clip_grad_norm_(torch.nn.Linear(2, 1), limit)
