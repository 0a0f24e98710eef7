"""Embedding modules beside torch's: results, gradients, and training."""

import itertools

import numpy as np
import pytest
import torch

import fastopt.torch
from fastopt.torch.row_gradients import RowGradients

ROWS, DIM = 12, 5
DTYPES = [torch.float32, torch.float64]


def tables(name, dtype=torch.float64, **options):
    """A module of ours and one of torch with the same weights."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(ROWS, DIM, dtype=dtype, **options)
    ours = getattr(fastopt.torch, name)(ROWS, DIM, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def bags(seed, integers=torch.int64, last=False, width=None):
    rng = np.random.default_rng(seed)
    if width is not None:
        return torch.from_numpy(rng.integers(0, ROWS, (4, width))).to(integers), None
    lengths = rng.integers(0, 4, 6)
    offsets = np.concatenate([[0], np.cumsum(lengths)])[: None if last else -1]
    indices = torch.from_numpy(rng.integers(0, ROWS, int(lengths.sum()))).to(integers)
    return indices, torch.from_numpy(offsets).to(integers)


def assert_same(one, other, limit=1e-12):
    torch.testing.assert_close(one, other, rtol=limit, atol=limit)


OPTIONS = [
    {"mode": mode, **own}
    for mode, own in itertools.product(
        ("sum", "mean", "max"),
        (
            {},
            {"padding_idx": 3},
            {"padding_idx": -1},
            {"include_last_offset": True},
        ),
    )
]


@pytest.mark.parametrize("integers", [torch.int64, torch.int32])
@pytest.mark.parametrize("width", [None, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bags_and_their_gradients_are_those_of_torch(options, width, integers):
    if width is not None and "include_last_offset" in options:
        pytest.skip("there are no offsets")
    ours, theirs = tables("EmbeddingBag", **options)
    for seed in range(3):
        indices, offsets = bags(seed, integers, options.get("include_last_offset", False), width)
        got, want = ours(indices, offsets), theirs(indices, offsets)
        assert_same(got, want)
        factors = torch.randn_like(want)
        (got * factors).sum().backward()
        (want * factors).sum().backward()
        assert isinstance(ours.weight.grad, RowGradients)
        assert_same(ours.weight.grad.dense(), theirs.weight.grad)
        assert len(ours.weight.grad.lookups) == seed + 1  # passes add up


@pytest.mark.parametrize("padding", [None, 5])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_gradients_are_divided_by_how_often_an_index_is_named(mode, padding):
    """As torch's documentation has it; its kernel for the CPU takes the counts of other indices."""
    ours, theirs = tables("EmbeddingBag", mode=mode, padding_idx=padding)
    ours.scale_grad_by_freq = True
    indices, offsets = bags(3)
    ours(indices, offsets).square().sum().backward()
    theirs(indices, offsets).square().sum().backward()
    counts = torch.bincount(indices, minlength=ROWS).clamp(min=1)
    assert_same(ours.weight.grad.dense(), theirs.weight.grad / counts[:, None])


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("width", [None, 4])
def test_weights_have_the_gradients_of_torch(width, padding):
    ours, theirs = tables("EmbeddingBag", mode="sum", padding_idx=padding)
    indices, offsets = bags(1, width=width)
    weights = [
        torch.linspace(-1, 1, indices.numel(), dtype=torch.float64).reshape(indices.shape) for _ in range(2)
    ]
    for own in weights:
        own.requires_grad_()
    got, want = ours(indices, offsets, weights[0]), theirs(indices, offsets, weights[1])
    assert_same(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    assert_same(ours.weight.grad.dense(), theirs.weight.grad)
    assert_same(weights[0].grad, weights[1].grad)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding_idx": 4},
        {"scale_grad_by_freq": True},
        {"max_norm": 0.5},
        {"max_norm": 0.5, "norm_type": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(7,), (2, 3), (), (0,)], ids=str)
def test_rows_and_their_gradients_are_those_of_torch(options, shape):
    ours, theirs = tables("Embedding", **options)
    torch.manual_seed(5)
    indices = torch.randint(0, ROWS, shape)
    got, want = ours(indices), theirs(indices)
    assert got.shape == want.shape
    assert_same(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    assert_same(ours.weight.grad.dense(), theirs.weight.grad)
    assert_same(ours.weight, theirs.weight)


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "SparseAdam", "RowwiseAdagrad"])
def test_training_is_that_of_sparse_gradients(name):
    """Two towers read one table, and two passes add up."""
    results = []
    for ours in (True, False):
        torch.manual_seed(0)
        make = fastopt.torch.EmbeddingBag if ours else torch.nn.EmbeddingBag
        table = make(ROWS, DIM, mode="sum", sparse=not ours, dtype=torch.float64)
        opt = getattr(fastopt.torch, name)(table.parameters(), lr=0.1)
        for step in range(5):
            opt.zero_grad()
            for k in range(2):
                one, other = bags(10 * step + k), bags(100 * step + k)
                (table(*one).sum(0) * table(*other).sum(0)).sum().backward()
            opt.step()
        results.append(table.weight)
    assert_same(*results, 1e-10)


def test_other_optimizers_see_the_dense_gradient():
    ours, theirs = tables("EmbeddingBag", mode="mean")
    for module in (ours, theirs):
        opt = torch.optim.Adam(module.parameters(), lr=0.1)
        for step in range(4):
            opt.zero_grad()
            module(*bags(step)).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            opt.step()
    assert_same(ours.weight, theirs.weight, 1e-10)


def test_what_torch_changes_in_place_is_used():
    ours, theirs = tables("EmbeddingBag", mode="sum")
    opts = fastopt.torch.Adam(ours.parameters(), lr=0.1), torch.optim.Adam(theirs.parameters(), lr=0.1)
    for step in range(3):
        for module, opt in zip((ours, theirs), opts, strict=True):
            opt.zero_grad()
            module(*bags(step)).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            opt.step()
    assert_same(ours.weight, theirs.weight, 1e-10)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_cleared(set_to_none):
    ours, _ = tables("EmbeddingBag", mode="sum")
    opt = fastopt.torch.SGD(ours.parameters(), lr=1.0)
    ours(*bags(0)).sum().backward()
    ours.zero_grad(set_to_none=set_to_none)
    before = ours.weight.detach().clone()
    opt.step()
    assert torch.equal(ours.weight, before)


def test_clipping_by_norm_includes_lookups():
    ours, theirs = tables("EmbeddingBag", mode="sum")
    ours(*bags(0)).square().sum().backward()
    theirs(*bags(0)).square().sum().backward()
    opt = fastopt.torch.SGD(ours.parameters(), lr=0.1)
    opt.step(clip_norm=0.5)
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    torch.optim.SGD(theirs.parameters(), lr=0.1).step()
    assert opt.info.norm == pytest.approx(norm.item())
    assert_same(ours.weight, theirs.weight, 1e-10)


@pytest.mark.parametrize("fused", [True, None])
def test_training_is_the_same_with_a_scaler(fused):
    """By rows, of which those that are not looked up stay; the scale is a power of two."""
    ours, alone = (tables("Embedding", torch.float32)[0] for _ in range(2))
    opt, twin = (fastopt.torch.Adam(own.parameters(), lr=0.1, fused=fused) for own in (ours, alone))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step, factor in enumerate((1.0, float("inf"), 1.0)):
        opt.zero_grad()
        twin.zero_grad()
        for ids in (torch.tensor([step, 3, 3]), torch.tensor([7])):
            scaler.scale(ours(ids).square().sum() * factor).backward()
            alone(ids).square().sum().backward()
        held = ours.weight.grad.detach()
        before = held.dense()
        scaler.step(opt)
        scaler.update()
        assert isinstance(ours.weight.grad, RowGradients) and len(ours.weight.grad.lookups) == 2
        assert torch.equal(held.dense(), before)
        if factor == 1.0:
            twin.step()
    assert scaler.get_scale() == 32.0
    assert torch.equal(ours.weight, alone.weight)


def test_a_second_backward_pass_is_refused():
    ours, _ = tables("EmbeddingBag", mode="sum")
    out = ours(*bags(0)).square().sum()
    (gradient,) = torch.autograd.grad(out, ours.weight, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_of_16_bits(dtype):
    ours, theirs = tables("EmbeddingBag", dtype=dtype, mode="sum")
    indices, offsets = bags(0)
    assert ours(indices, offsets).dtype == dtype
    torch.testing.assert_close(ours(indices, offsets), theirs(indices, offsets))
    ours(indices, offsets).sum().backward()
    opt = fastopt.torch.AdamW(ours.parameters())
    opt.step()
    assert torch.isfinite(ours.weight).all()


def test_a_compiled_model_trains():
    ours, theirs = tables("EmbeddingBag", mode="sum", dtype=torch.float32)
    results = []
    for table in (ours, theirs):
        torch.manual_seed(1)
        head = torch.nn.Linear(DIM, 1)

        def model(indices, offsets, table=table, head=head):
            return head(torch.tanh(table(indices, offsets)))

        compiled = torch.compile(model, backend="eager")
        opt = fastopt.torch.SGD([*table.parameters(), *head.parameters()], lr=0.1)
        for step in range(3):
            opt.zero_grad()
            compiled(*bags(step)).square().sum().backward()
            opt.step()
        results.append(table.weight)
    assert_same(*results, 1e-5)


def test_pretrained_rows_and_bags_are_taken():
    rows = torch.arange(12.0).reshape(4, 3)
    for name in ("Embedding", "EmbeddingBag"):
        module = getattr(fastopt.torch, name).from_pretrained(rows, freeze=False)
        assert type(module) is getattr(fastopt.torch, name)
        assert module.weight.requires_grad
    assert torch.equal(fastopt.torch.Embedding.from_pretrained(rows)(torch.tensor([2])), rows[2:3])


def test_rows_that_are_behind_are_not_looked_up():
    ours, _ = tables("EmbeddingBag", mode="sum")
    opt = fastopt.torch.Adam(ours.parameters(), rows="dense")
    ours(*bags(0)).sum().backward()
    with pytest.raises(ValueError, match="rows is 'dense' in the group of a table"):
        opt.step()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_indices_without_bags_are_refused(mode):
    """torch does not look, and its kernels may end the process."""
    bag = fastopt.torch.EmbeddingBag(8, 2, mode=mode, include_last_offset=True)
    with pytest.raises(ValueError, match="the last of offsets is 0: expected 3, the number of indices"):
        bag(torch.tensor([1, 0, 1]), torch.tensor([0]))
