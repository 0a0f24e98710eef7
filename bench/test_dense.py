"""Is a dense step as fast as memory, and as torch's fastest version of it? 33.5 M float32 parameters, and
others.

Torch has a fused CPU version of SGD, Adagrad, Adam and AdamW alone; the other two it has of all.
"""

import numpy as np
import pytest
from peers import torch_optimizers, torch_parameters
from traffic import floor

import fastopt

SIZE = 1 << 25
# optimizer, options, state arrays, torch's name or None
RULES = [
    ("SGD", {}, 0, "SGD"),
    ("SGD", {"momentum": 0.9}, 1, "SGD"),
    ("SGD", {"momentum": 0.9, "nesterov": True}, 1, "SGD"),
    ("AdaGrad", {}, 1, "Adagrad"),
    ("RMSProp", {}, 1, "RMSprop"),
    ("RMSProp", {"momentum": 0.9}, 2, "RMSprop"),
    ("RMSProp", {"centered": True}, 2, "RMSprop"),
    ("RMSProp", {"centered": True, "momentum": 0.9}, 3, "RMSprop"),
    ("Adam", {}, 2, "Adam"),
    ("AdamW", {}, 2, "AdamW"),
    ("Adam", {"amsgrad": True}, 3, "Adam"),
    ("RAdam", {}, 2, "RAdam"),
    ("NAdam", {}, 2, "NAdam"),
    ("Lion", {}, 1, None),
]
IDS = [name + "".join(f"-{option}" for option in options) for name, options, *_ in RULES]


@pytest.mark.parametrize(("name", "options", "states", "peer"), RULES, ids=IDS)
def test_dense_fastopt(compare, rng, name, options, states, peer):
    g = np.abs(rng.standard_normal(SIZE, dtype=np.float32))
    p = np.ones(SIZE, np.float32)
    opt = getattr(fastopt, name)(p, **options)
    opt.step(g)
    # both work on the same memory, since where it happens to lie can make a tenth
    own = list(opt.state[0].values())
    torch_opts = torch_optimizers(peer, options, lambda: torch_parameters([SIZE], [g]))
    moved = p.nbytes * (3 + 2 * states)
    functions = {"fastopt": lambda: opt.step(g), "same traffic": floor(p, g, own)}
    functions |= {version: torch_opt.step for version, torch_opt in torch_opts.items()}
    compare(
        f"dense {name} {options or ''}",
        {label: (function, moved) for label, function in functions.items()},
        rounds=11,
    )


# Sizes, round and not, and rules that torch has a fused version of.
SIZES = [1 << 18, 500_000, 1 << 20, 1 << 21, 3_000_000, 1 << 22, 1 << 23, 10_000_000, 1 << 24, 30_000_000]
SIZES += [1 << 25, 1 << 26]
FUSED = [
    rule for rule, i in zip(RULES, IDS, strict=True) if i in ("Adam", "AdamW", "SGD-momentum", "AdaGrad")
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "options", "states", "peer"), FUSED, ids=[name for name, *_ in FUSED])
def test_sizes_fastopt(compare, rng, name, options, states, peer, size):
    """Beside torch's fused steps, twice: the two differ by what memory and the machine make of the same."""
    g = np.abs(rng.standard_normal(size, dtype=np.float32))
    opt = getattr(fastopt, name)(np.ones(size, np.float32), **options)
    opt.step(g)
    functions = {"fastopt": lambda: opt.step(g)}
    for suffix in ("", ", again"):
        peers = torch_optimizers(peer, options, lambda: torch_parameters([size], [g]), ["torch fused"])
        functions |= {version + suffix: torch_opt.step for version, torch_opt in peers.items()}
    moved = g.nbytes * (3 + 2 * states)
    cases = {label: (function, moved) for label, function in functions.items()}
    compare(f"{name}, {size:,} elements", cases, rounds=min(max(100_000_000 // size, 9), 41))


# optimizer, torch's name or None, bytes moved for an element: more than one pass over the array
WHOLE = [("LAMB", None, 44), ("Adafactor", "Adafactor", 24)]


@pytest.mark.parametrize(("name", "peer", "moved"), WHOLE, ids=[name for name, *_ in WHOLE])
def test_whole_fastopt(compare, rng, name, peer, moved):
    """Rules whose steps depend on all of an array, here a matrix; and Adam, as the measure of one pass."""
    shape = SIZE // 4096, 4096
    g = rng.standard_normal(shape, dtype=np.float32)
    opt = getattr(fastopt, name)(np.ones(shape, np.float32))
    adam = fastopt.Adam(np.ones(shape, np.float32))
    functions = {
        "fastopt": (lambda: opt.step(g), moved * SIZE),
        "fastopt Adam": (lambda: adam.step(g), 28 * SIZE),
    }
    for version, torch_opt in torch_optimizers(peer, {}, lambda: torch_parameters([shape], [g])).items():
        functions[version] = torch_opt.step, moved * SIZE
    compare(f"dense {name}", functions, rounds=11)


@pytest.mark.parametrize("size", [1, 1000, 262_144])
def test_small_fastopt(compare, size):
    """Adam on one array that fits the cache."""
    p, g = np.ones(size, np.float32), np.ones(size, np.float32)
    opt = fastopt.Adam(p)
    functions = {"fastopt": (lambda: opt.step(g), p.nbytes * 7)}
    for version, torch_opt in torch_optimizers(
        "Adam", {}, lambda: torch_parameters([size], [g]), ["torch fused"]
    ).items():
        functions[version] = torch_opt.step, p.nbytes * 7
    compare(f"small Adam, {size}", functions, rounds=300)
