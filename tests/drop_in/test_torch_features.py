"""What torch's own loops do with an optimizer, done with the classes of fastopt.torch beside torch's."""

import copy
import inspect
import io
import itertools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

import fastopt.torch
from fastopt.torch.kept import Kept

LIMIT = 1e-10
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
# Optimizers take parameters with their names since torch 2.6.
NAMED = torch.nn.Module.named_parameters if VERSION >= (2, 6) else torch.nn.Module.parameters
PAIRS = ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "RAdam", "NAdam", "Adafactor"]
OWN = ["Lion", "LAMB", "RowwiseAdagrad", "RowwiseAdam"]


def model(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(dtype)


def loss_of(net, step):
    torch.manual_seed(1000 + step)
    dtype = next(net.parameters()).dtype
    x, y = torch.randn(16, 5, dtype=dtype), torch.randn(16, 3, dtype=dtype)
    return (net(x) - y).square().mean()


def train(net, opt, steps=range(6), after=lambda: None, **step):
    for k in steps:
        opt.zero_grad()
        loss_of(net, k).backward()
        opt.step(**step)
        after()


def assert_same(one, other, limit=LIMIT):
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        np.testing.assert_allclose(p.detach().numpy(), q.detach().numpy(), rtol=limit, atol=limit)


def put(own, new):
    own.data = new


def both(name, **options):
    """Pairs of a model and its optimizer, ours and torch's."""
    ours, theirs = model(), model()
    make, twin = getattr(fastopt.torch, name), getattr(torch.optim, name)
    return (ours, make(ours.parameters(), **options)), (theirs, twin(theirs.parameters(), **options))


def test_importing_fastopt_does_not_import_torch():
    source = "import sys, fastopt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0


@pytest.mark.parametrize("name", PAIRS)
def test_signatures_are_those_of_torch_and_the_shared_options(name):
    ours, theirs = (inspect.signature(getattr(m, name)) for m in (fastopt.torch, torch.optim))
    shared = ["rows", "step_per_row", "clip_row_norm", "state_dtype", "master_weights", "seed"]
    assert set(ours.parameters) == {*theirs.parameters, *shared}
    assert issubclass(getattr(fastopt.torch, name), getattr(torch.optim, name))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    "schedule",
    [
        lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, 0.5),
        lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10),
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=20, cycle_momentum=False),
        lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1 / (k + 1)),
    ],
)
def test_schedulers(name, schedule):
    pairs = both(name, lr=0.05)
    for net, opt in pairs:
        train(net, opt, after=schedule(opt).step)
    assert_same(pairs[0][0], pairs[1][0])


@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam"])
def test_a_scheduler_that_moves_momentum(name):
    options = {"lr": 0.05, "momentum": 0.8} if name == "SGD" else {"lr": 0.05}
    pairs = both(name, **options)
    for net, opt in pairs:
        train(net, opt, after=torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=20).step)
    assert_same(pairs[0][0], pairs[1][0])


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_numbers_below_zero_are_taken_in_mid_run(name, option):
    """As from a schedule that goes on beyond its end."""
    pairs = both(name, lr=0.01, weight_decay=0.1)
    for net, opt in pairs:
        train(net, opt, range(3))
        opt.param_groups[0][option] = -0.01
        train(net, opt, range(3, 6))
        opt.param_groups[0][option] = 0.01
        train(net, opt, range(6, 8))
    assert_same(pairs[0][0], pairs[1][0])


@pytest.mark.parametrize("name", OWN)
def test_classes_that_torch_lacks_take_a_learning_rate_below_zero(name):
    """The step goes as far the other way."""
    ends = []
    for lr in (0.5, -0.5):
        p = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
        opt = getattr(fastopt.torch, name)([p], lr=0.1, weight_decay=0.0)
        opt.param_groups[0]["lr"] = lr
        p.grad = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(4, 3)
        opt.step()
        ends.append(p.detach())
    torch.testing.assert_close(ends[0] - 1, 1 - ends[1])
    assert (ends[0] < 1).all()


@pytest.mark.parametrize(
    ("name", "flag", "options"),
    [
        ("SGD", "nesterov", {"momentum": 0.9}),
        ("SGD", "maximize", {}),
        ("RMSprop", "centered", {}),
        ("Adam", "amsgrad", {}),
        ("RAdam", "decoupled_weight_decay", {"weight_decay": 0.1}),
    ],
)
def test_flags_go_by_their_truth(name, flag, options):
    pairs = both(name, lr=0.01, **options, **{flag: 1})
    for net, opt in pairs:
        train(net, opt, range(3))
        opt.param_groups[0][flag] = 0
        train(net, opt, range(3, 6))
    assert_same(pairs[0][0], pairs[1][0])


def test_products_of_momenta_are_those_of_each_parameter():
    """Parameters that make equally many steps make them with other betas."""
    results = []
    for module in (fastopt.torch, torch.optim):
        params = [torch.nn.Parameter(torch.full((3,), k + 1.0, dtype=torch.float64)) for k in range(3)]
        opt = module.NAdam(params, lr=0.1)
        for k in range(12):
            opt.param_groups[0]["betas"] = 0.95 - 0.07 * k, 0.999
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, k - 3.0) if k % 4 != i else None
            opt.step()
            if k == 5:
                opt.state[params[1]]["mu_product"].mul_(0.9)
        results.append((*params, *(opt.state[p]["mu_product"] for p in params)))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6 if p.ndim == 0 else 1e-10, atol=0)


@pytest.mark.parametrize("name", PAIRS)
def test_a_learning_rate_that_is_a_tensor_is_read_at_each_step(name):
    rates = [torch.tensor(0.02, dtype=torch.float64) for _ in range(2)]
    pairs = [both(name, lr=rate)[k] for k, rate in enumerate(rates)]
    for rate, (net, opt) in zip(rates, pairs, strict=True):
        train(net, opt, after=lambda rate=rate: rate.mul_(0.5))
    assert_same(pairs[0][0], pairs[1][0])


@pytest.mark.parametrize("name", PAIRS)
def test_groups_options_and_new_groups(name):
    if name == "Adagrad" and VERSION < (2, 6):
        pytest.skip("this torch's own Adagrad has no state for new groups")
    nets, opts = [model(), model()], []
    for module, net in zip((fastopt.torch, torch.optim), nets, strict=True):
        first, last = (list(NAMED(net[k])) for k in (0, 2))
        opt = getattr(module, name)([{"params": first, "lr": 0.03, "weight_decay": 0.1}], lr=0.01)
        train(net, opt, range(3))
        opt.add_param_group({"params": last, "maximize": True})
        train(net, opt, range(3, 5))
        opt.param_groups[0]["lr"] = 0.001
        opt.param_groups[1]["weight_decay"] = 0.2
        train(net, opt, range(5, 8))
        if NAMED is torch.nn.Module.named_parameters:
            assert opt.param_groups[0]["param_names"] == ["weight", "bias"]
        opts.append(opt)
    assert_same(*nets)
    assert set(opts[0].state_dict()["state"]) == set(opts[1].state_dict()["state"])


def test_options_that_need_another_state_begin_it():
    nets = model(), model()
    for module, net in zip((fastopt.torch, torch.optim), nets, strict=True):
        opt = module.SGD(net.parameters(), lr=0.1)
        train(net, opt, range(2))
        opt.param_groups[0]["momentum"] = 0.9
        train(net, opt, range(2, 6))
    assert_same(*nets)


@pytest.mark.parametrize("name", [*PAIRS, *OWN])
def test_copies_and_pickles_go_on(name):
    net = model()
    opt = getattr(fastopt.torch, name)(net.parameters(), lr=0.01)
    train(net, opt)
    copied, own = copy.deepcopy((net, opt))
    saved = io.BytesIO()
    torch.save((net, opt), saved)
    saved.seek(0)
    loaded, other = torch.load(saved, weights_only=False)
    whole, third = pickle.loads(pickle.dumps((net, opt)))
    for one, its in ((net, opt), (copied, own), (loaded, other), (whole, third)):
        train(one, its, range(6, 9))
        assert_same(one, net, 0)


@pytest.mark.parametrize("name", [*PAIRS, *OWN])
def test_state_is_loaded_from_files_of_weights_alone(name):
    first, second = model(), model()
    make = getattr(fastopt.torch, name)
    opt, other = make(first.parameters(), lr=0.01), make(second.parameters(), lr=0.5)
    train(first, opt)
    saved = io.BytesIO()
    torch.save({"model": first.state_dict(), "opt": opt.state_dict()}, saved)
    saved.seek(0)
    found = torch.load(saved, weights_only=True)
    second.load_state_dict(found["model"])
    other.load_state_dict(found["opt"])
    train(first, opt, range(6, 9))
    train(second, other, range(6, 9))
    assert_same(first, second, 0)


STATES, DTYPES = (None, "bfloat16", "8bit"), (torch.bfloat16, torch.float16, torch.float32)
# A kernel is compiled for each. With HYPOTHESIS_PROFILE=thorough float16 goes with every format of state too.
STORED = [
    (master, state, dtype)
    for master, state, dtype in itertools.product((False, True), STATES, DTYPES)
    if dtype is not torch.float16 or state is None or os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
]


@pytest.mark.parametrize(("master", "state_dtype", "dtype"), STORED)
def test_state_in_other_formats_is_saved_and_loaded_to_the_bit(dtype, state_dtype, master):
    first, second = model(dtype=dtype), model(dtype=dtype)
    options = {"lr": 0.01, "state_dtype": state_dtype, "master_weights": master}
    opt = fastopt.torch.AdamW(first.parameters(), **options)
    train(first, opt)
    second.load_state_dict(first.state_dict())
    other = fastopt.torch.AdamW(second.parameters(), **options)
    other.load_state_dict(opt.state_dict())
    train(first, opt, range(6, 9))
    train(second, other, range(6, 9))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_what_is_written_to_a_parameter_reaches_its_master():
    torch.manual_seed(0)
    start = torch.randn(40, dtype=torch.bfloat16)
    results = []
    for write in (
        lambda p: p.copy_(start),
        lambda p: put(p, start.clone()),
        lambda p: p[:20].copy_(start[:20]),
        lambda p: None,
    ):
        p = torch.nn.Parameter(torch.ones(40, dtype=torch.bfloat16))
        opt = fastopt.torch.SGD([p], lr=1e-3, master_weights=True)
        for k in range(6):
            p.grad = torch.full_like(p, 0.125)
            opt.step()
            if k == 2:
                with torch.no_grad():
                    write(p)
        assert torch.equal(opt.state[p]["master"].bfloat16(), p.detach())
        results.append(opt.state[p]["master"])
    copied, replaced, partly, left = results
    expected = start.float()
    for _ in range(3):
        expected = expected - 1e-3 * 0.125
    torch.testing.assert_close(copied, expected)
    assert torch.equal(replaced, copied) and torch.equal(partly, torch.cat([copied[:20], left[20:]]))
    torch.testing.assert_close(left, torch.full((40,), 1 - 6 * 1e-3 * 0.125))


@pytest.mark.parametrize("model_first", [True, False])
def test_masters_are_loaded_to_the_bit_before_or_after_the_model(model_first):
    first, second = model(0, torch.bfloat16), model(1, torch.bfloat16)
    options = {"lr": 1e-3, "master_weights": True}
    opt = fastopt.torch.AdamW(first.parameters(), **options)
    train(first, opt)
    other = fastopt.torch.AdamW(second.parameters(), **options)
    train(second, other, range(2))
    saved = copy.deepcopy((first.state_dict(), opt.state_dict()))
    loads = [lambda: second.load_state_dict(saved[0]), lambda: other.load_state_dict(saved[1])]
    for load in loads if model_first else reversed(loads):
        load()
    train(first, opt, range(6, 9))
    train(second, other, range(6, 9))
    masters = [
        [own[p]["master"] for p in net.parameters()]
        for own, net in ((opt.state, first), (other.state, second))
    ]
    assert all(map(torch.equal, *masters))


def test_numbers_are_not_loaded_as_codes():
    net = model(dtype=torch.float32)
    opt = torch.optim.AdamW(net.parameters())
    train(net, opt)
    other = fastopt.torch.AdamW(net.parameters(), state_dtype="8bit")
    lr, state = other.param_groups[0]["lr"], other.state
    opt.param_groups[0]["lr"] = 7.0
    with pytest.raises(ValueError, match=r"'exp_avg' has dtype torch\.float32: expected 8-bit codes"):
        other.load_state_dict(opt.state_dict())
    assert other.state is state and other.param_groups[0]["lr"] == lr
    train(net, other, range(1))


@pytest.mark.parametrize("name", PAIRS)
def test_closures_and_hooks(name):
    seen = []
    pairs = both(name, lr=0.01)
    for net, opt in pairs:
        opt.register_step_pre_hook(lambda *given: seen.append("before"))
        opt.register_step_post_hook(lambda *given: seen.append("after"))
        for k in range(4):

            def closure(net=net, opt=opt, k=k):
                opt.zero_grad()
                loss = loss_of(net, k)
                loss.backward()
                return loss

            assert opt.step(closure).item() > 0
    assert seen == ["before", "after"] * 8
    assert_same(pairs[0][0], pairs[1][0])


@pytest.mark.parametrize("name", [*PAIRS, *OWN])
def test_steps_within_the_backward_pass(name):
    nets = model(), model()
    make = getattr(fastopt.torch, name)
    whole = make(nets[0].parameters(), lr=0.01)
    train(nets[0], whole)
    opts = {p: make([p], lr=0.01) for p in nets[1].parameters()}

    def hook(p):
        opts[p].step()
        opts[p].zero_grad()

    for p in nets[1].parameters():
        p.register_post_accumulate_grad_hook(hook)
    for k in range(6):
        loss_of(nets[1], k).backward()
    assert_same(*nets)


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("name", ["Adam", "SGD", "AdamW", "Adagrad"])
def test_a_scaler_scales_and_skips(name, fused):
    nets = model(dtype=torch.float32), model(dtype=torch.float32)
    results = []
    for module, net in zip((fastopt.torch, torch.optim), nets, strict=True):
        opt = getattr(module, name)(net.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        for k in range(8):
            opt.zero_grad()
            loss = loss_of(net, k)
            if k == 3:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            if k % 2:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
        results.append(scaler.get_scale())
    assert results[0] == results[1]
    assert_same(*nets, 1e-5)


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("unscales", [True, False])
def test_gradients_stay_scaled_if_fused_unless_they_are_unscaled_before_the_step(unscales, fused):
    p = torch.nn.Parameter(torch.zeros(3))
    opt = copy.deepcopy(fastopt.torch.SGD([p], lr=1.0, fused=fused))
    [p] = opt.param_groups[0]["params"]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(p.sum()).backward()
    if unscales:
        scaler.unscale_(opt)
    scaler.step(opt)
    assert torch.equal(p.detach(), torch.full((3,), -1.0))
    assert torch.equal(p.grad, torch.full((3,), 64.0 if fused and not unscales else 1.0))


def test_a_fused_step_without_gradients_is_none_for_a_scaler_too():
    used, unused = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizers = [fastopt.torch.SGD([p], lr=1.0, fused=True) for p in (used, unused)]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(used.sum()).backward()
    for opt in optimizers:
        scaler.step(opt)
    assert torch.equal(used.detach(), torch.full((3,), -1.0))
    assert torch.equal(unused.detach(), torch.zeros(3))


def test_gradients_are_clipped_in_the_step():
    nets = model(), model()
    opt = fastopt.torch.AdamW(nets[0].parameters(), lr=0.1)
    twin = torch.optim.AdamW(nets[1].parameters(), lr=0.1)
    train(nets[0], opt, clip_norm=0.01)
    for k in range(6):
        twin.zero_grad()
        loss_of(nets[1], k).backward()
        norm = torch.nn.utils.clip_grad_norm_(nets[1].parameters(), 0.01)
        twin.step()
    assert opt.info.norm == pytest.approx(norm.item())
    assert opt.info.clipped
    assert_same(*nets)


# Parameters that kernels do not take


def odd_parameters():
    torch.manual_seed(3)
    return [
        torch.nn.Parameter(torch.randn(4, 3, dtype=torch.complex64)),
        torch.nn.Parameter(torch.randn(6, 4)[:, ::2]),
        torch.nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)),
        torch.nn.Parameter(torch.randn(5)),
    ]


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "RAdam", "NAdam"])
def test_others_go_the_way_of_torch(name):
    results = []
    for module in (fastopt.torch, torch.optim):
        params = odd_parameters()
        opt = getattr(module, name)(params, lr=0.01)
        seen = []
        opt.register_step_post_hook(lambda *given, seen=seen: seen.append(1))
        for k in range(5):
            for p in params:
                torch.manual_seed(k)
                p.grad = torch.randn_like(p)
            opt.step()
        assert len(seen) == 5
        saved = opt.state_dict()
        other = getattr(torch.optim, name)(params, lr=0.01)
        other.load_state_dict(saved)
        other.step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def test_other_parameters_are_left_alone_where_the_step_of_torch_refuses_one():
    whole, odd = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    opt = fastopt.torch.Adafactor([whole, odd], lr=0.1)
    for p in (whole, odd):
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="does not support complex parameters"):
        opt.step()
    assert torch.equal(whole.detach(), torch.ones(3)) and not opt.state[whole]
    opt = fastopt.torch.Adam([whole, odd], lr=0.1)
    opt.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr"):
        opt.step()
    assert torch.equal(odd.detach(), torch.ones_like(odd))


@pytest.mark.parametrize(
    ("option", "value", "dtype"),
    [
        ("state_dtype", "8bit", torch.float32),
        ("master_weights", True, torch.bfloat16),
        ("clip_row_norm", 1.0, torch.float32),
    ],
)
def test_options_that_the_step_of_torch_does_not_know_are_refused(option, value, dtype):
    p, other = torch.nn.Parameter(torch.ones(4, 3, dtype=dtype).t()), torch.nn.Parameter(torch.ones(2, 2))
    opt = fastopt.torch.AdamW([p, other], lr=0.1, **{option: value})
    other.grad = torch.ones(2, 2)
    opt.step()
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=rf"{option} is .* torch's own step"):
        opt.step()
    p.data = p.data.contiguous()
    opt.step()
    assert (p < 1).all()


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_parameters_that_share_memory_go_the_way_of_torch(name):
    results = []
    for module in (fastopt.torch, torch.optim):
        torch.manual_seed(0)
        flat = torch.nn.Parameter(torch.randn(12))
        params = [flat, torch.nn.Parameter(flat.data[4:8]), torch.nn.Parameter(torch.randn(3))]
        apart = torch.nn.Parameter(torch.randn(3))
        opt = getattr(module, name)([*params, apart], lr=0.1)
        for k in range(4):
            for p in (*params, apart):
                p.grad = torch.full_like(p, k + 1.0)
            opt.step()
            if k == 1:
                apart.data = params[2].data
        results += [torch.cat([flat, apart])]
    torch.testing.assert_close(*results)
    with pytest.raises(ValueError, match="shares memory"):
        fastopt.torch.Lion([flat, params[1]])


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adagrad"])  # torch's others refuse it
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float64")])
@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no p.grad_dtype")
def test_gradients_may_be_of_another_dtype(name, dtypes):
    own, other = (getattr(torch, dtype) for dtype in dtypes)
    results = []
    for module in (fastopt.torch, torch.optim):
        torch.manual_seed(0)
        p, q = torch.nn.Parameter(torch.randn(4, 3, dtype=own)), torch.nn.Parameter(torch.randn(3, dtype=own))
        opt = getattr(module, name)([p, q], lr=0.1)
        for k in range(4):
            if k == 1:
                p.grad, p.grad_dtype = None, other
            p.grad = torch.randn(4, 3).to(p.grad_dtype)
            q.grad = torch.ones_like(q)
            opt.step()
        results.append(torch.cat([p.detach(), q.detach()[None]]))
    torch.testing.assert_close(*results, rtol=1e-5 if own is torch.float32 else 0.03, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no p.grad_dtype")
def test_sparse_gradients_may_be_of_another_dtype():
    results = []
    for dtype in (torch.float32, torch.float64):
        p = torch.nn.Parameter(torch.ones(50, 8))
        p.grad_dtype = dtype
        opt = fastopt.torch.Adam([p], lr=0.1)
        p.grad = sparse(1, p).to(dtype)
        opt.step()
        results.append(p.detach())
    assert torch.equal(*results) and (results[0] != 1).any()


def test_a_class_that_torch_lacks_refuses_them():
    for p in odd_parameters()[:3]:
        opt = fastopt.torch.Lion([p])
        p.grad = torch.ones_like(p)
        with pytest.raises(TypeError, match="Lion takes C-contiguous tensors"):
            opt.step()


def test_a_step_that_is_differentiated():
    p = torch.ones(3, requires_grad=True)
    start = p.clone()
    start.grad = p * 2
    opt = fastopt.torch.SGD([start], lr=0.1, differentiable=True)
    opt.step()
    start.sum().backward()
    assert torch.equal(p.grad, torch.full((3,), 0.8))


def test_gradients_that_are_not_contiguous_are_taken():
    results = []
    for module in (fastopt.torch, torch.optim):
        p = torch.nn.Parameter(torch.ones(4, 3))
        opt = module.Adam([p], lr=0.1)
        p.grad = torch.arange(12.0).reshape(3, 4).t()
        opt.step()
        p.grad = torch.ones(1, 3).expand(4, 3)
        opt.step()
        results.append(p)
    assert torch.allclose(*results, rtol=1e-6)


# Sparse gradients


def sparse(seed, p):
    torch.manual_seed(seed)
    rows = torch.randint(0, len(p), (7,))
    values = torch.randn(7, p.shape[1], dtype=p.dtype)
    return torch.sparse_coo_tensor(rows[None], values, p.shape, check_invariants=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_adam_has_the_bits_of_torch(dtype):
    """But for its root in float32, which MKL does not round to the nearest."""
    results = []
    for module in (fastopt.torch, torch.optim):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(50, 8, dtype=dtype))
        opt = module.SparseAdam([p], lr=0.01)
        for k in range(10):
            p.grad = sparse(k, p)
            opt.step()
        results.append((p.detach(), *(opt.state[p][name] for name in ("exp_avg", "exp_avg_sq"))))
        assert opt.state[p]["step"] == 10
    limit = 4 * torch.finfo(dtype).eps * (dtype == torch.float32)
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=limit, atol=0.01 * limit)
    assert all(torch.equal(ours, theirs) for ours, theirs in [*zip(*results, strict=True)][1:])


@pytest.mark.parametrize(("name", "options"), [("SGD", {}), ("SGD", {"momentum": 0.9}), ("Adagrad", {})])
def test_sparse_gradients_do_what_torch_does(name, options):
    results = []
    for module in (fastopt.torch, torch.optim):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(50, 8, dtype=torch.float64))
        opt = getattr(module, name)([p], lr=0.1, **options)
        for k in range(6):
            p.grad = sparse(k, p)
            opt.step()
        results.append(p)
    assert torch.allclose(*results, rtol=LIMIT, atol=LIMIT)


def test_sparse_values_may_be_strided():
    results = []
    for values in (torch.ones(1, 4).expand(3, 4), torch.ones(3, 4)):
        p = torch.nn.Parameter(torch.zeros(6, 4))
        opt = fastopt.torch.Adam([p], lr=0.1)
        p.grad = torch.sparse_coo_tensor(torch.tensor([[1, 2, 1]]), values, p.shape, check_invariants=True)
        opt.step(clip_norm=1.0)
        results.append(p.detach())
    assert torch.equal(*results) and results[0].any()


def test_adafactor_refuses_sparse_gradients_as_torch_does():
    p = torch.nn.Parameter(torch.zeros(6, 4))
    p.grad = sparse(0, p)
    for module in (fastopt.torch, torch.optim):
        with pytest.raises(RuntimeError, match=r"^Adafactor does not support sparse gradients$"):
            module.Adafactor([p]).step()
    assert not p.any()
    results = []
    for module in (fastopt.torch, torch.optim):  # the gradient of a module is dense where it has to be
        torch.manual_seed(0)
        own = fastopt.torch.Embedding(6, 4)
        own(torch.tensor([1, 2, 1])).sum().backward()
        module.Adafactor(own.parameters(), lr=0.1).step()
        results.append(own.weight.detach())
    torch.testing.assert_close(*results)


def test_dense_and_sparse_gradients_may_alternate():
    p = torch.nn.Parameter(torch.zeros(6, 4))
    opt = fastopt.torch.Adam([p], lr=0.1)
    for k in range(6):
        p.grad = sparse(k, p) if k % 2 else torch.ones_like(p)
        opt.step()
        assert opt.state[p]["step"] == k + 1
    saved = copy.deepcopy(opt.state_dict())
    assert saved["state"][0]["exp_avg"].shape == p.shape
    twin = torch.nn.Parameter(p.detach().clone())
    other = fastopt.torch.Adam([twin], lr=0.1)
    other.load_state_dict(saved)
    for own, its in ((p, opt), (twin, other)):
        own.grad = sparse(9, p)
        its.step()
    assert torch.equal(p, twin)


# Shared memory


def test_state_is_the_memory_that_kernels_work_on():
    p = torch.nn.Parameter(torch.zeros(4))
    opt = fastopt.torch.SGD([p], lr=1.0, momentum=0.5)
    p.grad = torch.ones(4)
    opt.step()
    buffer = opt.state[p]["momentum_buffer"]
    opt.step()
    assert opt.state[p]["momentum_buffer"] is buffer
    assert torch.equal(buffer, torch.full((4,), 1.5))
    buffer.zero_()
    opt.step()
    assert torch.equal(buffer, torch.ones(4))
    opt.state[p]["momentum_buffer"] = torch.full((4,), 2.0)  # another tensor is taken over
    opt.step()
    assert torch.equal(opt.state[p]["momentum_buffer"], torch.full((4,), 2.0))
    opt.state.clear()
    opt.step()
    assert torch.equal(opt.state[p]["momentum_buffer"], torch.ones(4))


@pytest.mark.parametrize(
    "move",
    [lambda own, new: own.set_(new), lambda own, new: own.share_memory_().copy_(new), put],
    ids=["set_", "share_memory_", "data"],
)
def test_other_memory_within_a_tensor_of_the_state_counts(move):
    p = torch.nn.Parameter(torch.zeros(4))
    opt = fastopt.torch.SGD([p], lr=1.0, momentum=0.5)
    p.grad = torch.ones(4)
    opt.step()
    old = opt.state[p]["momentum_buffer"].data  # whose memory stays where it is
    move(opt.state[p]["momentum_buffer"], torch.full((4,), 4.0))
    for expected in (3.0, 2.5):
        opt.step()
        assert torch.equal(opt.state[p]["momentum_buffer"], torch.full((4,), expected))
    assert old[0] in (1.0, 4.0)


def test_a_count_of_steps_that_is_changed_counts():
    results = []
    for module in (fastopt.torch, torch.optim):
        p = torch.nn.Parameter(torch.zeros(4))
        opt = module.Adam([p], lr=0.1)
        for k in range(4):
            p.grad = torch.full((4,), k + 1.0)
            opt.step()
            if k == 1:
                opt.state[p]["step"].fill_(100)
        results.append(p)
    assert torch.allclose(*results, rtol=1e-6)


def test_a_parameter_in_the_place_of_another_is_followed():
    """As programs do that add rows to a parameter in training."""
    results = []
    for module in (fastopt.torch, torch.optim):
        p = torch.nn.Parameter(torch.zeros(2, 3))
        opt = module.Adam([p], lr=0.1)
        for k in range(4):
            p.grad = torch.full(p.shape, k + 1.0)
            opt.step()
            if k == 1:
                state = opt.state.pop(p)
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.cat([state[name], torch.zeros(1, 3)])
                p = torch.nn.Parameter(torch.cat([p.detach(), torch.ones(1, 3)]))
                opt.param_groups[0]["params"][0] = p
                opt.state[p] = state
        results.append(p)
    assert torch.allclose(*results, rtol=1e-6)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop"])
def test_parameters_that_change_their_strides_go_on(name):
    """As in a model that becomes channels_last after its optimizer was made."""
    results = []
    for module in (fastopt.torch, torch.optim):
        torch.manual_seed(0)
        convolution = torch.nn.Conv2d(3, 4, 3)
        opt = getattr(module, name)(convolution.parameters(), lr=0.1)
        for k in range(4):
            torch.manual_seed(k)
            for p in convolution.parameters():
                p.grad = torch.randn_like(p)
            opt.step()
            if k == 1:
                convolution.to(memory_format=torch.channels_last)
        results.append(convolution)
    assert_same(*results, 1e-5)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_parameters_that_change_their_dtype_go_on(name):
    results = []
    for changes in (True, False):
        net, make = model(), getattr(fastopt.torch, name)
        opt = make(net.parameters(), lr=0.01)
        for k in range(6):
            if k == 3 and changes:
                net.float()
            for p in net.parameters():
                p.grad = torch.full_like(p, k + 1.0)
            opt.step()
        assert all(p.dtype == (torch.float32 if changes else torch.float64) for p in net.parameters())
        results.append(net.double())
    assert_same(*results, 1e-5)


def test_frozen_parameters_cost_nothing_and_stay(monkeypatch):
    net = model()
    net[0].requires_grad_(False)
    before = [p.clone() for p in net[0].parameters()]
    opt = fastopt.torch.AdamW(net.parameters(), lr=0.1)
    train(net, opt, range(2))
    with monkeypatch.context() as patch:
        patch.setattr(Kept, "_show", None)
        train(net, opt, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(net[0].parameters(), before, strict=True))
    assert not any(p in opt.state for p in net[0].parameters())
    net[0].requires_grad_(True)
    train(net, opt, range(4, 6))
    assert {int(opt.state[p]["step"]) for p in net[0].parameters()} == {2}
    assert {int(opt.state[p]["step"]) for p in net[2].parameters()} == {6}


def test_state_that_is_taken_out_begins_anew():
    p = torch.nn.Parameter(torch.zeros(4))
    opt = fastopt.torch.Adam([p], lr=0.1)
    p.grad = torch.ones(4)
    for _ in range(3):
        opt.step()
    del opt.state[p]["exp_avg"]
    opt.step()
    torch.testing.assert_close(opt.state[p]["exp_avg"], torch.full((4,), 0.1))


@pytest.mark.parametrize(("name", "option", "value"), [("Adam", "state_dtype", "int4"), ("Lion", "lr", -1.0)])
def test_bad_options_are_refused(name, option, value):
    with pytest.raises((ValueError, TypeError), match=option):
        getattr(fastopt.torch, name)([torch.zeros(3)], **{option: value})


# Parameters of which a part lies here


@pytest.fixture
def mesh():
    """A mesh of this process alone."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Lion"])
def test_shards_are_updated_where_they_lie(mesh, name):
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    results, options = [], {"momentum": 0.9} if name == "SGD" else {}
    for sharded in (True, False):
        torch.manual_seed(0)
        p = torch.randn(6, 4)
        p = torch.nn.Parameter(distribute_tensor(p, mesh, [Shard(0)]) if sharded else p)
        opt = getattr(fastopt.torch, name)([p], lr=0.1, **options)
        for k in range(3):
            gradient = torch.full((6, 4), k + 1.0)
            p.grad = distribute_tensor(gradient, mesh, [Shard(0)]) if sharded else gradient
            opt.step()
        if sharded:
            moments = [value for value in opt.state[p].values() if value.ndim]
            assert moments and all(isinstance(own, DTensor) and own.shape == p.shape for own in moments)
            with pytest.raises(ValueError, match="clip_grad_norm_"):
                opt.step(clip_norm=1.0)
        other = getattr(fastopt.torch, name)([p], lr=0.1, **options)
        other.load_state_dict(opt.state_dict())
        other.step()
        results.append(p.to_local() if sharded else p)
    assert torch.equal(*results)


def test_subclasses_are_made_as_ever():
    class Own(fastopt.torch.AdamW):
        pass

    class Lion(fastopt.torch.Lion):
        pass

    net = model()
    for make in (Own, Lion):
        train(net, make(net.parameters(), lr=0.01), range(2))
    assert "state_dtype" in inspect.signature(Own).parameters


def test_a_count_that_is_a_number_is_loaded():
    """As torch's own checkpoints had it before 1.12."""
    nets = model(), model()
    for module, net in zip((fastopt.torch, torch.optim), nets, strict=True):
        opt = torch.optim.Adam(net.parameters(), lr=0.01)
        train(net, opt, range(3))
        saved = opt.state_dict()
        for own in saved["state"].values():
            own["step"] = int(own["step"])
        other = module.Adam(net.parameters(), lr=0.01)
        other.load_state_dict(saved)
        train(net, other, range(3, 6))
    assert_same(*nets)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in ("Adam", "AdamW", "NAdam", "RAdam", "SGD")),
        *((name, torch.float16) for name in ("AdamW", "SGD")),
    ],
)
def test_parameters_of_16_bits_may_change_their_strides(name, dtype):
    p = torch.nn.Parameter(torch.ones(4, 3, 2, 2, dtype=dtype))
    opt = getattr(fastopt.torch, name)([p], lr=0.01)
    for k in range(4):
        p.grad = torch.ones_like(p)
        opt.step()
        if k == 1:
            p.data = p.data.to(memory_format=torch.channels_last)
    p.data = p.data.contiguous()
    p.grad = torch.ones_like(p)
    opt.step(clip_norm=1.0)  # kernels take it again
    assert torch.isfinite(p).all() and (p < 1).all()


def test_a_shard_that_is_put_elsewhere_is_followed(mesh):
    from torch.distributed.tensor import distribute_module

    net = distribute_module(torch.nn.Linear(2, 2), mesh)
    opt = fastopt.torch.SGD(net.parameters(), lr=1.0)
    for _ in range(3):
        before = [p.to_local().detach().clone() for p in net.parameters()]
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        for p, own in zip(net.parameters(), before, strict=True):
            torch.testing.assert_close(p.to_local().detach(), own - 1)
        net.double()
        net.float()


def test_rows_that_are_behind_are_not_copied():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(50, 8, dtype=torch.float64))
    opt = fastopt.torch.Adam([p], lr=0.1, rows="dense")
    for k in range(3):
        p.grad = sparse(k, p)
        opt.step()
    with pytest.raises(RuntimeError, match=r"call flush\(\) before"):
        copy.deepcopy((p, opt))
    opt.flush()
    own, other = copy.deepcopy((p, opt))
    for q, its in ((p, opt), (own, other)):
        q.grad = sparse(5, q)
        its.step()
        its.flush()
    torch.testing.assert_close(p, own, rtol=1e-10, atol=1e-10)


def test_sparse_adam_leaves_single_elements_to_torch():
    results = []
    for module in (fastopt.torch, torch.optim):
        p = torch.nn.Parameter(torch.zeros(2, 2))
        opt = module.SparseAdam([p], lr=0.1)
        for values in ([[1.0, 1], [1, 1]], [[1.0, 0], [0, 0]]):
            p.grad = torch.tensor(values).to_sparse(2)
            opt.step()
        results.append(p)
    assert torch.equal(*results)


def test_steps_are_counted_though_one_is_interrupted(monkeypatch):
    p = torch.nn.Parameter(torch.zeros(4))
    opt = fastopt.torch.Adam([p], lr=0.1)
    p.grad = torch.ones(4)
    opt.step()

    def interrupted(self, without):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Kept, "_count", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step()
    opt.step()
    assert opt.state[p]["step"] == 3


def test_parameters_that_are_made_later_are_taken():
    lazy = torch.nn.LazyLinear(4)
    opt = fastopt.torch.Lion(lazy.parameters(), lr=0.1)
    lazy(torch.ones(2, 3)).sum().backward()
    before = lazy.weight.detach().clone()
    opt.step()
    torch.testing.assert_close(lazy.weight.detach(), before - 0.1)


def test_flags_that_are_set_later_count():
    start = torch.nn.Parameter(torch.ones(3))
    opt = fastopt.torch.SGD([start], lr=0.1)
    start.grad = torch.ones(3)
    opt.step()
    kept = opt._kept
    opt.param_groups[0]["differentiable"] = True
    assert opt._current() is not kept and not opt._current().params


def test_hooks_of_loading_are_respected():
    net = model()
    opt = fastopt.torch.Adam(net.parameters(), lr=0.01)
    train(net, opt, range(3))
    other = fastopt.torch.Adam(net.parameters(), lr=0.5)
    other.register_load_state_dict_pre_hook(lambda own, given: given["opt"])
    other.load_state_dict({"opt": opt.state_dict()})
    assert other.param_groups[0]["lr"] == 0.01


def test_options_of_groups_stay_with_a_checkpoint_of_torch():
    net = model(dtype=torch.float32)
    groups = [{"params": [p]} for p in net.parameters()]
    twin = torch.optim.Adam([dict(group) for group in groups])
    groups[1]["state_dtype"] = np.float32
    opt = fastopt.torch.Adam([dict(group) for group in groups], seed=7)
    opt.load_state_dict(twin.state_dict())
    assert [group["state_dtype"] for group in opt.param_groups] == [None, "float32", None, None]
    assert [group["seed"] for group in opt.param_groups] == [7] * 4
    with pytest.raises(ValueError, match="rows"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "rows": "nonsense"})
    assert len(opt.param_groups) == 4
    opt.param_groups = twin.param_groups
    train(net, opt, range(2))
