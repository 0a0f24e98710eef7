"""Parameters and gradients in trees: nested dicts, lists, tuples and named tuples, as JAX's pytrees."""

import copy
import math
import pickle
from collections import OrderedDict
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest

import fastopt


class Dense(NamedTuple):
    weight: Any
    bias: Any = None


def model():
    """Six arrays of different sizes, in every kind of container."""
    return {
        "encoder": {
            "layers": [{"weight": np.zeros((2, 3)), "bias": np.zeros(2)}, (np.zeros(4), np.zeros(5))]
        },
        "nothing": (),
        "head": Dense(np.zeros((1, 6)), Dense(np.zeros(7))),
    }


NAMES = [
    "encoder.layers.0.weight",
    "encoder.layers.0.bias",
    "encoder.layers.1.0",
    "encoder.layers.1.1",
    "head.weight",
    "head.bias.weight",
]


def mapped(function, tree):
    """The tree of what ``function`` makes of each array."""
    if isinstance(tree, dict):
        return {key: mapped(function, value) for key, value in tree.items()}
    if isinstance(tree, Dense):
        return Dense(*(mapped(function, value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(mapped(function, value) for value in tree)
    return None if tree is None else function(tree)


def arrays_of(tree):
    found = []
    mapped(found.append, tree)
    return found


def test_a_tree_is_updated_as_the_list_of_its_arrays():
    rng = np.random.default_rng(0)
    params = model()
    flat = mapped(np.copy, params)
    opt, peer = fastopt.AdamW(params, lr=0.1), fastopt.AdamW(arrays_of(flat), lr=0.1)
    for step in range(3):
        grads = mapped(lambda p: rng.standard_normal(p.shape), params)
        if step == 1:
            grads["encoder"]["layers"][0]["bias"] = None
        own = [
            *grads["encoder"]["layers"][0].values(), *grads["encoder"]["layers"][1], *arrays_of(grads["head"])
        ]  # fmt: skip
        assert opt.step(grads, clip_norm=1.0) == peer.step(own, clip_norm=1.0)
        assert fastopt.grad_norm(grads) == fastopt.grad_norm(own)
    for p, q in zip(arrays_of(params), arrays_of(flat), strict=True):
        np.testing.assert_array_equal(p, q)
    assert opt.step_counts.tolist() == [3, 2, 3, 3, 3, 3]
    grads["head"] = None  # all below it stays
    grads["encoder"]["layers"] = iter(grads["encoder"]["layers"])
    opt.step(grads, zero_grads=True)
    assert opt.step_counts.tolist() == [4, 3, 4, 4, 3, 3]


def test_names_are_paths(tmp_path):
    params = model()
    opt = fastopt.Adam(params, lr=0.1)
    assert list(opt.slots) == list(opt.state) == opt.state_dict()["param_groups"][0]["params"] == NAMES
    grads = mapped(np.ones_like, params)
    opt.step(grads)
    grads["head"].bias.weight[3] = math.nan
    assert opt.step(grads, skip_nonfinite=True).nonfinite == "head.bias.weight"
    opt.save(tmp_path / "opt", params=True)
    others = model()
    other = fastopt.Adam(dict(zip(NAMES, arrays_of(others), strict=True)), lr=0.1)
    other.load(tmp_path / "opt")  # which has the names that a flat dict may have
    for p, q in zip(arrays_of(params), arrays_of(others), strict=True):
        np.testing.assert_array_equal(p, q)
    with pytest.raises(ValueError, match=r"it lacks 0; it has 'encoder.layers.0.weight'"):
        fastopt.Adam(arrays_of(model())).load(tmp_path / "opt")


def test_copies_keep_the_tree():
    opt = fastopt.SGD(model(), lr=1.0)
    for copied in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        [group] = copied.param_groups
        copied.step(mapped(np.ones_like, group["params"]))
        assert all((p == -1).all() for p in arrays_of(group["params"]))


@pytest.mark.parametrize("nest", [lambda own: own, lambda own: {"layer": own}], ids=["flat", "nested"])
@pytest.mark.parametrize("grouped", [False, True])
def test_none_in_a_dict_is_no_parameter(nest, grouped):
    weight, other = np.zeros(2), np.zeros(3)
    params, grads = nest({"w": weight, "b": None}), nest({"w": np.ones(2), "b": None})
    opt = fastopt.SGD([{"params": params}, {"params": {"c": other}}] if grouped else params, lr=1.0)
    opt.step([grads, {"c": np.ones(3)}] if grouped else grads)
    opt.step({**grads, "c": np.ones(3)} if grouped else grads)
    assert (weight == -2).all() and (other == -2 * grouped).all()
    assert len(opt.state) == 1 + grouped and fastopt.grad_norm(grads) == np.sqrt(2)
    inner = nest({"w": np.ones(2), "b": np.ones(2)})
    with pytest.raises(ValueError, match=r"\['b'\] is of type ndarray: expected None, as there is no param"):
        opt.step([inner, None] if grouped else inner)
    assert (weight == -2).all()


@pytest.mark.parametrize("of", [OrderedDict, MappingProxyType])
def test_any_mapping_is_a_dict(of):
    p, q = np.zeros(2), np.zeros(3)
    opt = fastopt.SGD(of({"a": of({"b": p, "c": [q]})}), lr=1.0)
    opt.step(of({"a": of({"c": (np.full(3, 2.0),), "b": np.ones(2)})}))
    assert list(opt.state) == ["a.b", "a.c.0"] and (p == -1).all() and (q == -2).all()


def test_leaves_take_sparse_gradients_and_lists_of_them():
    rows = fastopt.IndexedSlices(np.array([1]), np.ones((1, 2)))
    tables = [np.zeros((3, 2)), np.zeros((3, 2))]
    opt = fastopt.SGD({"tables": tables}, lr=1.0)
    opt.step({"tables": [rows, [rows, rows]]})
    np.testing.assert_array_equal(tables, [[[0, 0], [-1, -1], [0, 0]], [[0, 0], [-2, -2], [0, 0]]])


def changed(place, value):
    """Gradients with another ``value`` at a place, a path of keys; None takes the entry away."""
    grads = mapped(np.ones_like, model())
    inner = grads
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    if value is None:
        del inner[place[-1]]
    return grads


LAYERS = r"grads\['encoder'\]\['layers'\]"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("encoder", "layers", 0, "bias"), None, rf"{LAYERS}\[0\]\['bias'\] is missing: expected the keys"),
        (("encoder", "layers", 0, "x"), np.ones(2), rf"{LAYERS}\[0\]\['x'\] belongs to no parameter"),
        (("encoder", "layers", 1), None, rf"{LAYERS} is a list of 1: expected a list of 2"),
        (("encoder", "layers"), {"0": 1}, rf"{LAYERS} is a dict with the keys '0': expected a list of 2"),
        (("encoder", "layers", 0), (1, 2), rf"{LAYERS}\[0\] is a tuple of 2: expected a dict with the keys"),
        (("encoder", "layers", 1), np.ones(2), rf"{LAYERS}\[1\] is of type ndarray: expected a list of 2"),
        (("nothing",), np.ones(2), r"grads\['nothing'\] is of type ndarray: expected a list of 0"),
        (("head",), Dense(np.ones((1, 6)), np.ones(7)), r"grads\['head'\].bias is of type ndarray: expected"),
        (("head",), [np.ones((1, 6))], r"grads\['head'\] is a list of 1: .* the fields .*, weight, bias"),
        (
            ("head",),
            Dense(np.ones((1, 6)), Dense(np.ones(7), np.ones(1))),
            r"grads\['head'\].bias.bias is of type ndarray: expected None, as there is no parameter",
        ),
        (
            ("encoder", "layers", 1),
            (np.ones(4), np.ones(4)),
            rf"{LAYERS}\[1\]\[1\] has shape \(4,\) but params",
        ),
    ],
)
def test_another_structure_is_refused_by_its_path(place, value, message):
    params = model()
    opt = fastopt.SGD(params)
    with pytest.raises(ValueError, match="^" + message):
        opt.step(changed(place, value))
    with pytest.raises(ValueError, match=r"^grads is of type NoneType: expected a dict with the keys"):
        opt.step(None)
    assert opt.steps == 0 and not any(p.any() for p in arrays_of(params))


def test_parameters_that_make_no_tree_are_refused():
    p, q = np.zeros(2), np.zeros(2)
    for params, error, message in (
        ({"a": {"b": p}, "a.b": q}, ValueError, r"params\['a'\]\['b'\] and params\['a.b'\] would both be"),
        ({"a": {0: p}}, TypeError, r"params\['a'\] has the key 0: expected names"),
        ({"a": [p, 1.0]}, TypeError, r"params\['a'\]\[1\] is a float: expected a NumPy array"),
        (Dense(p, Dense(q, "x")), TypeError, "params.bias.bias is a str: expected a NumPy array"),
        ([(p, q), (q,)], ValueError, r"params\[1\]\[0\] shares memory with params\[0\]\[1\]"),
        ([[], {"a": None}], ValueError, "params holds no arrays"),
        ({"a": None}, ValueError, "params holds no arrays"),
        ([{"params": [(p,)]}, {"params": [(q,)]}], ValueError, r"params\[1\]\['params'\] has the name '0.0'"),
    ):
        with pytest.raises(error, match="^" + message):
            fastopt.SGD(params)


def test_a_tree_that_was_changed_is_refused():
    params = model()
    opt = fastopt.SGD(params)
    grads = mapped(np.ones_like, params)
    opt.step(grads)
    params["encoder"]["layers"][0]["bias"] = np.zeros(2)
    with pytest.raises(ValueError, match="the params of params were changed"):
        opt.step(grads)
    assert opt.steps == 1


def test_groups_share_a_tree():
    """Gradients come by groups, or as one tree, even where groups have a dict in common."""
    weight, bias, head = np.zeros(1), np.zeros(2), np.zeros(3)
    groups = [
        {"params": {"body": [weight]}, "lr": 1.0},
        {"params": {"head": {"weight": head}}, "lr": 1.0},
        {"params": {"head": {"bias": bias}}, "lr": 0.5},
    ]
    opt = fastopt.SGD(groups)
    grads = {"body": [np.ones(1)], "head": {"bias": np.ones(2), "weight": np.ones(3)}}
    opt.step(grads)
    opt.step([{"body": grads["body"]}, {"head": None}, {"head": {"bias": np.ones(2)}}])
    assert (weight.tolist(), bias.tolist(), head.tolist()) == ([-2], [-1, -1], [-1, -1, -1])
    for wrong, message in (
        (
            {**grads, "head": {"bias": np.ones(3), "weight": None}},
            r"grads\['head'\]\['bias'\] has shape \(3,\)",
        ),
        ({**grads, "head": {"bias": None}}, r"grads\['head'\]\['weight'\] is missing"),
        ([grads], "grads is a list of 1: expected a list of 3, one entry a group, or a tree of all"),
        ([{"body": []}, None, None], r"grads\[0\]\['body'\] is a list of 0: expected a list of 1"),
    ):
        with pytest.raises(ValueError, match="^" + message):
            opt.step(wrong)
    lists = fastopt.SGD([{"params": {"a": [np.zeros(1)]}}, {"params": {"a": np.zeros(1), "b": np.zeros(1)}}])
    with pytest.raises(ValueError, match=r"grads is a dict .*: expected a list of 2, one entry a group$"):
        lists.step({"a": [np.ones(1)], "b": np.ones(1)})


def test_norms_and_clipping_name_the_path():
    with pytest.raises(TypeError, match=r"^grads\['a'\].weight\[1\] is a float"):
        fastopt.grad_norm({"a": Dense((np.ones(1), 1.0))})
    grads = {"a": Dense(np.full(4, 2.0)), "b": [None]}
    assert fastopt.clip_grad_norm(grads, 1.0) == 4.0
    np.testing.assert_allclose(grads["a"].weight, 0.5, rtol=1e-6)
