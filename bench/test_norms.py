"""What do the gradient norm and clipping cost? 33.5 M float32; test_many.py has clipping over many arrays."""

import numpy as np
from peers import torch, torch_parameters

import fastopt

SIZE = 1 << 25


def test_norm_fastopt(compare, rng):
    g = rng.standard_normal(SIZE, dtype=np.float32)
    functions = {"fastopt": (lambda: fastopt.grad_norm(g), g.nbytes)}
    if torch is not None:
        tensor = torch.from_numpy(g)
        functions["torch"] = lambda: torch.linalg.vector_norm(tensor), g.nbytes
    compare("norm", functions)


def test_clipped_adam_fastopt(compare, rng):
    p, g = np.ones(SIZE, np.float32), rng.standard_normal(SIZE, dtype=np.float32)
    opt = fastopt.Adam(p)
    functions = {"fastopt": (lambda: opt.step(g, clip_norm=1.0), 8 * p.nbytes)}
    if torch is not None:
        parameters = torch_parameters([SIZE], [g.copy()])
        torch_opt = torch.optim.Adam(parameters, fused=True)

        def step():
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            torch_opt.step()

        functions["torch"] = step, 8 * p.nbytes
    compare("clip to norm 1 and Adam", functions)
