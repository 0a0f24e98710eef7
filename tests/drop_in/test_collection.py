"""Many tables as one module, and tables that the backward pass itself updates."""

import copy

import pytest
import torch
from torch.nn.utils import prune

import fastopt.torch as ft

FEATURES = {"a": ["x", "y"]}


def collection(fused=False, dtype=torch.float32, module=ft.EmbeddingBag, dims=(8, 8, 4)):
    torch.manual_seed(0)
    own = {"fused": fused} if fused else {}
    tables = {
        "a": module(50, dims[0], mode="sum", dtype=dtype, **own),
        "b": module(30, dims[1], mode="mean", padding_idx=3, dtype=dtype, **own),
        "c": module(20, dims[2], mode="max", dtype=dtype, **own),
    }
    return ft.EmbeddingBagCollection(tables, FEATURES)


@pytest.fixture
def inputs():
    """Six bags of each feature: regular, with empty ones and weights, with padding, with int32."""
    torch.manual_seed(1)
    weights = torch.randn(13, requires_grad=True)
    return {
        "x": torch.randint(50, (6, 2)),
        "y": (torch.randint(50, (13,)), torch.tensor([0, 2, 2, 5, 9, 9]), weights),
        "b": torch.randint(30, (6, 4)),
        "c": (torch.randint(20, (9,)).int(), torch.arange(6).int()),
    }


def one_by_one(many, inputs):
    """The same lookups, table by table."""
    found = []
    for name, module in zip(many.features, many.modules_of_features(), strict=True):
        given = inputs[name] if isinstance(inputs[name], tuple) else (inputs[name],)
        found.append(module(*given))
    return torch.cat(found, 1)


@pytest.mark.parametrize("module", [ft.EmbeddingBag, torch.nn.EmbeddingBag], ids=["ours", "torch's"])
def test_results_and_steps_are_those_of_the_tables_one_by_one(inputs, module):
    many, each = collection(), collection(module=module)
    results, of_weights = [], []
    for own, look_up in ((many, many), (each, lambda given: one_by_one(each, given))):
        opt = ft.SparseAdam(own.parameters(), lr=0.1)
        weights = inputs["y"][2]
        for _ in range(3):
            opt.zero_grad()
            weights.grad = None
            pooled = look_up(inputs)
            (pooled * torch.arange(pooled.numel()).reshape(pooled.shape)).sum().backward()
            if own is each and module is torch.nn.EmbeddingBag:
                for p in own.parameters():
                    p.grad = p.grad.to_sparse(1)
            opt.step()
        results.append([pooled, *own.parameters()])
        of_weights.append(weights.grad.clone())
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0 if module is ft.EmbeddingBag else 1e-5, atol=1e-5)
    torch.testing.assert_close(*of_weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(inputs, dtype):
    many = collection(dtype=dtype)
    given = {**inputs, "y": inputs["y"][:2]}
    assert torch.equal(many(given), one_by_one(many, given))


def test_each_feature_has_its_columns(inputs):
    many = collection(dims=(3, 6, 5))
    pooled = many(inputs)
    parts = many.split(pooled)
    assert many.features == ["x", "y", "b", "c"] == [*parts]
    assert [part.shape for part in parts.values()] == [(6, 3), (6, 3), (6, 6), (6, 5)]
    assert torch.equal(parts["b"], many.tables["b"](inputs["b"]))


def test_gradients_add_up_over_features_and_passes(inputs):
    many = collection()
    for _ in range(2):
        many(inputs).sum().backward()
    grad = many.tables["a"].weight.grad
    assert isinstance(grad, ft.RowGradients) and len(grad.lookups) == 4
    each = collection()
    one_by_one(each, inputs).sum().backward()
    torch.testing.assert_close(grad.dense(), 2 * each.tables["a"].weight.grad.dense())


def test_copies_keep_names(inputs):
    many = collection()
    other = copy.deepcopy(many)
    assert [*other.state_dict()] == [f"tables.{name}.weight" for name in "abc"]
    assert torch.equal(other(inputs), many(inputs))


def test_what_does_not_fit_is_refused(inputs):
    many = collection()
    with pytest.raises(ValueError, match="features"):
        many({"x": inputs["x"]})
    with pytest.raises(ValueError, match="numbers of bags"):
        many({**inputs, "b": inputs["b"][:5]})
    with pytest.raises(TypeError, match="inputs\\['b'\\] is list"):
        many({**inputs, "b": [1, 2]})
    with pytest.raises(TypeError, match="expected an EmbeddingBag"):
        ft.EmbeddingBagCollection({"a": torch.nn.Embedding(3, 2)})
    with pytest.raises(ValueError, match="expected one of"):
        ft.EmbeddingBagCollection({"a": ft.EmbeddingBag(3, 2)}, {"b": ["x"]})
    with pytest.raises(ValueError, match="twice"):
        ft.EmbeddingBagCollection({"a": ft.EmbeddingBag(3, 2)}, {"a": ["x", "x"]})
    with pytest.raises(TypeError, match=r"expected a list of names, \['xy'\]"):
        ft.EmbeddingBagCollection({"a": ft.EmbeddingBag(3, 2)}, {"a": "xy"})
    with pytest.raises(ValueError, match="at least one name"):
        ft.EmbeddingBagCollection({"a": ft.EmbeddingBag(3, 2)}, {"a": []})
    with pytest.raises(ValueError, match="tables is empty"):
        ft.EmbeddingBagCollection({})
    with pytest.raises(RuntimeError, match="50") as caught:
        many({**inputs, "y": (torch.tensor([50]), torch.tensor([0, 0, 0, 0, 0, 0]))})
    assert caught.value.__notes__ == ["in inputs['y'] of an EmbeddingBagCollection"]
    many.tables["b"].double()
    with pytest.raises(ValueError, match="float64"):
        many(inputs)


class Doubled(ft.EmbeddingBag):
    def forward(self, *given):
        return 2 * super().forward(*given)


def replaced(module):
    forward = module.forward
    module.forward = lambda *given: 2 * forward(*given)


CHANGES = {
    "hook": lambda module: module.register_forward_hook(lambda _, given, result: 2 * result),
    "backward hook": lambda module: module.register_full_backward_pre_hook(lambda _, given: (2 * given[0],)),
    "class": lambda module: setattr(module, "__class__", Doubled),
    "method": replaced,
    "pruning": lambda module: prune.random_unstructured(module, "weight", amount=0.5),
    "spectral norm": torch.nn.utils.spectral_norm,
}


@pytest.mark.parametrize("change", CHANGES)
def test_tables_that_do_more_than_look_up_are_called(inputs, change):
    trained = []
    for look_up in (lambda many: many(inputs), lambda many: one_by_one(many, inputs)):
        many = collection()
        torch.manual_seed(2)
        CHANGES[change](many.tables["a"])
        opt = ft.SGD(many.parameters(), lr=0.1)
        for _ in range(2):
            look_up(many).square().sum().backward()
            opt.step()
            opt.zero_grad()
        trained.append([look_up(many).detach(), *many.parameters()])
    for got, want in zip(*trained, strict=True):
        assert torch.equal(got, want)


# Updates in the backward pass


def test_a_backward_pass_updates_what_a_step_would(inputs):
    tables = []
    for fused in (False, True):
        many = collection(fused)
        bias = torch.nn.Parameter(torch.zeros(28))
        opt = ft.Adam([*many.parameters(), bias], lr=0.1)
        for _ in range(3):
            (many(inputs) + bias).square().sum().backward()
            if fused:
                assert all(p.grad is None for p in many.parameters())
            opt.step()
            opt.zero_grad()
        tables.append([*many.parameters(), bias])
        assert opt.state[many.tables["a"].weight]["step"] == 3
    for got, want in zip(*tables, strict=True):
        assert torch.equal(got, want)


def test_a_single_table_is_updated_too():
    embedding = ft.Embedding(10, 4, fused=True)
    before = embedding.weight.detach().clone()
    opt = ft.SGD([embedding.weight], lr=1.0)
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    assert embedding.weight.grad is None
    before[1] -= 2
    before[3] -= 1
    assert torch.equal(embedding.weight, before)
    opt.step()
    assert torch.equal(embedding.weight, before)


def test_a_table_without_an_optimizer_is_refused():
    embedding = ft.Embedding(10, 4, fused=True)
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="no optimizer has it"):
        embedding(torch.tensor([1])).sum().backward()
    assert torch.equal(embedding.weight, before)


def test_hooks_on_the_gradient_of_a_fused_table_are_refused():
    embedding = ft.Embedding(10, 4, fused=True)
    before = embedding.weight.detach().clone()
    opt = ft.SGD([embedding.weight], lr=1.0)
    hook = embedding.weight.register_hook(lambda grad: 2 * grad)
    with pytest.raises(RuntimeError, match="register_hook"):
        embedding(torch.tensor([1])).sum().backward()
    assert torch.equal(embedding.weight, before)
    hook.remove()
    embedding(torch.tensor([1])).sum().backward()
    assert not torch.equal(embedding.weight, before)
    assert opt.param_groups


def test_a_group_that_torch_updates_is_refused():
    embedding = ft.Embedding(10, 4, fused=True)
    opt = ft.Adam([embedding.weight], differentiable=True)
    with pytest.raises(TypeError, match="differentiable"):
        embedding(torch.tensor([1])).sum().backward()
    assert not opt.state
