"""What does a step cost whose arrays are so small that all is overhead? Adam, float32 arrays of 10.

Target: 10 microseconds for one array.
"""

import numpy as np
import pytest
from peers import torch, torch_optimizers, torch_parameters

import fastopt

if torch is not None:
    import fastopt.torch

SIZE = 10


def subjects(shapes, grads, one):
    """Steps by fastopt; ``one``: of an array, not of a list."""
    arrays = [np.ones(shape, np.float32) for shape in shapes]
    opt = fastopt.Adam(arrays[0] if one else arrays)
    given = grads[0] if one else grads
    found = {"fastopt": lambda: opt.step(given)}
    if torch is not None:
        parameters = torch_parameters(shapes, grads)
        found["fastopt.torch"] = fastopt.torch.Adam(torch_parameters(shapes, grads)).step
        torch_opt = fastopt.Adam(parameters[0] if one else parameters)
        if one:
            found["fastopt, torch tensors"] = lambda: torch_opt.step(parameters[0].grad)
        else:
            found["fastopt, torch tensors"] = lambda: torch_opt.step([p.grad for p in parameters])
    return found


@pytest.mark.parametrize("count", [None, 1, 10, 100], ids=["array", "list-1", "list-10", "list-100"])
def test_overhead_fastopt(compare, rng, count):
    shapes = [(SIZE,)] * (count or 1)
    grads = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    functions = subjects(shapes, grads, count is None)
    for version, opt in torch_optimizers(
        "Adam", {}, lambda: torch_parameters(shapes, grads), ["torch fused", "torch foreach"]
    ).items():
        functions[version] = opt.step
    name = "an array" if count is None else f"a list of {count}"
    compare(f"overhead, {name}", {label: (function, 0) for label, function in functions.items()}, rounds=300)
