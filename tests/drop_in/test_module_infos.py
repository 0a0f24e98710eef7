"""Every case of torch's own tests of its embedding modules, and of the functions below them, with the modules
of fastopt.torch beside torch's."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn
from torch.testing import make_tensor
from torch.testing._internal import common_nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from torch.utils.checkpoint import checkpoint

import fastopt.torch
from fastopt.torch.row_gradients import RowGradients

# How far results may be from torch's, relative to the largest of them; of 16 bits torch.testing's own.
LIMIT = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}
NAMES = "Embedding", "EmbeddingBag"
OPERATORS = {"nn.functional.embedding": "Embedding", "nn.functional.embedding_bag": "EmbeddingBag"}
# Arguments of the function that are those of the module's call
CALLED_WITH = "offsets", "per_sample_weights"
IDS = torch.tensor([[1, 2], [2, 0]])


def pair(name, *args, **options):
    """A module of ours and torch's with the same weights."""
    torch.manual_seed(0)
    theirs = getattr(nn, name)(*args, **options)
    ours = getattr(fastopt.torch, name)(*args, **copy.deepcopy(options))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def both(name, **options):
    """Small ones in float64."""
    return pair(name, 5, 3, **{"dtype": torch.float64, **options})


def dense(gradient):
    if gradient is None:
        return None
    if isinstance(gradient, RowGradients):
        return gradient.dense()
    return gradient.to_dense() if gradient.is_sparse else gradient


def assert_same(got, want):
    """Equal element by element, relative to the largest."""
    assert got.dtype == want.dtype
    largest = want.abs().nan_to_num(posinf=0.0).max().item() if want.numel() else 0.0
    limit = LIMIT[want.dtype]
    torch.testing.assert_close(got, want, rtol=limit, atol=limit * largest, equal_nan=True)


def forward_and_back(module, given, named, gradient):
    """The result, the table, which max_norm changes, and the gradients of it and of the weights."""
    weights = named.get("per_sample_weights")
    if weights is not None:
        weights = weights.detach().to(module.weight.dtype).requires_grad_()
        named = {**named, "per_sample_weights": weights}
    out = module(*given, **named)
    out.backward(gradient.to(out.dtype))
    found = [out.detach(), module.weight.detach(), dense(module.weight.grad)]
    return found if weights is None else [*found, weights.grad]


def assert_same_passes(ours, theirs, *given, divisor=1, **named):
    """Everything beside torch's; the table's gradient beside torch's through ``divisor``. That of 16 bits is
    compared with the gradient of the same numbers in float32, rounded: torch adds up in 16 bits."""
    with torch.no_grad():
        shape = copy.deepcopy(theirs)(*given, **named).shape
    torch.manual_seed(1)
    gradient = torch.randn(shape).to(theirs.weight.dtype)
    exact = copy.deepcopy(theirs).float()
    got, want = (forward_and_back(module, given, named, gradient) for module in (ours, theirs))
    if theirs.weight.dtype.itemsize == 2:
        want[2] = forward_and_back(exact, given, named, gradient)[2]
    want[2] = (want[2] / divisor).to(theirs.weight.dtype)
    for one, other in zip(got, want, strict=True):
        assert_same(one, other)


def samples(training):
    """The functions' sample inputs with gradients or without, of which torch has more."""
    for info in (info for info in op_db if info.name in OPERATORS):
        for dtype in sorted(info.supported_dtypes("cpu"), key=str):
            torch.manual_seed(0)
            found = info.reference_inputs("cpu", dtype, requires_grad=training)
            for k, sample in enumerate(found):
                yield pytest.param(
                    OPERATORS[info.name], sample, id=f"{OPERATORS[info.name]}-{dtype}-{training}-{k}"
                )


def as_modules(name, sample):
    """The modules of a function's sample, and what they are called with."""
    options = {key: value for key, value in sample.kwargs.items() if key not in CALLED_WITH}
    named = {key: value for key, value in sample.kwargs.items() if key in CALLED_WITH}
    table = sample.input.detach()
    modules = [
        getattr(package, name)(*table.shape, _weight=table.clone(), **options)
        for package in (fastopt.torch, nn)
    ]
    return *modules, named


SAMPLES = [*samples(True), *samples(False)]


@pytest.mark.parametrize(("name", "sample"), SAMPLES)
def test_samples_of_the_functions(name, sample):
    ours, theirs, named = as_modules(name, sample)
    indices = sample.args[0]
    divisor = 1
    if theirs.scale_grad_by_freq:
        theirs.sparse = False  # with which torch has no backward pass
    if theirs.scale_grad_by_freq and name == "EmbeddingBag":
        # Torch's kernel for the CPU divides the gradient of an index by how often another is named.
        theirs.scale_grad_by_freq = False
        divisor = torch.bincount(indices.reshape(-1), minlength=len(theirs.weight)).clamp(min=1)[:, None]
    assert_same_passes(ours, theirs, indices, divisor=divisor, **named)
    assert isinstance(ours.weight.grad, RowGradients)


def test_there_are_samples():
    names = [own.values[0] for own in SAMPLES]
    assert names.count("Embedding") == 4 * (3 + 10)
    assert names.count("EmbeddingBag") == 4 * (32 + 49)


INFOS = [info for info in module_db if info.module_cls in (nn.Embedding, nn.EmbeddingBag)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_inputs_of_the_modules(info, dtype):
    given = {"device": "cpu", "dtype": dtype, "requires_grad": False, "training": True}
    inputs = info.module_inputs_func(info, **given)
    assert inputs
    for own in inputs:
        options = {**own.constructor_input.kwargs, "device": "cpu", "dtype": dtype}
        modules = pair(info.name.split(".")[-1], *own.constructor_input.args, **options)
        assert all(module.weight.dtype == dtype for module in modules)
        assert_same_passes(*modules, *own.forward_input.args, **own.forward_input.kwargs)


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_error_inputs_of_the_modules(info):
    make = getattr(fastopt.torch, info.name.split(".")[-1])
    given = {"device": "cpu", "dtype": torch.float32, "requires_grad": False, "training": True}
    if info.module_error_inputs_func is None:
        pytest.skip("this torch has none")
    for error in info.module_error_inputs_func(info, **given):
        made_of, called_with = (
            error.module_error_input.constructor_input,
            error.module_error_input.forward_input,
        )
        if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                make(*made_of.args, **made_of.kwargs)
            continue
        module = make(*made_of.args, **made_of.kwargs)
        with pytest.raises(error.error_type, match=error.error_regex):
            module(*called_with.args, **called_with.kwargs)


def older_cases():
    """The cases that are not made of a ModuleInfo yet, by name; as torch's test of them makes the modules."""
    find = getattr(common_nn, "get_new_module_tests", lambda: common_nn.new_module_tests)  # older torch
    for case in find():
        name = case.get("fullname") or f"{case['module_name']}_{case.get('desc', '')}"
        if name.startswith(("Embedding_", "EmbeddingBag_")):
            yield pytest.param(case, id=name)


@pytest.mark.parametrize("case", list(older_cases()))
def test_older_cases_of_the_modules(case):
    torch.manual_seed(0)
    theirs = case["constructor"]() if "constructor" in case else None
    if theirs is None:
        theirs = getattr(nn, case["module_name"])(*case["constructor_args"], dtype=case["default_dtype"])
    ours = copy.deepcopy(theirs)
    ours.__class__ = getattr(fastopt.torch, type(theirs).__name__)
    indices = case["input_fn"]()
    assert_same_passes(ours, theirs, indices)
    assert isinstance(ours.weight.grad, RowGradients)
    if not theirs.sparse:
        assert torch.autograd.gradcheck(
            lambda table: torch.func.functional_call(ours, {"weight": table}, (indices[:, :4],)),
            theirs.weight.detach().double().requires_grad_(),
        )


def test_all_older_cases_are_found():
    assert len(list(older_cases())) == 11


def test_error_inputs_of_the_functions():
    """Tables of other than two dimensions, which a module can get in place of its own."""
    for info in (info for info in op_db if info.name in OPERATORS and info.error_inputs_func):
        for error in info.error_inputs("cpu"):
            sample = error.sample_input
            for module in both(OPERATORS[info.name]):
                with pytest.raises(error.error_type, match=error.error_regex):
                    torch.func.functional_call(module, {"weight": sample.input}, sample.args)


ints = torch.tensor
REFUSED = [
    ({}, ints([5]), ints([0])),
    ({}, ints([-1]), ints([0])),
    ({"padding_idx": 0}, ints([[11, 8]])),
    ({"mode": "sum"}, ints([[-1, 1]]), None, torch.ones(1, 2, dtype=torch.float64)),
    ({}, ints([0.5]), ints([0])),
    ({}, ints([1, 2]), ints([0.0, 1.0])),
    ({}, ints([1, 2])),
    ({}, ints([1, 2]), ints([[0, 1]])),
    ({}, ints([[1, 2]]), ints([0])),
    ({}, ints(1)),
    ({}, ints([[[1]]]), ints([0])),
    ({}, ints([1, 2, 3]), ints([1, 2])),
    ({}, ints([1, 2, 3]), ints([0, 4])),
    ({"include_last_offset": True}, ints([1, 2, 3]), ints([0, 1, 5])),
    ({"include_last_offset": True}, ints([], dtype=torch.int64), ints([], dtype=torch.int64)),
    ({"mode": "average"}, ints([[1]])),
    ({"mode": "max", "sparse": True}, ints([[1]])),
    ({"mode": "max", "scale_grad_by_freq": True}, ints([[1]])),
    ({"mode": "mean"}, ints([[1]]), None, torch.ones(1, 1, dtype=torch.float64)),
    ({"mode": "max"}, ints([[1]]), None, torch.ones(1, 1, dtype=torch.float64)),
    ({"mode": "sum"}, ints([[1]]), None, torch.ones(1, 1)),
    ({"mode": "sum"}, ints([[1]]), None, torch.ones(1, dtype=torch.float64)),
]


@pytest.mark.parametrize("given", REFUSED, ids=str)
def test_bags_are_refused_by_exceptions_of_torch(given):
    options, *called_with = given
    ours, theirs = both("EmbeddingBag", **options)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)) as expected:
        theirs(*called_with)
    with pytest.raises(type(expected.value)) as found:
        ours(*called_with)
    assert type(found.value) is type(expected.value)


@pytest.mark.parametrize("name", NAMES)
def test_options_are_refused_by_exceptions_of_torch(name):
    for package in (nn, fastopt.torch):
        for padding in (5, -6):
            with pytest.raises(AssertionError, match="within num_embeddings"):
                getattr(package, name)(5, 3, padding_idx=padding)
        with pytest.raises(AssertionError, match="Shape of weight"):
            getattr(package, name)(5, 3, _weight=torch.ones(3, 5))


def test_bags_that_torch_does_not_look_at_are_refused():
    """Offsets that fall give it overlapping bags, and indices without bags a crash."""
    ours, _ = both("EmbeddingBag")
    with pytest.raises(ValueError, match="do not fall"):
        ours(ints([1, 2, 3]), ints([0, 2, 1]))
    with pytest.raises(ValueError, match="are empty, and there are 3 indices"):
        ours(ints([1, 2, 3]), ints([], dtype=torch.int64))


TAKEN = [
    ({}, ints([1, 2, 3], dtype=torch.int32), ints([0, 2])),
    ({}, ints([1, 2, 3]), ints([0, 2], dtype=torch.int32)),
    ({}, ints([1, 2, 3], dtype=torch.int16), ints([0, 2])),
    ({}, ints([True, False]), ints([0])),
    ({}, ints([1, 2, 3]), ints([0, 9, 0, 9, 3, 9])[::2]),
    ({"include_last_offset": True}, ints([1, 2, 3]), ints([0, 9, 1, 9, 3, 9])[::2]),
    ({"include_last_offset": True}, ints([1, 2, 3]), ints([0, 3])),
    ({"include_last_offset": True, "padding_idx": 4}, ints([0, 1, 2, 3]), ints([0, 3, 3])),
    ({}, ints([], dtype=torch.int64), ints([0, 0])),
    ({}, ints([], dtype=torch.int32), ints([], dtype=torch.int32)),
    ({}, torch.zeros(0, 3, dtype=torch.int64)),
    ({"padding_idx": 1}, ints([[1, 1], [1, 2]])),
    ({}, IDS.t()),
    ({}, ints([[3]]).expand(4, 2)),
]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("given", TAKEN, ids=str)
def test_bags_that_torch_takes_are_taken(given, mode):
    options, *called_with = given
    assert_same_passes(*both("EmbeddingBag", mode=mode, **options), *called_with)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_without_room_for_indices_are_empty(mode):
    """As torch's documentation has it of all empty bags; torch fails."""
    ours, theirs = both("EmbeddingBag", mode=mode)
    indices = torch.zeros(3, 0, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="step must be nonzero"):
        theirs(indices)
    out = ours(indices)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(3, 3, dtype=torch.float64))
    assert torch.equal(ours.weight.grad.dense(), torch.zeros_like(ours.weight))


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (4, 0)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_tables_without_elements(name, shape):
    indices = torch.zeros((1, 2) if shape[0] else (0, 2), dtype=torch.int64)
    assert_same_passes(*pair(name, *shape), indices)


def test_several_bags_of_a_table_without_columns():
    """At which torch fails."""
    ours, theirs = pair("EmbeddingBag", 4, 0)
    with pytest.raises(RuntimeError, match="i < index_size"):
        theirs(IDS)
    out = ours(IDS)
    out.sum().backward()
    assert out.shape == (2, 0) and ours.weight.grad.dense().shape == (4, 0)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_rows_that_are_not_finite(mode):
    ours, theirs = both("EmbeddingBag", mode=mode)
    for module in (ours, theirs):
        module.weight.data[1:4] = ints([float("nan"), float("inf"), -float("inf")])[:, None]
    assert_same_passes(ours, theirs, ints([[1, 0], [0, 1], [2, 3], [3, 4], [3, 3]]))


def test_the_largest_of_rows_that_are_not_finite():
    """As torch.max has it, which its documentation names; its kernel drops nan but in the first place."""
    ours, _ = both("EmbeddingBag", mode="max")
    ours.weight.data[1:4] = ints([float("nan"), float("inf"), -float("inf")])[:, None]
    indices = ints([[1, 0], [0, 1], [2, 3], [3, 4], [3, 3]])
    assert_same(ours(indices).detach(), ours.weight.detach()[indices].amax(1))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_gradients_are_the_derivatives(mode):
    ours, _ = both("EmbeddingBag", mode=mode, padding_idx=4, include_last_offset=True)
    indices, offsets = ints([1, 2, 2, 4, 0, 4]), ints([0, 3, 3, 5, 6])
    given = [ours.weight.detach().requires_grad_()]
    if mode == "sum":
        given.append(make_tensor(6, dtype=torch.float64, device="cpu", requires_grad=True))

    def call(table, *weights):
        return torch.func.functional_call(ours, {"weight": table}, (indices, offsets, *weights))

    assert torch.autograd.gradcheck(call, given)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_of_gradients_are_refused(name):
    ours, _ = both(name)
    (gradient,) = torch.autograd.grad(ours(IDS).square().sum(), ours.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()
    out = ours(IDS).sum()
    (gradient,) = torch.autograd.grad(out, ours.weight, retain_graph=True)
    (gradient.sum() + out).backward()  # which only needs the gradient's value
    assert torch.equal(ours.weight.grad.dense(), gradient.dense())
    out = ours(IDS).square().sum()
    out.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        out.backward()


def test_what_a_lookup_was_given_may_change_before_the_step():
    """Static buffers of graphs, or a loader's, are written anew."""
    ours, theirs = both("EmbeddingBag", mode="sum", include_last_offset=True)
    indices, offsets = ints([1, 2, 0]), ints([0, 2, 3])
    weights, gradient = torch.ones(3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    theirs(indices, offsets, weights).backward(gradient)
    out = ours(indices, offsets, weights)
    indices.fill_(4)
    weights.zero_()
    out.backward(gradient)
    offsets[1] = 0
    gradient.zero_()
    assert_same(ours.weight.grad.dense(), theirs.weight.grad)
    fastopt.torch.SGD(ours.parameters(), lr=1.0).step()
    torch.optim.SGD(theirs.parameters(), lr=1.0).step()
    assert_same(ours.weight, theirs.weight)


# What modules are used for beside forward and backward passes


@pytest.mark.parametrize("options", [{}, {"padding_idx": 1, "max_norm": 2.0, "norm_type": 1.0}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_modules_are_those_of_torch(name, options):
    ours, theirs = both(name, **options)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, type(theirs))
    own = inspect.signature(type(ours)).parameters
    assert {**own} == {**inspect.signature(type(theirs)).parameters, "fused": own["fused"]}
    assert "fused=True" in repr(getattr(fastopt.torch, name)(5, 3, fused=True))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert not theirs.load_state_dict(ours.state_dict()).missing_keys
    assert not ours.eval().training and ours.train().training
    assert ours.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert getattr(fastopt.torch, name)(5, 3, device="meta").weight.is_meta
    assert ours(IDS).requires_grad and not ours.requires_grad_(False)(IDS).requires_grad


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), saved_and_loaded]
)
@pytest.mark.parametrize("name", NAMES)
def test_copies_of_modules_and_of_their_gradients(name, copied):
    ours, theirs = both(name)
    for module in (ours, theirs):
        module(IDS).square().sum().backward()
    one, other = copied(ours), copied(theirs)
    assert type(one) is type(ours)
    assert (one.weight.grad is None) == (other.weight.grad is None)  # pickles leave gradients out
    for module in (one, other):
        module(IDS).square().sum().backward()
    assert_same(dense(one.weight.grad), other.weight.grad)
    assert_same(dense(copied(ours.weight.grad)), theirs.weight.grad)
    assert_same(dense(ours.weight.grad), theirs.weight.grad)


@pytest.mark.parametrize("name", NAMES)
def test_tables_in_shared_memory(name):
    ours, theirs = both(name)
    assert_same_passes(ours.share_memory(), theirs, IDS)
    assert ours.weight.is_shared()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float16, torch.float64])
def test_pretrained_tables(dtype):
    rows = torch.arange(12).reshape(4, 3).to(dtype)
    for package in (fastopt.torch, nn):
        module = package.Embedding.from_pretrained(rows, padding_idx=2)
        assert module.weight.data_ptr() == rows.data_ptr() and not module.weight.requires_grad
        assert torch.equal(module(IDS), rows[IDS])
    bag = fastopt.torch.EmbeddingBag.from_pretrained(rows.double(), mode="max", padding_idx=2, freeze=False)
    assert torch.equal(
        bag(IDS), nn.EmbeddingBag.from_pretrained(rows.double(), mode="max", padding_idx=2)(IDS)
    )


def test_pretrained_rows_are_limited_in_place():
    for name in NAMES:
        ours, theirs = torch.arange(1.0, 7).reshape(2, 3), torch.arange(1.0, 7).reshape(2, 3)
        for package, rows in ((fastopt.torch, ours), (nn, theirs)):
            getattr(package, name).from_pretrained(rows, max_norm=2.0, norm_type=0.5)(ints([[0, 1]]))
        assert_same(ours, theirs)
        assert ours.ne(torch.arange(1.0, 7).reshape(2, 3)).all()


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", NAMES)
def test_lookups_without_gradients(name, grad):
    ours, theirs = both(name, max_norm=0.5)
    with grad():
        got, want = ours(IDS), theirs(IDS)
    assert got.is_inference() == want.is_inference() and not got.requires_grad
    assert_same(got, want)
    assert_same_passes(ours, theirs, IDS)


@pytest.mark.parametrize("name", NAMES)
def test_lookups_under_autocast(name):
    ours, theirs = both(name, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_passes(ours, theirs, IDS)


@pytest.mark.parametrize("reentrant", [False, True])
def test_lookups_that_are_made_again_in_the_backward_pass(reentrant):
    results = []
    for module in both("EmbeddingBag", mode="max"):
        factor = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
        own = checkpoint(
            lambda x, module=module: torch.tanh(module(IDS)) * x, factor, use_reentrant=reentrant
        )
        own.sum().backward()
        results.append((dense(module.weight.grad), factor.grad))
    for got, want in zip(*results, strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("wrap", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("name", NAMES)
def test_tables_that_are_computed(name, wrap):
    results = []
    for module in both(name):
        torch.manual_seed(2)
        wrapped = getattr(nn.utils.parametrizations, wrap)(module)
        wrapped(IDS).square().sum().backward()
        results.append([p.grad for p in wrapped.parameters()])
    for got, want in zip(*results, strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_tables_of_others(name):
    ours, theirs = both(name)
    tables = [torch.full((5, 3), 2.0, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for module, table in zip((ours, theirs), tables, strict=True):
        torch.func.functional_call(module, {"weight": table * table}, (IDS,)).square().sum().backward()
        assert module.weight.grad is None
    assert_same(tables[0].grad, tables[1].grad)


@pytest.mark.parametrize("order", ["one graph", "table, head", "head, table", "table, head, table"])
def test_tied_weights(order):
    """A linear head over the table: dense gradients and lookups add up, to a dense one."""
    results = []
    for package, module in zip((fastopt.torch, torch.optim), both("Embedding"), strict=True):
        head = nn.Linear(3, 5, bias=False, dtype=torch.float64)
        head.weight = module.weight
        opt = package.Adam(module.parameters(), lr=0.1)
        for _ in range(2):
            opt.zero_grad()
            if order == "one graph":
                head(module(IDS)).square().sum().backward()
            for part in order.split(", "):
                if part == "table":
                    module(IDS).square().sum().backward()
                if part == "head":
                    head(torch.ones(2, 3, dtype=torch.float64)).square().sum().backward()
            opt.step()
        results.append((dense(module.weight.grad), module.weight.detach()))
    for got, want in zip(*results, strict=True):
        assert_same(got, want)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_hooks_see_gradients():
    results = []
    for module in both("EmbeddingBag"):
        seen = []
        module.weight.register_hook(lambda gradient: gradient * 2)
        module.weight.register_post_accumulate_grad_hook(
            lambda p, seen=seen: seen.append(dense(p.grad.clone()))
        )
        module.register_full_backward_pre_hook(lambda _, found, seen=seen: seen.append(found[0].clone()))
        module(IDS).square().sum().backward()
        results.append(seen)
    assert len(results[0]) == 2
    for got, want in zip(*results, strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("fused", [True, None])
def test_gradients_are_scaled_back(fused):
    tables, made = [], both("EmbeddingBag", dtype=torch.float32)
    for package, module in zip((fastopt.torch, torch.optim), made, strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        opt = package.SGD(module.parameters(), lr=1.0, fused=fused)
        for loss in (module(IDS).square().sum(), module(IDS + 1).sum()):
            scaler.scale(loss).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        scaler.step(opt)
        tables.append(module.weight.detach())
    assert_same(*tables)


def test_gradients_are_read_as_others():
    ours, theirs = both("EmbeddingBag")
    ours(IDS).square().sum().backward()
    theirs(IDS).square().sum().backward()
    got, want = ours.weight.grad, theirs.weight.grad
    assert got.tolist() == want.tolist() and (got.cpu().numpy() == want.numpy()).all()
    assert torch.equal(got.norm(), want.norm()) and torch.equal(got[1], want[1])
    assert torch.equal(got.to_dense(), want) and torch.equal(got.data, want)
    assert (got.shape, got.dtype, got.layout, got.device) == (
        want.shape,
        want.dtype,
        want.layout,
        want.device,
    )


# What looks into the lookup itself, and goes torch's own way


def by_transforms(module):
    table = module.weight.detach()
    tangent = torch.ones_like(table)

    def call(own):
        return torch.func.functional_call(module, {"weight": own}, (IDS,))

    found = [
        torch.func.grad(lambda own: call(own).square().sum())(table),
        torch.func.vmap(module)(torch.stack([IDS, IDS + 1])).detach(),
        torch.autograd.functional.jacobian(call, table),
    ]
    if isinstance(module, nn.Embedding):  # torch has no derivatives of bags in forward mode
        with torch.autograd.forward_ad.dual_level():
            dual = call(torch.autograd.forward_ad.make_dual(table, tangent))
            found.append(torch.autograd.forward_ad.unpack_dual(dual).tangent)
        found.append(torch.func.jvp(call, (table,), (tangent,))[1])
    return found


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_transforms(name):
    ours, theirs = both(name)
    for got, want in zip(by_transforms(ours), by_transforms(theirs), strict=True):
        assert_same(got, want)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_graphs_that_are_recorded(name):
    module, _ = both(name)
    others = IDS.flip(0) + 1
    want = module(others)
    recorded = [
        torch.jit.trace(module, (IDS,)),
        torch.fx.symbolic_trace(nn.Sequential(module)),
        torch.fx.experimental.proxy_tensor.make_fx(module)(IDS),
        torch.export.export(module, (IDS,), strict=False).module(),
    ]
    for own in recorded:
        assert_same(own(others).detach(), want.detach())


def test_other_tensors():
    ragged = [ints([1, 2]), ints([3])]
    for ours, theirs in (both("Embedding"), both("EmbeddingBag")):
        nested = torch.nested.nested_tensor(ragged, layout=torch.jagged)
        try:
            want = theirs(nested)
        except RuntimeError:  # of older torch
            with pytest.raises(RuntimeError):
                ours(nested)
        else:
            got = ours(nested)
            if want.is_nested:
                got, want = got.values(), want.values()
            assert_same(got.detach(), want.detach())
        assert ours(IDS.to("meta")).shape == theirs(IDS).shape
        for module in (ours, theirs):
            module.weight.data = module.weight.data.t().contiguous().t()
        assert_same_passes(ours, theirs, IDS)
