"""How much faster is a step with smaller state, parameters and gradients? Adam, 33.5 M parameters.

Torch's fused step keeps its state in the dtype of the parameters, rounded to the nearest. It has no master
weights: its peer there is the fused step on float32 copies, with the copying that it needs.
"""

import ml_dtypes
import numpy as np
from peers import torch, torch_optimizers, torch_parameters

import fastopt
from fastopt.kernels.formats import BLOCK

SIZE = 1 << 25
STATE = {"float32": 4, "bfloat16": 2, "8bit": 1 + 4 / BLOCK}  # bytes of an element, its share of a scale too


def moved(width, state, master=0):
    """Gradient read, parameter read and written (only written if it has a master), two states read and
    written."""
    parameter = 2 * width if not master else width + 2 * master
    return round(SIZE * (width + parameter + 4 * state))


def subjects(rng, dtype, masters=False):
    """Steps by fastopt with each state, for parameters of ``dtype``, and their bytes."""
    g = rng.standard_normal(SIZE, dtype=np.float32).astype(dtype)
    width = g.itemsize
    found = {}
    for state, size in STATE.items():
        opt = fastopt.Adam(np.ones(SIZE, dtype), state_dtype=state, master_weights=masters)
        step = lambda opt=opt: opt.step(g)  # noqa: E731
        found[f"fastopt, {state} state"] = step, moved(width, size, 4 * masters)
    return found, g


def torch_gradient(g, dtype):
    """A torch tensor in the memory of ``g``."""
    return torch.from_numpy(g.view(np.int16)).view(dtype) if g.itemsize == 2 else torch.from_numpy(g)


def torch_steps(g, dtype, versions=("torch fused", "torch foreach")):
    if torch is None:
        return {}
    dtype = getattr(torch, dtype)
    opts = torch_optimizers(
        "Adam", {}, lambda: torch_parameters([SIZE], [torch_gradient(g, dtype)], dtype), versions
    )
    return {version: (opt.step, moved(g.itemsize, g.itemsize)) for version, opt in opts.items()}


def test_float32_fastopt(compare, rng):
    functions, g = subjects(rng, np.float32)
    compare("float32 parameters", functions | torch_steps(g, "float32", ["torch fused"]), rounds=11)


def test_bfloat16_fastopt(compare, rng):
    functions, g = subjects(rng, ml_dtypes.bfloat16)
    functions = {name: functions[name] for name in sorted(functions, key=lambda name: "bfloat16" not in name)}
    compare("bfloat16 parameters", functions | torch_steps(g, "bfloat16"), rounds=11)


def test_float16_fastopt(compare, rng):
    functions, g = subjects(rng, np.float16)
    compare("float16 parameters", functions | torch_steps(g, "float16"), rounds=11)


def test_masters_fastopt(compare, rng):
    functions, g = subjects(rng, ml_dtypes.bfloat16, masters=True)
    if torch is not None:
        functions["torch fused, copies"] = torch_masters(g), moved(2, 4, 4)
    compare("bfloat16 parameters, float32 masters", functions, rounds=11)


def torch_masters(g):
    """The gradient copied to float32, the fused step, and the result copied to bfloat16."""
    small, grad = torch.ones(SIZE, dtype=torch.bfloat16), torch_gradient(g, torch.bfloat16)
    (master,) = torch_parameters([SIZE], [torch.empty(SIZE)])
    opt = torch.optim.Adam([master], fused=True)

    def step():
        master.grad.copy_(grad)
        opt.step()
        small.copy_(master.detach())

    return step
