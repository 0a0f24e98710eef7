"""What do the gradient norm and clipping cost? 33.5 M float32."""

import numpy as np
import pytest

import fastopt

SIZE = 1 << 25


def test_norm_fastopt(measure, rng):
    g = rng.standard_normal(SIZE, dtype=np.float32)
    measure("norm", lambda: fastopt.grad_norm(g), g.nbytes)


def test_norm_torch(measure, rng):
    torch = pytest.importorskip("torch")
    g = torch.from_numpy(rng.standard_normal(SIZE, dtype=np.float32))
    measure("norm", lambda: torch.linalg.vector_norm(g), g.nbytes)


def test_clipped_adam_fastopt(measure, rng):
    p, g = np.ones(SIZE, np.float32), rng.standard_normal(SIZE, dtype=np.float32)
    opt = fastopt.Adam(p)
    measure("clip to norm 1 and Adam", lambda: opt.step(g, clip_norm=1.0), 8 * p.nbytes)


def test_clipped_adam_torch(measure, rng):
    torch = pytest.importorskip("torch")
    p = torch.ones(SIZE, requires_grad=True)
    p.grad = torch.from_numpy(rng.standard_normal(SIZE, dtype=np.float32))
    opt = torch.optim.Adam([p], fused=True)

    def step():
        torch.nn.utils.clip_grad_norm_([p], 1.0)
        opt.step()

    measure("clip to norm 1 and Adam", step, 8 * p.nbytes, rounds=7)
