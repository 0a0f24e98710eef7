"""What does a step over many arrays cost, alone and with clipping? Adam, float32."""

import math

import numpy as np
import pytest
from models import bert_base, resnet50
from peers import torch, torch_optimizers, torch_parameters

import fastopt

if torch is not None:
    import fastopt.torch

LISTS = {
    "1,000 x 256": [(256,)] * 1_000,
    "1,000 x 4,096": [(4_096,)] * 1_000,
    "100 x 65,536": [(65_536,)] * 100,
    "10,000 x 100": [(100,)] * 10_000,
    "ResNet-50": resnet50(),
    "BERT-base": bert_base(),
}
CLIPPED = {"33.5 M in one array": [(1 << 25,)], "ResNet-50": resnet50()}


def gradients(rng, shapes):
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def fastopt_numpy(shapes, grads, **arguments):
    opt = fastopt.Adam([np.ones(shape, np.float32) for shape in shapes])
    return lambda: opt.step(grads, **arguments)


def fastopt_flat(grads):
    """All in one buffer each."""
    shapes = [grad.shape for grad in grads]
    parameters, gradients = fastopt.FlatBuffer(shapes), fastopt.FlatBuffer(shapes)
    for view, grad in zip(gradients.views, grads, strict=True):
        view[...] = grad
    opt = fastopt.Adam(parameters.flat)
    return lambda: opt.step(gradients.flat)


def fastopt_torch(shapes, grads, **arguments):
    """With the list of gradients made anew, as a trainer does."""
    parameters = torch_parameters(shapes, grads)
    opt = fastopt.Adam(parameters)
    return lambda: opt.step([p.grad for p in parameters], **arguments)


def drop_in(shapes, grads):
    """The class of fastopt.torch."""
    return fastopt.torch.Adam(torch_parameters(shapes, grads)).step


def test_model_shapes():
    for shapes, arrays, parameters in ((resnet50(), 161, 25_557_032), (bert_base(), 199, 109_482_240)):
        assert len(shapes) == arrays
        assert sum(map(math.prod, shapes)) == parameters


@pytest.mark.parametrize("name", LISTS)
def test_many_fastopt(compare, rng, name):
    shapes = LISTS[name]
    grads, moved = gradients(rng, shapes), 4 * 7 * sum(map(math.prod, shapes))
    functions = {"fastopt": fastopt_numpy(shapes, grads), "fastopt, one buffer": fastopt_flat(grads)}
    if torch is not None:
        functions["fastopt, torch tensors"] = fastopt_torch(shapes, grads)
        functions["fastopt.torch"] = drop_in(shapes, grads)
    for version, opt in torch_optimizers(
        "Adam", {}, lambda: torch_parameters(shapes, grads), ["torch fused", "torch foreach"]
    ).items():
        functions[version] = opt.step
    compare(f"Adam, {name}", {label: (function, moved) for label, function in functions.items()})


@pytest.mark.parametrize("name", CLIPPED)
def test_clipped_fastopt(compare, rng, name):
    """``clip_norm`` and the step, against ``clip_grad_norm_`` and torch's fused step."""
    shapes = CLIPPED[name]
    grads, moved = gradients(rng, shapes), 4 * 8 * sum(map(math.prod, shapes))
    functions = {
        "fastopt": fastopt_numpy(shapes, grads, clip_norm=1.0),
        "fastopt, no clipping": fastopt_numpy(shapes, grads),
    }
    if torch is not None:
        functions["fastopt, torch tensors"] = fastopt_torch(shapes, grads, clip_norm=1.0)
        for label, foreach in (("torch clip, fused", None), ("torch clip foreach, fused", True)):
            functions[label] = torch_clipped(torch_parameters(shapes, [g.copy() for g in grads]), foreach)
    compare(
        f"Adam with clip_norm, {name}", {label: (function, moved) for label, function in functions.items()}
    )


def torch_clipped(parameters, foreach):
    opt = torch.optim.Adam(parameters, fused=True)

    def step():
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=foreach)
        opt.step()

    return step
