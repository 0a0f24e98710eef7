"""The structures that parameters and gradients come in beside lists and dicts: iterables, and flat ones for
parameters in groups."""

import itertools
import math
from collections import deque
from types import MappingProxyType

import numpy as np
import pytest

import fastopt


def params_of(groups):
    """Parameters of sizes 1, 2, 3, ..., as ``groups`` says: a number for a list of so many, None for an
    array, letters for a dict."""
    sizes, params = iter(range(1, 9)), []
    for kind in groups:
        if kind is None:
            own = np.zeros(next(sizes))
        elif isinstance(kind, str):
            own = {name: np.zeros(next(sizes)) for name in kind}
        else:
            own = [np.zeros(next(sizes)) for _ in range(kind)]
        params.append({"params": own})
    return params


def flat(params):
    found = []
    for group in params:
        own = group["params"]
        found += own.values() if isinstance(own, dict) else own if isinstance(own, list) else [own]
    return found


ITERABLES = {
    "a generator": lambda grads: (g for g in grads),
    "an iterator": iter,
    "a chain": itertools.chain,
    "a deque": deque,
    "values": lambda grads: dict(enumerate(grads)).values(),
    "a tuple": tuple,
    "a list": list,
}


@pytest.mark.parametrize("of", ITERABLES.values(), ids=ITERABLES)
@pytest.mark.parametrize(
    "groups", [[2], [2, 1], [1, 1], [None, None, None], [3, 0], [None, 2], [0, 2]], ids=str
)
def test_gradients_of_groups_come_flat(groups, of):
    params = params_of(groups)
    everyone = flat(params)
    opt = fastopt.SGD(params, lr=1.0)
    for step in (1, 2):
        opt.step(of([np.full(p.shape, k + 1.0) for k, p in enumerate(everyone)]))
        for k, p in enumerate(everyone):
            np.testing.assert_array_equal(p, -step * (k + 1.0))


@pytest.mark.parametrize("of", ITERABLES.values(), ids=ITERABLES)
@pytest.mark.parametrize("outer", ITERABLES.values(), ids=ITERABLES)
def test_gradients_of_groups_come_in_iterables_of_iterables(outer, of):
    params = params_of([2, 1])
    everyone = flat(params)
    opt = fastopt.SGD(params, lr=1.0)
    one, two, three = (np.full(p.shape, k + 1.0) for k, p in enumerate(everyone))
    opt.step(outer([of([one, two]), of([three])]))
    opt.step(outer([{"params": of([one, two])}, {"params": of([three])}]))
    for k, p in enumerate(everyone):
        np.testing.assert_array_equal(p, -2 * (k + 1.0))


@pytest.mark.parametrize("of", ITERABLES.values(), ids=ITERABLES)
def test_gradients_of_a_list_come_in_an_iterable(of):
    p, q = np.zeros(2), np.zeros((4, 2))
    opt = fastopt.SGD([p, q], lr=1.0)
    opt.step(of([np.ones(2), np.ones((4, 2))]), clip_norm=1e9, skip_nonfinite=True)
    assert opt.step(of([np.ones(2), np.full((4, 2), math.nan)]), skip_nonfinite=True).nonfinite == 1
    opt.step(of([np.ones(2), np.ones((4, 2))]))
    np.testing.assert_array_equal(p, -2)
    np.testing.assert_array_equal(q, -2)


@pytest.mark.parametrize("shape", [dict, MappingProxyType])
def test_gradients_of_groups_with_names_come_in_one_dict(shape):
    params = params_of(["ab", "c"])
    everyone = flat(params)
    opt = fastopt.SGD(params, lr=1.0)
    grads = {name: np.full(k + 1, k + 1.0) for k, name in enumerate("abc")}
    opt.step(shape({name: grads[name] for name in "cab"}))
    opt.step([{"a": grads["a"], "b": None}, {"c": grads["c"]}])
    for p, factor in zip(everyone, (2, 1, 2), strict=True):
        np.testing.assert_array_equal(p, -factor * p.size)
    with pytest.raises(ValueError, match=r"grads\['b'\] has shape \(1,\) but params\[0\]\['params'\]\['b'\]"):
        opt.step({**grads, "b": np.ones(1)})
    with pytest.raises(ValueError, match="or a dict with the keys of all parameters, 'a', 'b', 'c'"):
        opt.step({"a": grads["a"], "c": grads["c"]})


def test_a_list_as_long_as_there_are_groups_goes_by_what_it_holds():
    """One group has two parameters and one has none, so that both readings have two entries."""
    params = params_of([2, 0])
    p, q = flat(params)
    opt = fastopt.SGD(params, lr=1.0)
    opt.step([[np.ones(1), np.ones(2)], []])
    opt.step([np.ones(1), np.ones(2)])
    opt.step([None, np.ones(2)])
    np.testing.assert_array_equal(p, -2)
    np.testing.assert_array_equal(q, -3)
    assert opt.steps == 3


def test_messages_name_what_of_a_flat_list_does_not_fit():
    params = params_of([2, 1])
    opt = fastopt.SGD(params)
    good = [np.ones(1), np.ones(2), np.ones(3)]
    for grads, message in (
        ([*good[:2], np.ones(4)], r"grads\[2\] has shape \(4,\) but params\[1\]\['params'\]\[0\] has \(3,\)"),
        (iter([*good[:2], np.ones(4)]), r"grads\[2\] has shape \(4,\)"),
        (
            good * 2,
            "grads is a list of 6: expected a list of 2, one entry a group, or of 3, one entry a param",
        ),
        (iter(good[:1]), "grads is a list of 1: expected a list of 2, one entry a group, or of 3"),
        (good[:2], r"grads\[0\] is of type ndarray: expected a list of 2"),
        ([np.ones(1), good[1:], None], "grads.1. is a list: expected a NumPy array"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            opt.step(grads)
    assert opt.steps == 0 and all((p == 0).all() for p in flat(params))
    mixed = fastopt.SGD(params_of(["a", 1]))
    with pytest.raises(ValueError, match=r"grads\[0\] is of type ndarray: expected a dict"):
        mixed.step([np.ones(1), np.ones(2)])


@pytest.mark.parametrize("nested", [False, True])
def test_an_iterator_that_raises_changes_nothing(nested):
    def broken():
        yield np.ones(1)
        raise KeyError("no second gradient")

    params = params_of([2])
    p, q = flat(params)
    opt = fastopt.Adam(params, lr=1.0)
    opt.step([np.ones(1), np.ones(2)])
    before, state = [p.copy(), q.copy()], opt.state_dict()
    with pytest.raises(KeyError, match="no second gradient"):
        opt.step([broken()] if nested else broken(), zero_grads=True)
    assert opt.steps == 1
    for array, old in zip((p, q), before, strict=True):
        np.testing.assert_array_equal(array, old)
    for key, own in opt.state_dict()["state"].items():
        for name, value in own.items():
            np.testing.assert_array_equal(value, state["state"][key][name])
    opt.step(iter([np.ones(1), np.ones(2)]))
    assert opt.steps == 2


def test_norms_and_clipping_take_iterables():
    grads = [np.full(2, 3.0), np.full(2, 4.0)]
    assert fastopt.grad_norm(g for g in grads) == math.sqrt(50)
    assert fastopt.grad_norm(MappingProxyType({"a": iter(grads)})) == math.sqrt(50)
    fastopt.clip_grad_value(map(np.asarray, grads), 3.5)
    np.testing.assert_array_equal(grads[1], 3.5)
    fastopt.clip_grad_norm({"a": (g for g in grads), "b": None}, 1.0)
    assert fastopt.grad_norm(grads) == pytest.approx(1.0, rel=1e-6)


def test_what_has_no_order_is_refused():
    torch = pytest.importorskip("torch")
    tensors = {torch.ones(2), torch.ones(2)}
    with pytest.raises(TypeError, match="params is a set, which has no order: pass a list"):
        fastopt.SGD(tensors)
    with pytest.raises(TypeError, match=r"params\[0\]\['params'\] is a frozenset, which has no order"):
        fastopt.SGD([{"params": frozenset(tensors)}])
    opt = fastopt.SGD([np.ones(2), np.ones(2)])
    with pytest.raises(TypeError, match="grads is a set, which has no order: pass a list"):
        opt.step(tensors)


def test_gradients_of_a_model_of_torch_by_a_generator():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    twin = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    twin.load_state_dict(model.state_dict())
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.25}]
    opt = fastopt.SGD(groups, lr=0.5)
    peer = torch.optim.SGD(
        [{"params": twin[0].parameters()}, {"params": twin[2].parameters(), "lr": 0.25}], lr=0.5
    )
    for _ in range(3):
        for one in (model, twin):
            one.zero_grad()
            (one(torch.ones(5, 3)) ** 2).sum().backward()
        opt.step(p.grad for p in model.parameters())
        peer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
