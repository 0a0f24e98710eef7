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


def fbgemm(dim: int, optimizer: str):
    """FBGEMM's operator over one table in the CPU's memory."""
    pytest.importorskip("fbgemm_gpu")
    return embedding_bags(1, ROWS, dim, optimizer, "cpu")


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
        import fbgemm_gpu  # noqa: F401

        operator = embedding_bags(1, ROWS, dim, "EXACT_ROWWISE_ADAGRAD", "cpu")
        calls["FBGEMM"] = lambda: operator(given[0], given[2])
    moved = 4 * dim * (indices.size + offsets.size - 1)
    group = f"embedding_bag of {pooled}, dim {dim}, {kind}"
    compare(group, {name: (call, moved) for name, call in calls.items()})


@pytest.mark.parametrize(("dim", "pooled", "kind"), CELLS)
class TestForwardAndBackward:
    """A training step of one table: pooled lookup, then the update from the gradient of its output."""

    def moved(self, dim, indices, offsets, states):
        bags = offsets.size - 1
        return 4 * dim * (indices.size + bags) + update_bytes(dim, indices, 1 + states, bags)

    def own(self, measure, rng, dim, pooled, kind, optimizer, states):
        table = np.ones((ROWS, dim), np.float32)
        indices, offsets = bags(rng, kind, pooled)
        grad_output = rng.standard_normal((offsets.size - 1, dim), dtype=np.float32)
        opt = optimizer(table)

        def step():
            plan = fastopt.IndexPlan(indices, ROWS)
            fastopt.embedding_bag(table, plan, offsets, include_last_offset=True, mode="sum")
            opt.step(fastopt.BagGradient(plan, offsets, grad_output, include_last_offset=True, mode="sum"))

        measure(
            f"bags of {pooled}, dim {dim}, {kind}, both ways",
            step,
            self.moved(dim, indices, offsets, states),
        )

    def test_rowwise_adagrad_fastopt(self, measure, rng, dim, pooled, kind):
        self.own(measure, rng, dim, pooled, kind, fastopt.RowwiseAdaGrad, 0)

    def test_adam(self, measure, rng, dim, pooled, kind):
        self.own(measure, rng, dim, pooled, kind, fastopt.Adam, 2)

    def test_adamw(self, measure, rng, dim, pooled, kind):
        self.own(measure, rng, dim, pooled, kind, fastopt.AdamW, 2)

    def test_fbgemm_rowwise_adagrad(self, measure, rng, dim, pooled, kind):
        operator = fbgemm(dim, "EXACT_ROWWISE_ADAGRAD")
        import torch

        indices, offsets = bags(rng, kind, pooled)
        arguments = torch.from_numpy(indices), torch.from_numpy(offsets)
        grad_output = torch.from_numpy(rng.standard_normal((offsets.size - 1, dim), dtype=np.float32))
        measure(
            f"bags of {pooled}, dim {dim}, {kind}, both ways",
            lambda: operator(*arguments).backward(grad_output),
            self.moved(dim, indices, offsets, 0),
            rounds=7,
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
