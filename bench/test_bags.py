"""Lookups, pooled or not, and the updates that follow: against torch and FBGEMM's CPU operators.

2 M rows, 262,144 indices. FBGEMM is not installed with the rest: ``pip install --no-deps
fbgemm-gpu-cpu==1.8.0``, which goes with torch 2.13.
"""

from contextlib import suppress

import numpy as np
import pytest
from draws import draw, update_bytes
from fbgemm import embedding_bags

import fastopt

ROWS, INDICES = 2_000_000, 262_144
KINDS = "zipf", "uniform"
CELLS = [(dim, pooled, kind) for dim in (32, 64, 128) for pooled in (4, 20) for kind in KINDS]
FORWARD = [(dim, pooled, kind) for dim in (16, 32, 64, 128) for pooled in (1, 4, 20) for kind in KINDS]


def bags(rng: np.random.Generator, kind: str, pooled: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices, and offsets with the last one."""
    count = INDICES // pooled * pooled
    return draw(rng, kind, ROWS, count), np.arange(0, count + 1, pooled)


def fbgemm(dim: int):
    """FBGEMM's operator over one table in the CPU's memory."""
    return embedding_bags(1, ROWS, dim, "EXACT_ROWWISE_ADAGRAD", "cpu")


@pytest.mark.parametrize(("dim", "pooled", "kind"), FORWARD)
def test_forward(compare, rng, dim, pooled, kind):
    table = np.ones((ROWS, dim), np.float32)
    indices, offsets = bags(rng, kind, pooled)
    calls = {
        "fastopt": lambda: fastopt.embedding_bag(
            table, indices, offsets, include_last_offset=True, mode="sum"
        )
    }
    with suppress(ImportError):
        import torch

        given = torch.from_numpy(indices), torch.from_numpy(table), torch.from_numpy(offsets)
        calls["torch"] = lambda: torch.nn.functional.embedding_bag(
            *given, mode="sum", include_last_offset=True
        )
        operator = fbgemm(dim)
        calls["FBGEMM"] = lambda: operator(given[0], given[2])
    moved = 4 * dim * (indices.size + offsets.size - 1)
    group = f"embedding_bag of {pooled}, dim {dim}, {kind}"
    compare(group, {name: (call, moved) for name, call in calls.items()})


@pytest.mark.parametrize(("dim", "pooled", "kind"), CELLS)
def test_both_ways_fastopt(compare, rng, dim, pooled, kind):
    """A training step of one table: pooled lookup, then the update from the gradient of its output."""
    indices, offsets = bags(rng, kind, pooled)
    count = offsets.size - 1
    grad_output = rng.standard_normal((count, dim), dtype=np.float32)

    def both_ways(optimizer):
        table = np.ones((ROWS, dim), np.float32)
        opt = optimizer(table)

        def step():
            plan = fastopt.IndexPlan(indices, ROWS)
            fastopt.embedding_bag(table, plan, offsets, include_last_offset=True, mode="sum")
            opt.step(fastopt.BagGradient(plan, offsets, grad_output, include_last_offset=True, mode="sum"))

        return step

    calls = {"fastopt": (both_ways(fastopt.RowwiseAdaGrad), 0)}
    with suppress(ImportError):
        import torch

        operator = fbgemm(dim)
        arguments = torch.from_numpy(indices), torch.from_numpy(offsets)
        given = torch.from_numpy(grad_output)
        calls["FBGEMM"] = lambda: operator(*arguments).backward(given), 0
    calls |= {f"fastopt, {own.__name__}": (both_ways(own), 2) for own in (fastopt.Adam, fastopt.AdamW)}
    of_lookup = 4 * dim * (indices.size + count)
    compare(
        f"bags of {pooled}, dim {dim}, {kind}, both ways",
        {
            name: (call, of_lookup + update_bytes(dim, indices, 1 + states, count))
            for name, (call, states) in calls.items()
        },
        rounds=9,
    )


class TestLookup:
    def test_fastopt(self, measure, rng):
        table, indices = np.ones((ROWS, 64), np.float32), draw(rng, "zipf", ROWS, INDICES)
        measure("embedding", lambda: fastopt.embedding(table, indices), 8 * 64 * INDICES)

    def test_torch(self, measure, rng):
        torch = pytest.importorskip("torch")
        table = torch.from_numpy(np.ones((ROWS, 64), np.float32))
        indices = torch.from_numpy(draw(rng, "zipf", ROWS, INDICES))
        measure("embedding", lambda: torch.nn.functional.embedding(indices, table), 8 * 64 * INDICES)


@pytest.mark.parametrize("kind", ["zipf", "uniform"])
class TestPlan:
    def test_fastopt(self, measure, rng, kind):
        indices = draw(rng, kind, ROWS, INDICES)
        measure(f"plan, {kind}", lambda: fastopt.IndexPlan(indices, ROWS), 16 * INDICES)

    def test_numpy_unique(self, measure, rng, kind):
        indices = draw(rng, kind, ROWS, INDICES)
        measure(f"plan, {kind}", lambda: np.unique(indices, return_inverse=True), 16 * INDICES, rounds=5)
