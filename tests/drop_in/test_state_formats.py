"""The classes of fastopt.torch with every format of their state."""

import copy
import os

import numpy as np
import pytest
import torch

import fastopt.torch

CLASSES = [
    own
    for _, own in sorted(vars(fastopt.torch).items())
    if isinstance(own, type) and issubclass(own, torch.optim.Optimizer)
]
# Each combination has kernels of its own: of fewer bits some go with HYPOTHESIS_PROFILE=thorough alone.
FEWER_BITS = CLASSES
if os.environ.get("HYPOTHESIS_PROFILE") != "thorough":
    FEWER_BITS = [fastopt.torch.Adagrad, fastopt.torch.Adam, fastopt.torch.RowwiseAdagrad]
FORMATS = [
    pytest.param(own, state_dtype, id=f"{own.__name__}-{state_dtype}")
    for state_dtype in (None, "bfloat16", "8bit")
    for own in (CLASSES if state_dtype is None else FEWER_BITS)
]
START = np.random.default_rng(0).standard_normal((4, 300), np.float32)
GRADS = np.random.default_rng(1).standard_normal((4, 4, 300), np.float32)
ROWS = np.array([1, 3])


def parameter(dtype=torch.float32):
    return torch.nn.Parameter(torch.from_numpy(START.copy()).to(dtype))


def step(opt, p, k, by_rows):
    """Step ``k``, with a gradient of all rows or of two."""
    grad = torch.from_numpy(GRADS[k]).to(p.dtype)
    p.grad = (
        torch.sparse_coo_tensor(ROWS[None], grad[ROWS], p.shape, check_invariants=True) if by_rows else grad
    )
    opt.step()


@pytest.mark.parametrize(("make", "state_dtype"), FORMATS)
def test_steps_go_on_to_the_bit_from_a_checkpoint(make, state_dtype):
    """From one before the first step, and from one between a dense step and one by rows."""
    kinds = make.traits.sparse_alone, not make.traits.dense_alone  # whether by rows
    results = []
    for at in (None, 0, 1):
        p = parameter()
        opt = make([p], lr=0.01, state_dtype=state_dtype)
        for k, by_rows in enumerate(kinds):
            if k == at:
                saved = copy.deepcopy(opt.state_dict())
                opt = make([p], lr=0.5, state_dtype=state_dtype)
                opt.load_state_dict(saved)
            step(opt, p, k, by_rows)
        results.append({"p": p.detach(), **opt.state[p]})
    assert not torch.equal(results[0]["p"], torch.from_numpy(START))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
@pytest.mark.parametrize("state_dtype", [None, "8bit"])
@pytest.mark.parametrize("make", [fastopt.torch.NAdam, fastopt.torch.Adagrad], ids=lambda own: own.__name__)
def test_numbers_and_small_parameters_go_on_to_the_bit_from_a_checkpoint(make, state_dtype, shape):
    """In 16 bits, to which torch rounds what it loads."""
    results = []
    for loads in (False, True):
        p = torch.nn.Parameter(torch.full(shape, 1.2345, dtype=torch.bfloat16))
        opt = make([p], lr=0.01, state_dtype=state_dtype)
        for k in range(4):
            if loads and k:
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
            p.grad = torch.full(shape, 0.37 + k, dtype=p.dtype)
            opt.step()
        results.append({"p": p.detach(), **opt.state[p]})
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_momentum_in_fewer_bits_goes_on_to_the_bit_from_a_checkpoint():
    """The random bits that it is rounded by follow from a count of steps, which torch's SGD does not have."""
    results = []
    for changes in (False, True):
        p = parameter()
        opt = fastopt.torch.SGD([p], lr=0.01, momentum=0.9, state_dtype="8bit")
        for k in range(4):
            if changes and k == 2:
                opt = copy.deepcopy(opt)
                [p] = opt.param_groups[0]["params"]
            if changes and k == 3:
                saved = copy.deepcopy(opt.state_dict())
                opt = fastopt.torch.SGD([p], lr=0.5, momentum=0.9, state_dtype="8bit")
                opt.load_state_dict(saved)
            step(opt, p, k, by_rows=False)
        results.append({"p": p.detach(), **opt.state[p]})
    assert results[0]["step"] == 4
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.1])
@pytest.mark.parametrize("master", [False, True])
def test_adagrad_begins_with_codes_of_its_initial_value(master, value, by_rows):
    dtype = torch.bfloat16 if master else torch.float32
    options = {"lr": 0.1, "initial_accumulator_value": value, "state_dtype": "8bit", "master_weights": master}
    p, late, q = parameter(dtype), parameter(dtype), parameter(dtype).detach()
    opt, plain = fastopt.torch.Adagrad([p], **options), fastopt.AdaGrad([q], **options)
    opt.add_param_group({"params": [late]})
    for k in range(2):
        grad = torch.from_numpy(GRADS[k]).to(dtype)
        step(opt, p, k, by_rows)
        plain.step([fastopt.IndexedSlices(ROWS, grad[ROWS]) if by_rows else grad])
        assert torch.equal(p, q)
    p.grad = None
    step(opt, late, 0, by_rows)
    assert opt.state[late]["sum"].dtype == torch.uint8
    for name, array in plain.state[0].items():
        np.testing.assert_array_equal(opt.state[p][name].numpy(), array)


def test_adagrad_takes_numbers_for_codes_before_the_first_step_alone():
    p = parameter()
    other = torch.optim.Adagrad([p], initial_accumulator_value=0.1)
    opt = fastopt.torch.Adagrad([p], state_dtype="8bit", initial_accumulator_value=0.1)
    opt.load_state_dict(other.state_dict())
    step(other, p, 0, False)
    before = opt.state
    with pytest.raises(ValueError, match=r"'sum' has dtype torch\.float32: expected 8-bit codes"):
        opt.load_state_dict(other.state_dict())
    assert opt.state is before
    step(opt, p, 0, False)
    opt = fastopt.torch.Adagrad([p], state_dtype="8bit")
    opt.state[p]["sum"][0] = 1.0
    with pytest.raises(ValueError, match="expected 8-bit codes"):
        opt.step()
