"""Modules in models that torch.compile makes one graph of: what eager ones do, to the bit."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastopt
import fastopt.torch as ft
from fastopt.torch.compiled import has_op

ROWS, DIM = 30, 8


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def compiled(model, backend="aot_eager", **options):
    if not has_op(torch.nn.Embedding(1, 1)):
        pytest.skip("the compiler of this torch leaves lookups out of graphs")
    return torch.compile(model, backend=backend, fullgraph=True, **options)


class Model(torch.nn.Module):
    """A table, looked up by two towers, and what comes after."""

    def __init__(self, name="EmbeddingBag", **options):
        super().__init__()
        self.table = getattr(ft, name)(ROWS, DIM, **options)
        self.head = torch.nn.Linear(DIM, 2)

    def forward(self, one, other):
        return self.head(torch.tanh(self.table(*one) * self.table(*other))).square().sum()


def ragged(bags, weights=False, last=False):
    """Indices, offsets and weights."""
    lengths = torch.randint(0, 4, (bags,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    indices = torch.randint(ROWS, (int(lengths.sum()),))
    own = (indices, offsets if last else offsets[:-1])
    return (*own, torch.randn(len(indices), requires_grad=True)) if weights else own


def regular(bags):
    return (torch.randint(ROWS, (bags, 3)),)


def single(count):
    return (torch.randint(ROWS, (count,)).int(),)


def trained(model, call, batches, passes=2):
    """The parameters after a step for each batch, and what gradients there were."""
    opt = ft.Adam(model.parameters(), lr=0.1)
    kinds, of_weights = [], []
    for batch in batches:
        opt.zero_grad()
        for _ in range(passes):
            call(*batch).backward()
        kinds.append(type(model.table.weight.grad))
        given = [one for own in batch for one in own if one.is_floating_point()]
        of_weights += [one.grad.clone() for one in given]
        for one in given:
            one.grad = None
        opt.step()
    return [*model.parameters(), *of_weights], kinds


CASES = {
    "rows, padding": (single, {"name": "Embedding", "padding_idx": 3}),
    "rows by frequency": (single, {"name": "Embedding", "scale_grad_by_freq": True}),
    "mean of regular bags": (regular, {}),
    "sum, weights": (lambda n: ragged(n, weights=True), {"mode": "sum"}),
    "max": (lambda n: ragged(n, last=True), {"mode": "max", "include_last_offset": True}),
    "fused": (ragged, {"mode": "sum", "fused": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_that_without_compiling(case):
    draw, options = CASES[case]
    model = Model(**options)
    batches = [(draw(n), draw(n)) for n in (4, 9)]
    other = copy.deepcopy(model)
    got, kinds = trained(other, compiled(other), batches)
    want, as_eager = trained(model, model, batches)
    assert kinds == as_eager == [type(None) if "fused" in options else ft.RowGradients] * 2
    for one, two in zip(got, want, strict=True):
        assert torch.equal(one, two)


def test_collections_are_one_op():
    tables = {
        "a": ft.EmbeddingBag(50, 8, mode="sum"),
        "b": ft.EmbeddingBag(30, 4, mode="max"),
        "c": ft.EmbeddingBag(20, 4, mode="mean", fused=True),
    }
    many = ft.EmbeddingBagCollection(tables, {"a": ["x", "y"], "c": ["v", "w"]})
    weights = torch.randn(13, requires_grad=True)
    inputs = {
        "x": torch.randint(50, (6, 2)),
        "y": (torch.randint(50, (13,)), torch.tensor([0, 2, 2, 5, 9, 9]), weights),
        "b": torch.randint(30, (6, 4)),
        "v": torch.randint(20, (6, 1)),
        "w": torch.randint(20, (6, 3)),
    }
    found = []
    for model in (many, copy.deepcopy(many)):
        opt = ft.Adam(model.parameters(), lr=0.1)
        call = model if model is many else compiled(model)
        weights.grad = None
        (call(inputs) * torch.linspace(-1, 1, 168).reshape(6, 28)).sum().backward()
        assert [len(model.tables[name].weight.grad.lookups) for name in "ab"] == [2, 1]
        assert model.tables["c"].weight.grad is None
        opt.step()
        found.append([*model.parameters(), weights.grad])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match="numbers of bags: \\[6, 6, 5, 6, 6\\]"):
        call({**inputs, "b": inputs["b"][:5]})


@pytest.mark.parametrize("mode", ["sum", "max"])
def test_other_gradients_of_the_table_are_added(mode):
    table = ft.EmbeddingBag(ROWS, DIM, mode=mode)

    def model(ids):
        return table(ids).square().sum() + table.weight.square().sum()

    (ids,) = regular(5)
    found = [torch.autograd.grad(call(ids), table.weight)[0] for call in (model, compiled(model))]
    assert [*map(type, found)] == [torch.Tensor] * 2
    assert torch.equal(*found)


def test_graphs_are_compiled_as_often_as_with_torch():
    counts = []
    for package in (ft, torch.nn):
        torch._dynamo.reset()
        table, counter = package.EmbeddingBag(ROWS, DIM, mode="sum"), CompileCounterWithBackend("aot_eager")
        model = compiled(lambda *own, table=table: table(*own).sum(), counter)
        for bags in (4, 6, 5, 9, 3):
            model(*ragged(bags)).backward()
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


def test_hooks_and_later_changes_are_those_without_compiling():
    table, seen = ft.Embedding(ROWS, DIM), []
    table.weight.register_hook(lambda gradient: seen.append(type(gradient)))
    model = compiled(lambda ids: torch.nn.functional.linear(table(ids), table.weight[:3].detach()))
    (ids,) = single(5)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids)
    named, passed_on = ids.clone(), torch.ones_like(out)
    out.backward(passed_on)
    ids.zero_(), passed_on.zero_()
    assert seen == [ft.RowGradients] and out.dtype == torch.bfloat16
    rows = table.weight.grad.dense().abs().sum(1)
    assert set(rows.nonzero()[:, 0].tolist()) == set(named.tolist())
    with torch.no_grad():
        assert torch.equal(model(ids), model(ids.long()))


def test_what_does_not_fit_is_refused():
    table = ft.EmbeddingBag(ROWS, DIM, mode="sum", fused=True)
    model = compiled(lambda *own: table(*own).sum())
    with pytest.raises(ValueError, match="indices holds 30"):
        model(torch.tensor([[ROWS]]))
    with pytest.raises(RuntimeError, match="no optimizer has it"):
        model(torch.tensor([[3]])).backward()


def strided(table):
    table.weight = torch.nn.Parameter(torch.randn(DIM, ROWS).t())
    return table


@pytest.mark.parametrize("change", [strided, torch.nn.utils.parametrizations.weight_norm])
def test_tables_that_are_strided_or_computed(change):
    table, (ids,) = change(ft.Embedding(ROWS, DIM)), single(5)
    found = []
    for call in (table, compiled(table)):
        table.zero_grad()
        call(ids).square().sum().backward()
        found.append([p.grad for p in table.parameters()])
    for got, want in zip(*found, strict=True):
        assert type(got) is torch.Tensor
        torch.testing.assert_close(got, want)


def test_tables_in_files_break_the_graph(tmp_path):
    with fastopt.open_table(tmp_path / "t", rows=ROWS, dim=DIM) as table:
        bag, ids = ft.EmbeddingBag.from_table(table, mode="sum"), regular(5)
        many = ft.EmbeddingBagCollection({"a": bag})
        for call in (bag, lambda ids: many({"a": ids})):
            model = torch.compile(lambda *own, call=call: call(*own).cos(), backend="aot_eager")
            model(*ids).sum().backward()
            assert torch.equal(model(*ids), bag(*ids).cos())
        assert len(bag.weight.grad.lookups) == 2


@pytest.mark.parametrize("many", [False, True], ids=["bag", "collection"])
def test_export_records_torchs_own_lookups(many):
    bag = ft.EmbeddingBag(ROWS, DIM, mode="sum")
    module = ft.EmbeddingBagCollection({"a": bag}) if many else bag
    one, other = regular(5)[0], regular(5)[0]
    given = ({"a": one}, {"a": other}) if many else (one, other)
    recorded = torch.export.export(module, (given[0],), strict=False).module()
    assert torch.equal(recorded(given[1]), bag(other))
