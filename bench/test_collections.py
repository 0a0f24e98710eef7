"""A recommendation model's 26 tables, of 1,000 to 1,000,000 rows of 64, batches of 2,048 whose ids follow a
power law: their lookups, with the backward pass, and with the update; then the step of the whole model
(docs/examples/dlrm.py). In turns with torch."""

import itertools

import dlrm
import numpy as np
import pytest

torch = pytest.importorskip("torch")

SIZES = np.geomspace(1_000, 1_000_000, 26).astype(int).tolist()
DIM, BATCH, BATCHES = 64, 2_048, 8
BUILDERS = {
    "fastopt together": dlrm.together_model,
    "fastopt table by table": dlrm.fastopt_model,
    "torch": dlrm.torch_model,
}
BYTES_OF_ROW = 4 * DIM


def fused_model(*arguments):
    """That of tables looked up together, which the backward pass updates."""
    model, optimizers = dlrm.together_model(*arguments)
    for table in model.tables.tables.tables.values():
        table.fused = True
    return model, optimizers


class Constant(torch.nn.Module):
    """In the place of tables: the same result each time, whose gradient is computed and not used."""

    def __init__(self):
        super().__init__()
        self.pooled = torch.randn(BATCH, len(SIZES) * DIM).requires_grad_()

    def forward(self, indices, offsets):
        self.pooled.grad = None
        return [self.pooled]


def without_tables(sizes, dim, lr, optimizer):
    model, optimizers = dlrm.fastopt_model(sizes, dim, lr, optimizer)
    model.tables = Constant()
    return model, optimizers[1:]


def batches(bags):
    """The same ones over and over."""
    own = list(dlrm.Clicks(SIZES, BATCH, bags).batches(BATCHES))
    while True:
        yield from own


@pytest.fixture(scope="module")
def gradients():
    """Of all results side by side: those of the tables are views of it, as a network's are."""
    torch.manual_seed(0)
    return torch.randn(BATCH, len(SIZES) * DIM) * 1e-3


def tables_of(build, bags, gradients, backward, update):
    """A call that does one batch's part, whose rows have been touched before, and how many bytes it has to
    move."""
    model, [opt, _] = build(SIZES, DIM, 1e-3, dlrm.Optimizer.sparse)
    given = batches(bags)

    def call():
        _, indices, offsets, _ = next(given)
        opt.zero_grad()
        results = model.tables(indices, offsets)
        if backward:
            widths = [own.shape[1] for own in results]
            torch.autograd.backward(results, list(gradients.split(widths, 1)))
        if update:
            opt.step()

    for _ in range(BATCHES):
        call()
    _, indices, _, _ = next(given)
    rows, distinct = sum(map(len, indices)), sum(len(np.unique(own)) for own in indices)
    moved = rows + BATCH * len(SIZES)
    if (
        update
    ):  # the gradient of each row, and each distinct row of the table and two of state read and written
        moved += rows + 6 * distinct
    return call, BYTES_OF_ROW * moved


@pytest.mark.parametrize("bags", [1, 20])
class TestTables:
    def test_lookup(self, compare, gradients, bags):
        self.run(compare, f"26 tables, {bags} lookups: forward", BUILDERS, bags, gradients, False, False)

    def test_backward(self, compare, gradients, bags):
        self.run(compare, f"26 tables, {bags} lookups: both ways", BUILDERS, bags, gradients, True, False)

    def test_step(self, compare, gradients, bags):
        builders = BUILDERS | {"fastopt fused": fused_model}
        self.run(compare, f"26 tables, {bags} lookups: SparseAdam", builders, bags, gradients, True, True)

    def run(self, compare, group, builders, bags, *what):
        compare(group, {name: tables_of(build, bags, *what) for name, build in builders.items()}, rounds=11)


def training(build, bags, optimizer):
    """A call that trains on one batch."""
    model, optimizers = build(SIZES, DIM, 1e-3, optimizer)
    given = batches(bags)
    dlrm.train(model, optimizers, itertools.islice(given, BATCHES))
    return lambda: dlrm.train(model, optimizers, [next(given)]), 0


@pytest.mark.parametrize("bags", [1, 20])
def test_model(compare, bags):
    builders = BUILDERS | {"fastopt fused": fused_model, "no tables": without_tables}
    members = {name: training(build, bags, dlrm.Optimizer.sparse) for name, build in builders.items()}
    members["torch, dense Adam"] = training(dlrm.torch_model, bags, dlrm.Optimizer.adam)
    compare(f"DLRM, {bags} lookups", members, rounds=9)
