"""Tables shared out over ranks give what one process or GPU gives, bit for bit."""

import re
from pathlib import Path

import pytest
import sharded
import torch

DOCS = Path(__file__).parents[2] / "docs" / "distributed.md"


CASES = {
    "whole, Adam": (2, {"plan": "whole", "make": "Adam"}),
    "rows, Adam": (2, {"plan": "rows", "make": "Adam"}),
    "columns, Adam": (2, {"plan": "columns", "make": "Adam"}),
    "uneven, Adam, fused": (2, {"plan": "uneven", "make": "Adam", "fused": True}),
    "rows, row-wise, fused, 4 ranks": (
        4,
        {"plan": "rows", "make": "RowwiseAdagrad", "fused": True},
    ),
    "rows, LAMB, 4 ranks": (4, {"plan": "rows", "make": "LAMB"}),
    "uneven, SGD, 4 ranks": (4, {"plan": "uneven", "make": "SGD"}),
    "columns, AdaGrad, 4 ranks": (4, {"plan": "columns", "make": "Adagrad"}),
    "rows, Adam, by frequency": (2, {"plan": "rows", "make": "Adam", "scale_grad_by_freq": True}),
    "uneven, bfloat16": (4, {"plan": "uneven", "make": "SGD", "dtype": torch.bfloat16}),
    "rows, ahead": (2, {"plan": "rows", "make": "SGD", "ahead": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_training_has_the_bits_of_one_process(ranks, case):
    assert_bits_of_one_process(ranks, *CASES[case])


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_training_on_gpus_has_the_bits_of_one(gpus, case):
    """By NCCL. One GPU can have tables by rows alone here: other plans name the second rank."""
    _, arguments = CASES[case]
    if gpus.count == 1 and arguments["plan"] != "rows":
        pytest.skip(f"{case} needs two GPUs")
    assert_bits_of_one_process(gpus, gpus.count, {**arguments, "device": "cuda"})


def assert_bits_of_one_process(ranks, count, arguments):
    alike = {name: own for name, own in arguments.items() if name not in ("plan", "ahead")}
    weights, state, gradients = sharded.on_one(count, **alike)
    answers = ranks.run(sharded.on_each, count, arguments)[:count]
    for name, want in weights.items():
        assert torch.equal(
            sharded.assembled(answers, name, lambda rest, name=name: rest[0][name], want), want
        )
        for key, own in state[name].items():
            parts = sharded.assembled(
                answers, name, lambda rest, at=(name, key): rest[1][at[0]].get(at[1]), own
            )
            assert torch.equal(parts, own), (name, key)
    for step, want in enumerate(gradients):
        got = torch.cat([answer[3][step] for answer in answers])
        if arguments["plan"] == "columns":  # products are added up by parts of rows
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(got, want)


REFUSED_WHEN_MADE = {
    "rows": "tables['a'].rows is 50 on rank 0 and 51 on rank 1",
    "names": "names of tables is ['a', 'b', 'c', 'd'] on rank 0 and ['a', 'b', 'c', 'e'] on rank 1",
    "plan": "plan['a'] is [(0, 0, 0, 8), (0, 50, 0, 8), (0, 0, 0, 8), (0, 0, 0, 8)] on rank 0 and",
    "wire": "wire_dtype is 'None' on rank 0 and 'torch.bfloat16' on rank 1",
    "bad": "plan['c'] is by rows and the table's mode 'max'",
}


@pytest.mark.parametrize("change", REFUSED_WHEN_MADE)
def test_ranks_that_do_not_fit_together_are_refused(ranks, change):
    told = ranks.run(sharded.refused_when_made, change)
    assert all(own.startswith("ValueError") and REFUSED_WHEN_MADE[change] in own for own in told)
    if change == "bad":
        assert told[0].startswith("ValueError: rank 1 was refused")


REFUSED_IN_FORWARD = {
    "index": "inputs['x'].indices holds 50: expected every index in [0, 50), the rows of the table",
    "feature": "inputs has the features ['b', 'c', 'd', 'y']: expected",
    "kind": "'list' object has no attribute 'keys'",
    "bags": "inputs have these numbers of bags: {'x': 3, 'y': 3, 'b': 3, 'c': 2, 'd': 3}",
    "weights": "inputs['y'] has per_sample_weights on rank 0 and none on rank 1",
    "grad": "whether there is a backward pass is True on rank 0 and False on rank 1",
    "rule": "table 'a' is placed by columns, and RowwiseAdagrad needs whole rows",
}


@pytest.mark.parametrize("change", REFUSED_IN_FORWARD)
def test_a_batch_that_does_not_fit_is_refused_by_all_ranks(ranks, change):
    told = ranks.run(sharded.refused_in_forward, change)
    assert all(REFUSED_IN_FORWARD[change] in own for own in told)
    if change in ("index", "feature", "bags"):
        assert told[0].startswith("RuntimeError: the batch of rank 1 does not fit")
        assert told[1].startswith("ValueError: inputs")


def test_what_travels_may_be_rounded(ranks):
    for of_results, of_updates in ranks.run(sharded.rounded_on_the_wire, 4):
        assert 0 < of_results < 2**-8 and 0 < of_updates < 2**-7


def test_parts_of_tables_without_numbers_are_drawn(ranks):
    whole = torch.cat(ranks.run(sharded.drawn))
    assert whole.shape == (4000, 8) and not whole[3].any()
    assert len(whole.unique()) > 0.99 * whole.numel()
    assert abs(whole.mean()) < 0.02 and abs(whole.std() - 1) < 0.02


@pytest.mark.parametrize("count, plan", [(2, "whole"), (2, "rows"), (4, "rows"), (4, "columns")])
def test_bytes_sent_are_those_of_the_formulas(ranks, count, plan):
    for sent, (expected, arrays) in ranks.run(sharded.bytes_sent, count, plan)[:count]:
        assert [sent[0], *sent[2:]] == [expected[0], *expected[2:]]
        assert expected[1] <= sent[1] < expected[1] + 8 * arrays


# Dense parameters


def test_clipping_is_by_the_norm_of_all_ranks(ranks):
    norms, tables, dense = sharded.on_one_clipped()
    answers = ranks.run(sharded.on_each_clipped)
    for answer in answers:
        assert answer[3] == pytest.approx(norms, rel=1e-6)
        assert answer[3] == answers[0][3]
        for got, want in zip(answer[2], dense, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert "clip_norm sees the parts of tables that lie here alone" in answer[4]
    for name, want in tables.items():
        got = sharded.assembled(answers, name, lambda rest, name=name: rest[0][name], want)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_example_of_the_docs_trains(ranks):
    source = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[1]
    small = source.replace("10_000_000", "1_000").replace('dist.init_process_group("gloo")', "")
    for losses in ranks.run(sharded.example, small):
        assert losses[-1] < losses[0] / 2
