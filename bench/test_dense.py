"""Is a dense step as fast as memory, and as torch's fused step? 33.5 M float32 parameters."""

import numpy as np
import pytest
from traffic import floor

import fastopt

SIZE = 1 << 25
# optimizer, options, state arrays, torch's name or None, whether torch has a fused CPU version
RULES = [
    ("SGD", {}, 0, "SGD", True),
    ("SGD", {"momentum": 0.9}, 1, "SGD", True),
    ("AdaGrad", {}, 1, "Adagrad", True),
    ("RMSProp", {}, 1, "RMSprop", False),
    ("Adam", {}, 2, "Adam", True),
    ("AdamW", {}, 2, "AdamW", True),
    ("Adam", {"amsgrad": True}, 3, "Adam", True),
    ("RAdam", {}, 2, "RAdam", False),
    ("NAdam", {}, 2, "NAdam", False),
    ("Lion", {}, 1, None, False),
]
IDS = [name + "".join(f"-{option}" for option in options) for name, options, *_ in RULES]


def group(name: str, options: dict) -> str:
    return f"dense {name} {options or ''}"


@pytest.mark.parametrize(("name", "options", "states", "peer", "fused"), RULES, ids=IDS)
class TestDense:
    def test_fastopt(self, measure, rng, name, options, states, peer, fused):
        p, g = np.ones(SIZE, np.float32), rng.standard_normal(SIZE, dtype=np.float32)
        opt = getattr(fastopt, name)(p, **options)
        measure(group(name, options), lambda: opt.step(g), p.nbytes * (3 + 2 * states))

    def test_same_traffic(self, measure, rng, name, options, states, peer, fused):
        p, g = np.ones(SIZE, np.float32), rng.standard_normal(SIZE, dtype=np.float32)
        measure(group(name, options), floor(p, g, states), p.nbytes * (3 + 2 * states))

    def test_torch(self, measure, rng, name, options, states, peer, fused):
        torch = pytest.importorskip("torch")
        if peer is None:
            pytest.skip("torch has none")
        p = torch.ones(SIZE, requires_grad=True)
        p.grad = torch.from_numpy(rng.standard_normal(SIZE, dtype=np.float32))
        opt = getattr(torch.optim, peer)([p], **options, **({"fused": True} if fused else {"foreach": True}))
        measure(group(name, options), opt.step, p.nbytes * (3 + 2 * states), rounds=7)


@pytest.mark.parametrize("size", [1, 1000, 262_144])
class TestSmall:
    """Adam on one array that fits the cache."""

    def test_fastopt(self, measure, size):
        p, g = np.ones(size, np.float32), np.ones(size, np.float32)
        opt = fastopt.Adam(p)
        measure(f"small Adam, {size}", lambda: opt.step(g), p.nbytes * 7, rounds=500)

    def test_torch(self, measure, size):
        torch = pytest.importorskip("torch")
        p = torch.ones(size, requires_grad=True)
        p.grad = torch.ones(size)
        opt = torch.optim.Adam([p], fused=True)
        measure(f"small Adam, {size}", opt.step, p.nbytes * 7, rounds=500)
