"""Updates of the rows that indices name: against torch, and against moving the same memory.

2 M x 64 float32, 262,144 indices, unless said.
"""

import numpy as np
import pytest
from draws import draw, update_bytes
from traffic import row_floor

import fastopt

ROWS, DIM, INDICES = 2_000_000, 64, 262_144
PEERS = {"SGD": "SGD", "AdaGrad": "Adagrad", "RowwiseAdaGrad": None, "Adam": "SparseAdam", "AdamW": None}
STATES = {"SGD": 0, "AdaGrad": 1, "RowwiseAdaGrad": 0, "Adam": 2, "AdamW": 2}


@pytest.mark.parametrize("kind", ["zipf", "uniform"])
@pytest.mark.parametrize("name", PEERS)
def test_rows_fastopt(compare, rng, name, kind):
    """Does a step cost little more than its memory traffic, and how much more does torch's cost?

    The floors read and write the same rows, without arithmetic and sort, and read gradients once or not.
    """
    indices = draw(rng, kind, ROWS, INDICES)
    values = rng.standard_normal((INDICES, DIM), dtype=np.float32)
    table = np.ones((ROWS, DIM), np.float32)
    opt = getattr(fastopt, name)(table)
    grad = fastopt.IndexedSlices(indices, values)
    plan = fastopt.IndexPlan(indices, ROWS)
    sorted_before = fastopt.IndexedSlices(plan, values)
    moved = update_bytes(DIM, indices, 1 + STATES[name])
    functions = {"fastopt": (lambda: opt.step(grad), moved)}
    functions["fastopt, sorted before"] = (lambda: opt.step(sorted_before), moved)
    row_states = int(name.startswith("Rowwise"))
    for label, summed in (("the floor", True), ("the floor, rows alone", False)):
        floor = row_floor(table, values, indices, STATES[name], row_states, summed)
        functions[label] = floor, update_bytes(DIM, indices, 1 + STATES[name], None if summed else 0)
    if PEERS[name] is not None:
        functions["torch"] = torch_step(PEERS[name], indices, values), moved
    compare(f"sparse {name}, {kind}", functions, rounds=9)


def torch_step(name, indices, values):
    """A step of torch's optimizer over a table of the same size."""
    torch = pytest.importorskip("torch")
    table = torch.ones(ROWS, DIM, requires_grad=True)
    opt = getattr(torch.optim, name)([table])

    def step():
        # built anew: torch keeps the sum of duplicates in a gradient once it has computed it
        table.grad = torch.sparse_coo_tensor(
            torch.from_numpy(indices)[None], torch.from_numpy(values), (ROWS, DIM), check_invariants=False
        )
        opt.step()

    return step


@pytest.mark.parametrize("rows", [1_000_000, 10_000_000, 100_000_000])
class TestTableSize:
    """Does the cost grow with the indices alone? RowwiseAdaGrad, dim 16."""

    @pytest.fixture(scope="class")
    def tables(self):
        # one allocation for all sizes: 6.4 GB
        return np.zeros((100_000_000, 16), np.float32)

    @pytest.mark.parametrize("spread", ["the same indices", "over the whole table"])
    def test_fastopt(self, measure, rng, tables, rows, spread):
        indices = rng.integers(0, 1_000_000 if spread == "the same indices" else rows, INDICES)
        table = tables[:rows]
        table[indices] = 1
        opt = fastopt.RowwiseAdaGrad(table)
        grad = fastopt.IndexedSlices(indices, rng.standard_normal((INDICES, 16), dtype=np.float32))
        measure(f"table size, {spread}", lambda: opt.step(grad), update_bytes(16, indices, 1))


class TestManyTables:
    """26 tables of a Criteo-like model: 3 to 10 M rows, dim 16, a batch of 2,048 with 1 lookup each."""

    SIZES = (3, 4, 10, 15, 24, 27, 105, 305, 583, 633, 1_460, 2_173, 3_194, 5_652, 5_683, 7_046, 10_131,
             12_517, 14_992, 93_145, 142_572, 286_181, 2_202_608, 5_461_306,
             8_351_593, 10_131_227)  # fmt: skip
    BATCH = 2_048

    def arguments(self, rng):
        tables = [np.zeros((rows, 16), np.float32) for rows in self.SIZES]
        indices = [rng.integers(0, rows, self.BATCH) for rows in self.SIZES]
        values = [rng.standard_normal((self.BATCH, 16), dtype=np.float32) for _ in self.SIZES]
        moved = sum(update_bytes(16, one, 3) for one in indices)
        return tables, [fastopt.IndexedSlices(i, v) for i, v in zip(indices, values, strict=True)], moved

    def test_one_call_fastopt(self, measure, rng):
        tables, grads, moved = self.arguments(rng)
        opt = fastopt.Adam(tables)
        measure("26 tables, Adam", lambda: opt.step(grads), moved, rounds=100)

    def test_one_after_the_other(self, measure, rng):
        tables, grads, moved = self.arguments(rng)
        opts = [fastopt.Adam(table) for table in tables]

        def steps():
            for opt, grad in zip(opts, grads, strict=True):
                opt.step(grad)

        measure("26 tables, Adam", steps, moved, rounds=50)

    def test_torch(self, measure, rng):
        torch = pytest.importorskip("torch")
        arrays, grads, moved = self.arguments(rng)
        tables = [torch.from_numpy(table).requires_grad_() for table in arrays]
        opt = torch.optim.SparseAdam(tables)

        def step():
            for table, grad in zip(tables, grads, strict=True):
                indices, values = torch.from_numpy(grad.indices)[None], torch.from_numpy(grad.values)
                table.grad = torch.sparse_coo_tensor(indices, values, table.shape, check_invariants=False)
            opt.step()

        measure("26 tables, Adam", step, moved, rounds=20)


@pytest.mark.parametrize(
    ("name", "options"),
    [("Adam", {}), ("AdamW", {}), ("SGD", {"momentum": 0.9}), ("RMSProp", {})],
    ids=["Adam", "AdamW", "SGD-momentum", "RMSProp"],
)
class TestDenseRows:
    """Dense semantics at sparse cost: 1 M x 64, 1 % of the rows a step, against updating every row."""

    ROWS, TOUCHED = 1_000_000, 10_000

    def schedule(self):
        return 1e-3 * fastopt.schedules.warmup_cosine(warmup=200, total=2_000)

    def test_fastopt(self, measure, rng, name, options):
        table = np.ones((self.ROWS, DIM), np.float32)
        opt = getattr(fastopt, name)(table, lr=self.schedule(), rows="dense", **options)
        values = rng.standard_normal((self.TOUCHED, DIM), dtype=np.float32)
        grads = [
            fastopt.IndexedSlices(rng.choice(self.ROWS, self.TOUCHED, replace=False), values)
            for _ in range(100)
        ]
        for grad in grads:  # so that rows are behind by as much as they are in a long run
            opt.step(grad)
        turn = iter(grads * 10)
        measure(f"rows='dense' {name}", lambda: opt.step(next(turn)), rounds=60)

    def test_every_row(self, measure, rng, name, options):
        table = np.ones((self.ROWS, DIM), np.float32)
        opt = getattr(fastopt, name)(table, lr=self.schedule(), **options)
        grad = np.zeros_like(table)
        measure(f"rows='dense' {name}", lambda: opt.step(grad))
