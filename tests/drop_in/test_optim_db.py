"""Every configuration of torch's own tests of its optimizers, with the classes of fastopt.torch beside
torch's."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import fastopt.torch

# Parameters are compared in norm and element by element, relative to their size.
LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5}
STEPS = 6
OURS = {info.name: info for info in optim_db if hasattr(fastopt.torch, info.name)}
# Torch's classes that fastopt.torch does not offer, which are left out.
OTHERS = {"ASGD", "Adadelta", "Adamax", "LBFGS", "Muon", "Rprop"}
SHAPES = (), (5,), (4, 3), (2, 3, 2), (0, 2)
CONFIGURATIONS = [
    pytest.param(info, config.kwargs, id=f"{name}-{config.desc or 'default'}")
    for name, info in OURS.items()
    for config in info.optim_inputs_func(device="cpu")
]


def test_all_classes_are_offered_or_known_not_to_be():
    assert {info.name for info in optim_db} - OTHERS == set(OURS)


def parameters(info, dtype, seed=0):
    torch.manual_seed(seed)
    shapes = [shape for shape in SHAPES if len(shape) == 2] if info.only_supports_sparse_grads else SHAPES
    if info.name == "Adafactor":  # torch's divides by the size
        shapes = [shape for shape in shapes if 0 not in shape]
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def set_gradients(info, params, seed):
    """Gradients of a step; some parameters have none in some steps."""
    torch.manual_seed(seed)
    for k, p in enumerate(params):
        p.grad = torch.randn_like(p) * 3
        if info.only_supports_sparse_grads:
            rows = torch.randint(0, len(p), (3,)) if len(p) else torch.empty(0, dtype=torch.int64)
            values = torch.randn(len(rows), p.shape[1], dtype=p.dtype)
            p.grad = torch.sparse_coo_tensor(rows[None], values, p.shape, check_invariants=True)
        if (seed + k) % 5 == 4:
            p.grad = None


def assert_same(got, want, limit):
    """Equal element by element, relative to the largest."""
    for one, other in zip(got, want, strict=True):
        one, other = (tensor.detach().numpy() for tensor in (one, other))
        assert one.dtype == other.dtype
        size = np.abs(other).max(initial=0.0)
        np.testing.assert_allclose(one, other, rtol=limit, atol=limit * size)


def state_of(opt):
    """All state by parameter and name."""
    saved = opt.state_dict()["state"]
    named = ((key, name, value) for key, own in saved.items() for name, value in own.items())
    return {(key, name): torch.as_tensor(value) for key, name, value in named if value is not None}


def assert_same_state(opt, twin, limit):
    one, other = state_of(opt), state_of(twin)
    assert set(one) == set(other)
    assert_same([one[key] for key in other], other.values(), limit)


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(("info", "options"), CONFIGURATIONS)
def test_results_and_state_are_those_of_torch(info, options, dtype):
    ours, theirs = parameters(info, dtype), parameters(info, dtype)
    options, own = copy.deepcopy(options), copy.deepcopy(options)
    opt, twin = getattr(fastopt.torch, info.name)(ours, **options), info.optim_cls(theirs, **own)
    for step in range(STEPS):
        set_gradients(info, ours, step)
        set_gradients(info, theirs, step)
        opt.step()
        twin.step()
    assert_same(ours, theirs, LIMIT[dtype])
    assert_same_state(opt, twin, LIMIT[dtype])


@pytest.mark.parametrize("to_ours", [True, False], ids=["from torch", "to torch"])
@pytest.mark.parametrize(("info", "options"), CONFIGURATIONS)
def test_a_run_goes_on_from_a_checkpoint_of_the_other(info, options, to_ours):
    dtype = torch.float64
    first, second, whole = (parameters(info, dtype) for _ in range(3))
    classes = [info.optim_cls, getattr(fastopt.torch, info.name)]
    if not to_ours:
        classes.reverse()
    one, other = (
        make(own, **copy.deepcopy(options)) for make, own in zip(classes, (first, second), strict=True)
    )
    uninterrupted = info.optim_cls(whole, **copy.deepcopy(options))
    for step in range(2 * STEPS):
        if step == STEPS:
            with torch.no_grad():
                for p, q in zip(second, first, strict=True):
                    p.copy_(q)
            other.load_state_dict(copy.deepcopy(one.state_dict()))
            one = other
            if not to_ours:  # torch rounds numbers of its state anew when it loads them
                uninterrupted.load_state_dict(copy.deepcopy(uninterrupted.state_dict()))
        own = first if step < STEPS else second
        set_gradients(info, own, step)
        set_gradients(info, whole, step)
        one.step()
        uninterrupted.step()
    assert_same(second, whole, 1e-10)
    assert_same_state(other, uninterrupted, 1e-10)


def errors():
    for name, info in OURS.items():
        for dtype in (torch.float32, torch.float64):
            for k, given in enumerate(info.optim_error_inputs_func(device="cpu", dtype=dtype)):
                yield pytest.param(info, given, id=f"{name}-{dtype}-{k}-{given.optimizer_error_input.desc}")


@pytest.mark.parametrize(("info", "given"), list(errors()))
def test_error_inputs_raise_as_in_torch(info, given):
    config, make = given.optimizer_error_input, getattr(fastopt.torch, info.name)
    if config.params is None:
        config.params = [torch.nn.Parameter(torch.randn(1, 1))]
    assert given.error_on in (OptimizerErrorEnum.CONSTRUCTION_ERROR, OptimizerErrorEnum.STEP_ERROR)
    if given.error_on == OptimizerErrorEnum.STEP_ERROR:
        opt = make(config.params, **config.kwargs)
        with pytest.raises(given.error_type, match=given.error_regex):
            opt.step()
    elif issubclass(given.error_type, Warning):
        with pytest.warns(given.error_type, match=given.error_regex):
            make(config.params, **config.kwargs)
    else:
        with pytest.raises(given.error_type, match=given.error_regex):
            make(config.params, **config.kwargs)


IMPLEMENTATIONS = [
    (info, flag)
    for info, flag in itertools.product(OURS.values(), ("foreach", "fused"))
    if flag in info.supported_impls
]


@pytest.mark.parametrize(("info", "flag"), IMPLEMENTATIONS, ids=lambda own: getattr(own, "name", own))
def test_flags_of_the_implementation_are_taken(info, flag):
    ours, theirs = parameters(info, torch.float64), parameters(info, torch.float64)
    opt = getattr(fastopt.torch, info.name)(ours, **{flag: True})
    twin = info.optim_cls(theirs)
    for step in range(3):
        set_gradients(info, ours, step)
        set_gradients(info, theirs, step)
        opt.step()
        twin.step()
    assert_same(ours, theirs, 1e-10)
