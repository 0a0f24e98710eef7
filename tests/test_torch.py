"""Against torch.optim, torch.nn.utils and torch.optim.lr_scheduler."""

import inspect
import math

import cases
import numpy as np
import pytest
import reference

import fastopt

torch = pytest.importorskip("torch")

SHAPES = [(), (9,), (4, 5), (2, 3, 2)]
STEPS = 20
LIMIT = {np.dtype(np.float64): 1e-10, np.dtype(np.float32): 1e-5}
TORCH_CASES = [combination for combination in cases.COMBINATIONS if combination[0].torch]
TORCH_IDS = [name for name, (case, *_) in zip(cases.IDS, cases.COMBINATIONS, strict=True) if case.torch]


def torch_optimizer(case, params, options):
    options = {**options, **case.torch_own}
    return getattr(torch.optim, case.torch)(params, foreach=False, **options)


def difference(got, want, scale):
    """Norm of the difference, relative to ``scale``."""
    norm = float(np.linalg.norm(np.asarray(got, np.float64) - np.asarray(want, np.float64)))
    return norm / scale if scale else norm


def assert_close(got, want, name, scale=None):
    """Equal in norm and element by element; single elements may have cancelled to nearly 0."""
    limit = LIMIT[got.dtype]
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert difference(got, want, np.linalg.norm(want) if scale is None else scale) < limit, name
    atol = limit * (reference.peak(want) if scale is None else scale)
    np.testing.assert_allclose(got, want, rtol=limit, atol=atol, err_msg=name)


@pytest.fixture
def exact_products():
    """Torch keeps NAdam's product of momenta in its default dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def torch_arrays(params, torch_opt):
    """Torch's parameters, state slots by name, and step counts."""
    found, steps = {}, []
    for i, p in enumerate(params):
        state = {name: value for name, value in torch_opt.state[p].items() if value is not None}
        step = state.pop("step", None)
        state.pop("mu_product", None)  # of the steps alone: not kept here
        steps.append(None if step is None else int(step))
        found[i, "param"] = p.detach().numpy()
        found.update({(i, name): value.numpy() for name, value in state.items()})
    return found, steps


def run_both(case, dtype, options, seed):
    """(name, fastopt's array, torch's, scale) of every parameter and state slot after some steps.

    The scale is the largest norm that torch's array had: that of one element may end near 0.
    """
    rng = np.random.default_rng(seed)
    params = [cases.parameter(rng, shape, dtype) for shape in SHAPES]
    theirs = [torch.nn.Parameter(torch.tensor(p)) for p in params]
    opt, torch_opt = case.make(params, options), torch_optimizer(case, theirs, options)
    scales = {}
    for _ in range(STEPS):
        grads = [np.asarray(rng.standard_normal(shape), dtype) for shape in SHAPES]
        if rng.random() < 0.3:
            grads[rng.integers(len(grads))] = None
        for p, g in zip(theirs, grads, strict=True):
            p.grad = None if g is None else torch.tensor(g)
        opt.step(grads)
        torch_opt.step()
        want, steps = torch_arrays(theirs, torch_opt)
        for name, array in want.items():
            scales[name] = max(scales.get(name, 0.0), float(np.linalg.norm(array)))
    got = {}
    for i, (p, state) in enumerate(zip(params, opt.state_dict()["state"].values(), strict=True)):
        assert steps[i] in (None, state["step"])
        got[i, "param"] = p
        got.update({(i, name): array for name, array in state.items() if name != "step"})
    assert set(got) == set(want)
    return [(name, got[name], want[name], scales[name]) for name in want]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("case", "dtype", "decay"), TORCH_CASES, ids=TORCH_IDS)
@pytest.mark.usefixtures("exact_products")
def test_parameters_and_state_follow_torch(case, dtype, decay, seed):
    options = case.options(np.random.default_rng([seed, 1]), decay)
    for name, got, want, scale in run_both(case, dtype, options, [seed, 2]):
        assert_close(got, want, str(name), scale)


@pytest.mark.parametrize("case", [case for case in cases.CASES if case.torch], ids=str)
def test_defaults_are_those_of_torch(case):
    torch_defaults = torch_optimizer(case, [torch.zeros(1)], {"lr": 0.1}).defaults
    for name, value in case.make(np.zeros(1), {"lr": 0.1}).defaults.items():
        if name in torch_defaults and name not in case.fixed:
            assert value == torch_defaults[name], name
    if case.torch in ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "RAdam", "NAdam"):
        theirs = inspect.signature(getattr(torch.optim, case.torch)).parameters["lr"].default
        assert case.make(np.zeros(1), {}).defaults["lr"] == theirs


# In v - mean^2 of a centered RMSProp, torch's fused multiply-add keeps the square of a huge finite
# mean from overflowing, where its own unfused code, like fastopt's, gets inf - inf.
BAD = [(case, bad) for case in cases.CASES if case.torch for bad in (math.nan, math.inf, -math.inf, 1e200)
       if "centered" not in case.name or not math.isfinite(bad)]  # fmt: skip


@pytest.mark.parametrize(("case", "bad"), BAD, ids=[f"{case}-{bad}" for case, bad in BAD])
@pytest.mark.usefixtures("exact_products")
def test_gradients_that_are_not_finite_or_overflow_give_what_torch_gives(case, bad):
    rng = np.random.default_rng(11)
    options = case.options(rng, weight_decay=True)
    p = rng.standard_normal(6)
    theirs = torch.nn.Parameter(torch.tensor(p))
    opt, torch_opt = case.make(p, options), torch_optimizer(case, [theirs], options)
    for step in range(10):
        g = rng.standard_normal(6)
        if step == 4:
            g[1] = bad
        if step == 6:
            g[2] = -bad
        theirs.grad = torch.tensor(g)
        opt.step(g)
        torch_opt.step()
        state = opt.state_dict()["state"][0]
        pairs = [("param", p, theirs.detach().numpy())]
        pairs += [(name, array, torch_opt.state[theirs][name].numpy())
                  for name, array in state.items() if name != "step"]  # fmt: skip
        for name, got, want in pairs:
            with np.errstate(over="ignore"):
                np.testing.assert_allclose(got, want, rtol=1e-9, err_msg=f"{name} at step {step}")


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("adam", math.nan),
        ("adam", math.inf),
        ("adam", 1e30),
        ("rmsprop_centered", math.nan),
        ("rmsprop_centered", math.inf),
    ],
)
def test_float32_gradients_that_are_not_finite_give_what_torch_gives(name, bad):
    case = cases.BY_NAME[name]
    rng = np.random.default_rng(12)
    options = case.options(rng, weight_decay=False)
    p = cases.parameter(rng, 100, np.float32)
    theirs = torch.nn.Parameter(torch.tensor(p))
    opt, torch_opt = case.make(p, options), torch_optimizer(case, [theirs], options)
    for step in range(6):
        g = cases.parameter(rng, 100, np.float32)
        if step == 2:
            g[::7] = bad
        theirs.grad = torch.tensor(g)
        opt.step(g)
        torch_opt.step()
        np.testing.assert_allclose(p, theirs.detach().numpy(), rtol=1e-4, atol=1e-5)


def sparse_gradient(rng, rows, width, dtype):
    indices = rng.integers(0, rows, 30)
    values = rng.standard_normal((30, width)).astype(dtype)
    tensor = torch.sparse_coo_tensor(torch.tensor(indices)[None], torch.tensor(values), (rows, width),
                                     check_invariants=True)  # fmt: skip
    return fastopt.IndexedSlices(indices, values), tensor


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", ["SparseAdam", "Adagrad", "SGD"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("maximize", [False, True])
def test_sparse_gradients_with_duplicates_follow_torch(name, dtype, maximize):
    rng = np.random.default_rng(13)
    p = cases.parameter(rng, (40, 3), dtype)
    theirs = torch.nn.Parameter(torch.tensor(p))
    common = {"lr": 0.05, "maximize": maximize}
    if name == "SparseAdam":
        options = {**common, "betas": (0.8, 0.95), "eps": 1e-4}
        opt, torch_opt = fastopt.Adam(p, **options), torch.optim.SparseAdam([theirs], **options)
    elif name == "Adagrad":
        options = {**common, "lr_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-5}
        opt, torch_opt = fastopt.AdaGrad(p, **options), torch.optim.Adagrad([theirs], **options)
    else:
        opt, torch_opt = fastopt.SGD(p, **common), torch.optim.SGD([theirs], **common)
    for step in range(1, STEPS + 1):
        slices, theirs.grad = sparse_gradient(rng, 40, 3, dtype)
        if name == "SparseAdam":
            # SparseAdam adds eps to the root of the uncorrected moment
            opt.param_groups[0]["eps"] = options["eps"] / math.sqrt(1 - options["betas"][1] ** step)
        opt.step(slices)
        torch_opt.step()
    assert_close(p, theirs.detach().numpy(), "param")
    for slot, array in opt.state_dict()["state"][0].items():
        if slot != "step":
            assert_close(array, torch_opt.state[theirs][slot].numpy(), slot)


@pytest.fixture
def embedded():
    """A parameter whose gradient is a sparse tensor, not coalesced, and the slices that it stands for."""
    module = torch.nn.Embedding(20, 3, sparse=True)
    indices = torch.tensor([[4, 0, 4], [19, 4, 0]])
    module(indices).square().sum().backward()
    grad = module.weight.grad
    assert not grad.is_coalesced() and grad._nnz() == 6
    return module.weight, grad, fastopt.IndexedSlices(grad._indices()[0].clone(), grad._values().clone())


@pytest.mark.parametrize("coalesced", [False, True])
def test_sparse_tensors_are_taken_as_their_slices(embedded, coalesced):
    weight, grad, slices = embedded
    other = weight.detach().clone()
    given = grad.coalesce() if coalesced else grad
    assert fastopt.grad_norm({"w": given}) == pytest.approx(fastopt.grad_norm(slices), rel=1e-6)
    info = fastopt.Adam([weight], lr=0.1).step([given], clip_norm=0.5)
    assert info == fastopt.Adam(other, lr=0.1).step(slices, clip_norm=0.5)
    assert torch.equal(weight.detach(), other)
    assert not grad.is_coalesced()  # nobody changed it


def test_sparse_tensors_are_added_up_with_others(embedded):
    weight, grad, slices = embedded
    other = weight.detach().clone()
    fastopt.Adam({"w": weight}, lr=0.1).step({"w": [grad, slices, grad.coalesce()]})
    both = [slices, slices, fastopt.IndexedSlices(grad.coalesce().indices()[0], grad.coalesce().values())]
    parts = [torch.cat([getattr(one, name) for one in both]) for name in ("indices", "values")]
    fastopt.Adam(other, lr=0.1).step(fastopt.IndexedSlices(*parts))
    assert torch.equal(weight.detach(), other)
    fastopt.Adam(weight).step((grad, slices))  # for a parameter that is alone


def test_sparse_tensors_are_clipped_and_cleared_in_place(embedded):
    weight, grad, slices = embedded
    norm = fastopt.clip_grad_norm([grad], 0.5)
    assert torch.equal(grad._values(), slices.values * np.float32(0.5 / (norm + 1e-6)))
    fastopt.SGD(weight, lr=0.1).step(grad, zero_grads=True)
    assert not grad._values().any()


def test_strided_values_of_sparse_tensors_are_copied_where_they_are_only_read():
    """As autograd leaves them of a sum: one row for all indices."""
    weight, indices = torch.zeros(20, 3), torch.tensor([[4, 0, 4]])
    grad = torch.sparse_coo_tensor(indices, torch.ones(1, 3).expand(3, 3), (20, 3), check_invariants=True)
    assert fastopt.grad_norm([grad]) == pytest.approx(15**0.5)
    opt = fastopt.SGD([weight], lr=0.5)
    opt.step([grad])
    assert weight[:5, 0].tolist() == [-0.5, 0, 0, 0, -1]
    for writes in (lambda: opt.step([grad], zero_grads=True), lambda: fastopt.clip_grad_norm([grad], 0.5)):
        with pytest.raises(ValueError, match="expected a C-contiguous array"):
            writes()
    assert weight[:5, 0].tolist() == [-0.5, 0, 0, 0, -1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sparse_tensors_of_other_dtypes_and_empty_ones(dtype):
    p, indices = torch.ones(4, 2, dtype=dtype), torch.tensor([[3, 3]])
    opt = fastopt.SGD(p, lr=0.5)
    opt.step(torch.sparse_coo_tensor(indices, torch.ones(2, 2, dtype=dtype), (4, 2)))
    assert p.tolist() == [[1, 1], [1, 1], [1, 1], [0, 0]]
    opt.step(torch.sparse_coo_tensor(indices[:, :0], torch.ones(0, 2, dtype=dtype), (4, 2)))
    assert p.tolist() == [[1, 1], [1, 1], [1, 1], [0, 0]] and opt.steps == 2


@pytest.mark.parametrize("wrap", [torch.tensor, lambda a: torch.nn.Parameter(torch.tensor(a))])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_torch_parameters_are_updated_in_their_own_memory(wrap, dtype):
    start = np.arange(6, dtype=dtype).reshape(2, 3)
    tensor = wrap(start)
    pointer, view = tensor.data_ptr(), tensor.detach().numpy()
    opt = fastopt.SGD({"w": tensor}, lr=1.0)
    opt.step({"w": torch.ones(2, 3, dtype=tensor.dtype)})
    opt.step({"w": np.ones((2, 3), dtype)})
    indices = torch.tensor([1, 1])
    opt.step({"w": fastopt.IndexedSlices(indices, torch.ones(2, 3, dtype=tensor.dtype))})
    want = start - 2
    want[1] -= 2
    assert tensor.data_ptr() == pointer
    np.testing.assert_array_equal(tensor.detach().numpy(), want)
    np.testing.assert_array_equal(view, want)
    assert opt.param_groups[0]["params"]["w"] is tensor


def test_a_model_is_trained_with_the_gradients_that_backward_leaves():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    twin = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    twin.load_state_dict(model.state_dict())
    x, y = torch.randn(16, 3), torch.randn(16, 1)
    opt = fastopt.Adam(model.parameters(), lr=0.01)
    torch_opt = torch.optim.Adam(twin.parameters(), lr=0.01, foreach=False)
    for _ in range(10):
        for net in (model, twin):
            net.zero_grad()
            torch.nn.functional.mse_loss(net(x), y).backward()
        opt.step([p.grad for p in model.parameters()])
        torch_opt.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs.detach().numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 5.0, math.inf])
def test_clipping_by_norm_follows_torch(dtype, factor):
    rng = np.random.default_rng(14)
    grads = [cases.parameter(rng, shape, dtype) for shape in SHAPES]
    own_norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads))
    max_norm = factor * own_norm
    theirs = [torch.nn.Parameter(torch.tensor(g)) for g in grads]
    for p in theirs:
        p.grad = p.detach().clone()
    their_norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm, foreach=False)
    params = [np.zeros_like(g) for g in grads]
    info = fastopt.SGD(params, lr=1.0).step([g.copy() for g in grads], clip_norm=max_norm)
    norm = fastopt.clip_grad_norm(grads, max_norm)
    rtol = 4 * float(np.finfo(dtype).eps)
    assert norm == pytest.approx(float(their_norm), rel=rtol)
    assert norm == pytest.approx(own_norm, rel=1e-14)
    assert info == (norm, factor <= 1.0, False, None)
    for g, p, theirs_p in zip(grads, params, theirs, strict=True):
        np.testing.assert_allclose(g, theirs_p.grad.numpy(), rtol=rtol)
        np.testing.assert_allclose(-p, theirs_p.grad.numpy(), rtol=rtol)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_gradients_that_are_not_finite_follows_torch(bad):
    g = np.array([1.0, bad, -2.0])
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    p.grad = torch.tensor(g)
    torch.nn.utils.clip_grad_norm_([p], 1.0, foreach=False)
    ours = np.zeros(3)
    fastopt.SGD(ours, lr=1.0).step(g.copy(), clip_norm=1.0)
    fastopt.clip_grad_norm(g, 1.0)
    np.testing.assert_array_equal(g, p.grad.numpy())
    np.testing.assert_array_equal(ours, -p.grad.numpy())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_clipping_by_value_equals_torch(dtype):
    g = np.array([0.5, -0.5, 0.7, -3, math.nan, math.inf, -math.inf, 0.3, -0.0], dtype)
    p = torch.nn.Parameter(torch.zeros(9, dtype=torch.tensor(g).dtype))
    p.grad = torch.tensor(g)
    torch.nn.utils.clip_grad_value_([p], 0.6, foreach=False)
    fastopt.clip_grad_value({"a": [g]}, 0.6)
    np.testing.assert_array_equal(g, p.grad.numpy())


@pytest.mark.parametrize(
    ("schedule", "scheduler"),
    [
        (fastopt.schedules.step(3, 0.5), lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5)),
        (
            fastopt.schedules.multistep([9, 2, 4, 4], 0.3),
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4, 4, 9], 0.3),
        ),
        (fastopt.schedules.exponential(0.9), lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)),
        (fastopt.schedules.cosine(30), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 30)),
        (
            fastopt.schedules.cosine(30, final=0.1),
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 30, eta_min=0.02),
        ),
        (fastopt.schedules.constant(), lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)),
    ],
    ids=lambda value: type(value).__name__ if callable(value) else None,
)
def test_schedules_follow_torch(schedule, scheduler):
    p = torch.zeros(1)
    torch_opt = torch.optim.SGD([p], lr=0.2)
    stepper = scheduler(torch_opt)
    lr = 0.2 * schedule
    for step in range(30):
        assert lr(step) == pytest.approx(torch_opt.param_groups[0]["lr"], rel=1e-12)
        torch_opt.step()
        stepper.step()
    ours = np.zeros(1)
    fastopt.SGD(ours, lr=lr).step(np.ones(1))
    assert ours[0] == -0.2


def test_infinite_parameters_under_decoupled_decay_stay_as_in_torch():
    p = np.array([math.inf, 1.0])
    theirs = torch.nn.Parameter(torch.tensor(p))
    opt, torch_opt = fastopt.AdamW(p, lr=0.1), torch.optim.AdamW([theirs], lr=0.1)
    theirs.grad = torch.ones(2, dtype=torch.float64)
    opt.step(np.ones(2))
    torch_opt.step()
    np.testing.assert_allclose(p, theirs.detach().numpy(), rtol=1e-15)
