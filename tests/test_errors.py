"""What does not fit is refused with a message that says so, and nothing is changed by it."""

import contextlib
import json
import math

import ml_dtypes
import numpy as np
import pytest

import fastopt
from fastopt.checkpoint import tensors
from fastopt.kernels.cpu.jit import Kernel


def snapshot(opt, arrays):
    state = opt.state_dict()
    slots = [(key, slot, np.asarray(value).tobytes())
             for key, entry in state["state"].items() for slot, value in entry.items()]  # fmt: skip
    return [array.tobytes() for array in arrays], slots, opt.steps


@contextlib.contextmanager
def refused(opt, arrays, error, message):
    """Expect ``error`` with a message that matches, and parameters, state and steps as before."""
    before = snapshot(opt, arrays)
    with pytest.raises(error, match=message or None):
        yield
    assert snapshot(opt, arrays) == before


def read_only(array):
    array.flags.writeable = False
    return array


def misaligned(count):
    return np.zeros(count * 8 + 1, np.uint8)[1:].view(np.float64)


class OnTheGPU:
    shape, dtype = (3,), np.dtype(np.float32)
    __cuda_array_interface__ = {"shape": (3,), "typestr": "<f4", "data": (1, False), "version": 3}  # noqa: RUF012


# Parameters

PARAMETERS = [
    (np.ones(3, int), TypeError, "has dtype int64: expected float32, float64, float16 or bfloat16"),
    (np.ones(3, bool), TypeError, "has dtype bool"),
    (np.ones(3, complex), TypeError, "has dtype complex128"),
    (np.ones(3, object), TypeError, "has dtype object"),
    (np.ones(3, np.longdouble), TypeError, "has dtype (float128|longdouble)"),
    (np.ones(3, ">f4"), TypeError, "has dtype >f4"),
    (np.ones(3, ">f8"), TypeError, "has dtype >f8"),
    (np.ones(6)[::2], ValueError, r"has strides \(16,\) for shape \(3,\): expected a C-contiguous"),
    (np.ones((2, 3)).T, ValueError, "has strides"),
    (np.asfortranarray(np.ones((2, 3))), ValueError, "has strides"),
    (np.broadcast_to(1.0, (3,)), ValueError, "has strides"),
    (misaligned(3), ValueError, "is not aligned to its 8-byte elements"),
    (read_only(np.ones(3)), ValueError, "is read-only: expected an array to update in place"),
    (np.ma.ones(3), TypeError, "is a masked array, whose mask would be lost"),
    (np.float64(1.0), TypeError, "is a float64: expected a NumPy array, a torch tensor or a CUDA array"),
    (1.0, TypeError, "is a float: expected a NumPy array"),
    ("ab", TypeError, "is a str"),
    (OnTheGPU(), RuntimeError, "lies on a CUDA device: "),
]


@pytest.mark.parametrize(("bad", "error", "message"), PARAMETERS, ids=[m for _, _, m in PARAMETERS])
def test_parameters_that_do_not_fit_are_refused_by_name(bad, error, message):
    good = np.ones(2)
    for params, label in (
        (bad, "params"),
        ([good, bad], r"params\[1\]"),
        ({"w": bad}, r"params\['w'\]"),
        ([{"params": [good]}, {"params": {"w": bad}}], r"params\[1\]\['params'\]\['w'\]"),
    ):
        with pytest.raises(error, match=f"^{label} {message}"):
            fastopt.SGD(params)


def test_none_is_no_array_and_none_in_a_list_of_arrays_is_a_mistake():
    for params, label in ((None, "params"), ([np.ones(2), None], r"params\[1\]")):
        with pytest.raises(TypeError, match=f"^{label} is a NoneType: expected a NumPy array"):
            fastopt.SGD(params)


def test_lists_of_numbers_and_of_others_beside_groups_are_refused():
    with pytest.raises(TypeError, match=r"params\[0\] is a float"):
        fastopt.SGD([1.0, 2.0])
    with pytest.raises(TypeError, match=r"params\[0\] is a dict"):
        fastopt.SGD([{"params": np.ones(2)}, np.ones(2)])


@pytest.mark.parametrize("params", [[], {}, (), iter(()), [{"params": []}, {"params": {}}]])
def test_no_parameters_are_refused(params):
    with pytest.raises(ValueError, match="params holds no arrays: expected at least one to update"):
        fastopt.SGD(params)


def test_parameters_that_share_memory_are_refused():
    base = np.ones((4, 3))
    for params in (
        [base, base],
        [base, base[1:2]],
        [base[:3], base[2:]],
        {"a": base, "b": base.reshape(-1)[5:6]},
        [{"params": base[:2]}, {"params": [np.ones(1), base[1:]]}],
    ):
        with pytest.raises(ValueError, match=r"shares memory with .*: expected arrays that do not overlap"):
            fastopt.SGD(params)
    fastopt.SGD([base[:2], base[2:], base[:0], base[1:1]])


def test_names_that_are_no_strings_or_come_twice_are_refused():
    with pytest.raises(TypeError, match="params has the key 0: expected names, of type str"):
        fastopt.SGD({0: np.ones(2)})
    with pytest.raises(ValueError, match=r"params\[1\]\['params'\] has the name 'w' of an earlier group"):
        fastopt.SGD([{"params": {"w": np.ones(2)}}, {"params": {"w": np.ones(2)}}])


def test_torch_parameters_that_do_not_fit_are_refused():
    torch = pytest.importorskip("torch")
    for tensor, error, message in (
        (torch.ones(3, dtype=torch.float8_e5m2), TypeError, r"dtype float8_e5m2: .*params.data.float\(\)"),
        (torch.ones(3, dtype=torch.int64), TypeError, "params has dtype int64"),
        (torch.ones(2, 3).T, ValueError, "params has strides"),
        (torch.ones(1).expand(3), ValueError, "params has strides"),
        (torch.ones(2, 2).to_sparse(), TypeError, "params is a sparse tensor: have the model itself use"),
        (torch.ones(3, device="meta"), TypeError, "params is on meta: expected a tensor on the CPU"),
        (torch.ones(3, dtype=torch.float8_e5m2), TypeError, "params"),
        (torch.ones(3, dtype=torch.cfloat).conj(), TypeError, "params can't be seen as a NumPy array"),
    ):
        with pytest.raises(error, match=message):
            fastopt.SGD(tensor)
    tensor = torch.ones(4)
    with pytest.raises(ValueError, match="shares memory"):
        fastopt.SGD([tensor, tensor[1:2]])
    with pytest.raises(ValueError, match="shares memory"):
        fastopt.SGD([tensor, tensor.numpy()])


# Hyperparameters

NAN, INF = math.nan, math.inf
NUMBERS = [
    (fastopt.SGD, "lr", [-1.0, NAN, INF, "1", None, True, 1j]),
    (fastopt.SGD, "momentum", [-0.1, NAN, INF, "x", False]),
    (fastopt.SGD, "dampening", [NAN, INF, "x"]),
    (fastopt.SGD, "weight_decay", [-1e-9, NAN, INF, None]),
    (fastopt.SGD, "nesterov", [1, "yes", None]),
    (fastopt.SGD, "maximize", [1, 0.0]),
    (fastopt.AdaGrad, "lr_decay", [-0.1, NAN]),
    (fastopt.AdaGrad, "initial_accumulator_value", [-1.0, INF]),
    (fastopt.AdaGrad, "eps", [-1e-9, NAN, [1e-8]]),
    (fastopt.RowwiseAdaGrad, "eps", [-1e-9]),
    (fastopt.RMSProp, "alpha", [-0.1, 1.1, NAN]),
    (fastopt.RMSProp, "eps", [-1.0]),
    (fastopt.RMSProp, "momentum", [-1.0]),
    (fastopt.RMSProp, "centered", [1]),
    (fastopt.Adam, "betas", [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, NAN), (0.9,), 0.9, "ab", (0.9, "x")]),
    (fastopt.Adam, "eps", [-1.0]),
    (fastopt.Adam, "amsgrad", [1]),
    (fastopt.AdamW, "weight_decay", [-1.0]),
    (fastopt.AMSGrad, "betas", [(0.9, 1.5)]),
    (fastopt.RAdam, "betas", [(1, 0.9)]),
    (fastopt.RAdam, "decoupled_weight_decay", ["no"]),
    (fastopt.NAdam, "momentum_decay", [-0.1, NAN, INF, "x", True]),
    (fastopt.NAdam, "decoupled_weight_decay", [1]),
    (fastopt.Lion, "betas", [(0.9, 1.0)]),
]
NUMBERS = [(optimizer, name, value) for optimizer, name, values in NUMBERS for value in values]


@pytest.mark.parametrize(("optimizer", "name", "value"), NUMBERS)
def test_hyperparameters_out_of_range_are_refused_at_first_in_groups_and_later(optimizer, name, value):
    p = np.ones(2)
    message = rf"{name} of params.* is .*: expected "
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer(p, **{name: value})
    with pytest.raises((ValueError, TypeError), match=rf"{name} of params\[0\] is"):
        optimizer([{"params": p, name: value}])
    opt = optimizer(p)
    if value == opt.defaults[name]:
        return  # False for 0.0 says the same
    opt.param_groups[0][name] = value
    with refused(opt, [p], (ValueError, TypeError), message):
        opt.step(np.ones(2))


@pytest.mark.parametrize("optimizer", [fastopt.SGD, fastopt.RMSProp, fastopt.Adam])
def test_unknown_options_are_refused(optimizer):
    p = np.ones(2)
    with pytest.raises(TypeError, match="learning_rate"):
        optimizer(p, learning_rate=1.0)
    with pytest.raises(ValueError, match=r"params\[0\] has the option 'learning_rate': .* has lr, "):
        optimizer([{"params": p, "learning_rate": 1.0}])
    opt = optimizer(p)
    opt.param_groups[0]["learning_rate"] = 1.0
    with refused(opt, [p], ValueError, "learning_rate"):
        opt.step(np.ones(2))


def test_nesterov_needs_momentum_and_no_dampening():
    p = np.ones(2)
    for options in ({}, {"momentum": 0.9, "dampening": 0.1}):
        with pytest.raises(
            ValueError, match=r"nesterov is True .*: expected momentum above 0 and dampening 0"
        ):
            fastopt.SGD(p, nesterov=True, **options)
    opt = fastopt.SGD(p, momentum=0.9, nesterov=True)
    opt.param_groups[0]["dampening"] = 0.5
    with refused(opt, [p], ValueError, "expected momentum above 0 and dampening 0"):
        opt.step(np.ones(2))


@pytest.mark.parametrize(
    ("opt", "change", "slots"),
    [
        (lambda p: fastopt.SGD(p), {"momentum": 0.9}, "momentum_buffer, at first none"),
        (lambda p: fastopt.SGD(p, momentum=0.9), {"momentum": 0.0}, "none, at first momentum_buffer"),
        (lambda p: fastopt.RMSProp(p), {"centered": True}, "square_avg, grad_avg, at first square_avg"),
        (lambda p: fastopt.Adam(p), {"amsgrad": True}, "max_exp_avg_sq, at first exp_avg, exp_avg_sq"),
    ],
)
def test_options_that_need_other_state_are_refused_later(opt, change, slots):
    p = np.ones(2)
    opt = opt(p)
    opt.param_groups[0].update(change)
    with refused(opt, [p], ValueError, f"the options of params now need the state .*{slots}: make a new"):
        opt.step(np.ones(2))


def test_options_and_parameters_taken_away_are_refused():
    p = np.ones(2)
    opt = fastopt.Adam([p])
    del opt.param_groups[0]["eps"]
    with refused(opt, [p], ValueError, "params lacks the option 'eps': set it again"):
        opt.step([np.ones(2)])
    for change in (
        lambda group: group["params"].append(np.ones(2)),
        lambda group: group["params"].clear(),
        lambda group: group.update(params=[p]),
        lambda group: group.pop("params"),
    ):
        opt = fastopt.Adam([p])
        change(opt.param_groups[0])
        with refused(opt, [p], ValueError, "the params of params were changed: make a new optimizer"):
            opt.step([np.ones(2)])


def test_a_group_put_in_the_place_of_another_is_not_ignored():
    p = np.ones(2)
    opt = fastopt.SGD(p, lr=0.5)
    opt.param_groups[0] = {**opt.param_groups[0], "lr": 0.25}
    with contextlib.suppress(ValueError):
        opt.step(np.ones(2))
    assert p[0] in (1.0, 0.75)


def test_a_pair_of_betas_changed_in_its_place_is_checked():
    p = np.ones(2)
    opt = fastopt.Adam(p, betas=[0.9, 0.99])
    opt.param_groups[0]["betas"][1] = 2.0
    with refused(opt, [p], ValueError, "betas of params is .*: expected a pair of numbers in"):
        opt.step(np.ones(2))


@pytest.mark.parametrize("value", [-1.0, NAN, INF, None, "x", np.ones(2)])
def test_a_schedule_that_returns_no_learning_rate_is_refused(value):
    p = np.ones(2)
    opt = fastopt.Adam(p, lr=lambda step: 0.1 if step == 0 else value)
    opt.step(np.ones(2))
    with refused(
        opt, [p], (ValueError, TypeError), "lr of params, at step 1, is .*: expected a finite number"
    ):
        opt.step(np.ones(2))


# Gradients


def optimizer_of_three():
    arrays = [np.ones(3), np.ones((4, 2)), np.ones((2, 2, 2))]
    opt = fastopt.Adam(arrays)
    opt.step([np.ones(3), np.ones((4, 2)), np.ones((2, 2, 2))])
    return opt, arrays


def rows(indices, values):
    return fastopt.IndexedSlices(indices, values)


ONE = np.array([1])
GRADIENTS = [
    (0, np.ones(4), ValueError, r"has shape \(4,\) but params\[0\] has \(3,\): they must be the same"),
    (0, np.ones((3, 1)), ValueError, r"has shape \(3, 1\)"),
    (0, np.ones(()), ValueError, r"has shape \(\)"),
    (0, np.ones(3, np.float32), TypeError, r"has dtype float32 but params\[0\] has float64: pass .*astype"),
    (0, np.ones(3, np.float16), TypeError, "has dtype float16 but"),
    (0, np.ones(3, int), TypeError, "has dtype int64 but"),
    (0, np.ones(3, ml_dtypes.bfloat16), TypeError, "has dtype bfloat16"),
    (0, np.ones(3, ">f8"), TypeError, "has dtype >f8 but"),
    (0, np.ones(6)[::2], ValueError, "has strides .* expected a C-contiguous array"),
    (1, np.ones((2, 4)).T, ValueError, "has strides"),
    (0, misaligned(3), ValueError, "is not aligned"),
    (0, np.ma.ones(3), TypeError, "is a masked array"),
    (0, [1.0, 1.0, 1.0], TypeError, "is a list: expected a NumPy array"),
    (0, 1.0, TypeError, "is a float"),
    (0, {"a": np.ones(3)}, TypeError, "is a dict"),
    (0, OnTheGPU(), RuntimeError, "lies on a CUDA device: "),
    (0, rows(ONE, np.ones((1, 3))), ValueError, r"IndexedSlices but params\[0\] has shape \(3,\)"),
    (2, rows(ONE, np.ones((1, 2))), ValueError, "expected a 2-D parameter, pass a dense gradient"),
    (1, rows(np.array([4]), np.ones((1, 2))), ValueError, r"indices holds 4: .* in \[0, 4\)"),
    (1, rows(np.array([2, -1]), np.ones((2, 2))), ValueError, "indices holds -1"),
    (1, rows(np.array([2**40]), np.ones((1, 2))), ValueError, "indices holds 1099511627776"),
    (1, rows(np.array([1.0]), np.ones((1, 2))), TypeError, "indices has dtype float64: expected int32 or"),
    (1, rows(np.array([1], np.int16), np.ones((1, 2))), TypeError, "indices has dtype int16"),
    (1, rows(np.array([1], np.uint64), np.ones((1, 2))), TypeError, "indices has dtype uint64"),
    (1, rows(np.array([1], ">i8"), np.ones((1, 2))), TypeError, "indices has dtype >i8"),
    (1, rows([1], np.ones((1, 2))), TypeError, "indices is a list"),
    (1, rows(np.ma.array([1]), np.ones((1, 2))), TypeError, "indices is a masked array"),
    (1, rows(ONE, np.ones((1, 3))), ValueError, r"values has rows of 3 but params\[1\] of 2"),
    (1, rows(ONE, np.ones((2, 2))), ValueError, r"values has shape \(2, 2\): expected \(1, dim\)"),
    (1, rows(ONE, np.ones(2)), ValueError, "values has shape"),
    (1, rows(np.array([[1, 2]]), np.ones((2, 2))), ValueError, r"expected \(1, 2, dim\)"),
    (1, rows(ONE, np.ones((1, 2), np.float32)), TypeError, r"values has dtype float32 but params\[1\]"),
    (1, rows(ONE, np.ones((1, 4))[:, ::2]), ValueError, "values has strides"),
    (1, rows(ONE, [[1.0, 1.0]]), TypeError, "values is a list"),
    (1, rows(ONE, None), TypeError, "values is a NoneType"),
]


@pytest.mark.parametrize(("place", "bad", "error", "message"), GRADIENTS)
def test_gradients_that_do_not_fit_are_refused_before_anything_is_written(place, bad, error, message):
    opt, arrays = optimizer_of_three()
    grads = [np.ones(3), np.ones((4, 2)), np.ones((2, 2, 2))]
    grads[place] = bad
    with refused(opt, arrays, error, rf"^grads\[{place}\].*{message}"):
        opt.step(grads)


def test_gradients_that_share_memory_with_a_parameter_are_refused():
    opt, arrays = optimizer_of_three()
    p, table, _ = arrays
    for grads in (
        [p, None, None],
        [table.reshape(-1)[2:5], None, None],
        [None, rows(ONE, table[2:3]), None],
        [None, rows(np.zeros((1, 1), int), table.reshape(4, 1, 1, 2)[0]), None],
    ):
        with refused(opt, arrays, ValueError, "shares memory with .* a copy of the gradient"):
            opt.step(grads)
    g = np.ones(6)
    fastopt.SGD([np.ones(3), np.ones(3)]).step([g[:3], g[:3]])


def test_gradients_in_another_structure_are_refused():
    p, q = np.ones(2), np.ones(2)
    g = np.ones(2)
    for params, grads, message in (
        (p, [g], "grads is a list of 1: expected one array, as params is one"),
        (p, {"a": g}, "grads is a dict with the keys 'a': expected one array"),
        ([p, q], [g], "grads is a list of 1: expected a list of 2, one entry a parameter"),
        ([p, q], (g, g, g), "grads is a tuple of 3: expected a list of 2"),
        ([p, q], g, "grads is of type ndarray: expected a list of 2"),
        ([p, q], {"a": g, "b": g}, "grads is a dict with the keys 'a', 'b': expected a list of 2"),
        ([p, q], None, "grads is of type NoneType: expected a list of 2"),
        ([p, q], iter([g]), "grads is a list of 1: expected a list of 2"),
        ({"a": p, "b": q}, {"a": g}, "'b' is missing, pass None to skip it"),
        ({"a": p, "b": q}, {}, r"grads is a dict with the keys \(none\).*'a' is missing"),
        ({"a": p, "b": q}, {"a": g, "b": g, "c": g}, "expected a dict with the keys .* 'a', 'b'"),
        ({"a": p, "b": q}, [g, g], "grads is a list of 2: expected a dict"),
        ([{"params": p}, {"params": [q]}], [g], "grads is a list of 1: expected a list of 2, one entry a"),
        ([{"params": p}, {"params": [q]}], [[g], g], r"grads\[0\] is a list of 1: expected one array"),
        ([{"params": p}, {"params": {"q": q}}], [g, [g]], r"grads\[1\] is a list of 1: expected a dict"),
    ):
        opt = fastopt.SGD(params)
        with refused(opt, [p, q], ValueError, message):
            opt.step(grads)


@pytest.mark.parametrize("name", ["clip_norm", "grad_scale"])
def test_numbers_of_a_step_out_of_range_are_refused(name):
    opt, arrays = optimizer_of_three()
    grads = [None, None, np.ones((2, 2, 2))]
    for value in (-1.0, NAN, -INF):
        with refused(opt, arrays, ValueError, f"{name} is .*: expected at least 0"):
            opt.step(grads, **{name: value})
    for value in ("1", True, [1.0]):
        with refused(opt, arrays, TypeError, f"{name} is .*: expected a number"):
            opt.step(grads, **{name: value})
    for value in (0.0, INF):
        with refused(opt, arrays, ValueError, "grad_scale is .*: expected a finite number above 0"):
            opt.step(grads, grad_scale=value)


def test_torch_gradients_that_do_not_fit_are_refused():
    torch = pytest.importorskip("torch")
    p = torch.nn.Parameter(torch.ones(4, 2))
    opt = fastopt.Adam([p])
    shared = p.detach().numpy()
    for g, error, message in (
        (torch.ones(4, 2).to_sparse(2), TypeError, r"grads\[0\] is a sparse tensor: pass grads\[0\].to_d"),
        (torch.ones(5, 2).to_sparse(1), ValueError, r"grads\[0\] has 5 rows but its parameter 4"),
        (torch.ones(4, 3).to_sparse(1), ValueError, r"grads\[0\].values has rows of 3"),
        (torch.ones(4, 2, dtype=torch.bfloat16), TypeError, r"grads\[0\] has dtype bfloat16"),
        (torch.ones(4, 2, dtype=torch.float64), TypeError, r"grads\[0\] has dtype float64"),
        (torch.ones(2, 4).T, ValueError, "has strides"),
        (torch.ones(4, 2, device="meta"), TypeError, "is on meta"),
        (p.detach(), ValueError, "shares memory"),
        (rows(torch.tensor([4]), torch.ones(1, 2)), ValueError, "indices holds 4"),
        (
            rows(torch.tensor([1]), torch.ones(1, 2, dtype=torch.float16)),
            TypeError,
            "values has dtype float16",
        ),
    ):
        with refused(opt, [shared], error, message):
            opt.step([g])


def test_torch_parameters_changed_afterwards_are_refused():
    torch = pytest.importorskip("torch")
    for change, error, message in (
        (torch.ones(5), ValueError, r"now has shape \(5,\) .*, at first \(4,\)"),
        (torch.ones(4, dtype=torch.float64), ValueError, "and dtype float64, at first"),
        (torch.ones(8)[::2], ValueError, "has strides"),
        (torch.ones(4, dtype=torch.bfloat16), ValueError, "and dtype bfloat16, at first"),
    ):
        p, other = torch.nn.Parameter(torch.ones(4)), np.ones(3, np.float32)
        opt = fastopt.Adam([other, p])
        opt.step([np.ones(3, np.float32), np.ones(4, np.float32)])
        p.data = change
        with refused(opt, [other], error, message):
            opt.step([np.ones(3, np.float32), None])
    p, q = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    opt = fastopt.SGD([p, q])
    q.data = p.data
    with refused(opt, [p.detach().numpy()], ValueError, "shares memory"):
        opt.step([np.ones(4, np.float32), None])


# State


def other_state(**changes):
    """A state dict of a stepped Adam over ``[ones(3), ones((4, 2))]``, changed."""
    opt = fastopt.Adam([np.ones(3), np.ones((4, 2))])
    opt.step([np.ones(3), np.ones((4, 2))])
    return {**opt.state_dict(), **changes}


def without(mapping, *keys):
    return {key: value for key, value in mapping.items() if key not in keys}


def with_entry(key, **changes):
    state = other_state()["state"]
    return other_state(state={**state, key: {**state[key], **changes}})


def with_group(**changes):
    return other_state(param_groups=[{**other_state()["param_groups"][0], **changes}])


STATES = [
    (
        None,
        ValueError,
        "state_dict has type NoneType: expected the keys optimizer, steps, state, param_groups",
    ),
    ([], ValueError, "state_dict has 0 entries"),
    (without(other_state(), "steps"), ValueError, "expected the keys"),
    (other_state(extra=1), ValueError, "expected the keys"),
    (other_state(optimizer="SGD"), ValueError, "is of the optimizer 'SGD': expected 'Adam'"),
    (other_state(steps=-1), ValueError, r"state_dict\['steps'\] is -1: expected a whole number from 0 to"),
    (other_state(steps=0), ValueError, r"\['step'\] is \d+: expected a whole number from 0 to 0"),
    (other_state(steps=1.0), ValueError, "is 1.0: expected a whole number"),
    (other_state(steps=True), ValueError, "is True: expected a whole number"),
    (other_state(state={}), ValueError, "has no keys: expected one entry for each of the parameters 0, 1"),
    (other_state(state=[1, 2]), ValueError, "has 2 entries"),
    (
        other_state(state={**other_state()["state"], 2: {"step": 0}}),
        ValueError,
        "expected one entry for each",
    ),
    (with_entry(0, step=-1), ValueError, r"\['step'\] is -1"),
    (with_entry(1, step=None), ValueError, r"\['step'\] is None"),
    (with_entry(1, extra=np.ones((4, 2))), ValueError, "expected exp_avg, exp_avg_sq"),
    (with_entry(1, exp_avg=np.ones((4, 3))), ValueError, r"has shape \(4, 3\): expected \(4, 2\)"),
    (with_entry(1, exp_avg=np.ones((4, 2), np.float32)), TypeError, "dtype float32: expected float64"),
    (with_entry(1, exp_avg_sq=np.ones((4, 2), ">f8")), TypeError, "has dtype >f8: expected float64"),
    (with_entry(1, exp_avg=[[1.0, 1.0]] * 4), TypeError, "is a list: expected a NumPy array"),
    (
        other_state(state={**other_state()["state"], 1: {"step": 1}}),
        ValueError,
        "has the state none: expected",
    ),
    (other_state(state={**other_state()["state"], 1: {}}), ValueError, "has no keys: expected step and"),
    (other_state(state={**other_state()["state"], 1: None}), ValueError, "has type NoneType"),
    (other_state(param_groups=[]), ValueError, "has 0 entries: expected 1 groups"),
    (other_state(param_groups=None), ValueError, "has type NoneType: expected 1 groups"),
    (other_state(param_groups=[{}]), ValueError, "has no keys: expected the options amsgrad, betas"),
    (with_group(extra=1), ValueError, "expected the options"),
    (with_group(params=[0]), ValueError, r"\['params'\] is \[0\]: expected \[0, 1\]"),
    (with_group(params=None), (ValueError, TypeError), ""),
    (with_group(lr=-1.0), ValueError, r"lr of state_dict\['param_groups'\]\[0\] is -1.0"),
    (with_group(betas=(0.9, 2.0)), ValueError, "betas of state_dict"),
    (with_group(amsgrad=True), ValueError, "belongs to an optimizer with the state"),
    (with_group(rows=np.ones(3)), ValueError, r"rows of state_dict\['param_groups'\]\[0\] is array"),
    (with_group(state_dtype={"names": 1}), ValueError, r"state_dtype of state_dict\['param_groups'\]\[0\]"),
    (with_group(params=[0, np.ones(2)]), ValueError, r"\['params'\] is \[0, array"),
    (other_state(optimizer=np.ones(2)), ValueError, "is of the optimizer array"),
    (other_state(state={**other_state()["state"], 1: [1]}), ValueError, "has 1 entries: expected step and"),
]


@pytest.mark.parametrize(("state", "error", "message"), STATES)
def test_states_that_do_not_fit_are_refused(state, error, message):
    p, table = np.ones(3), np.ones((4, 2))
    opt = fastopt.Adam([p, table], lr=0.25)
    opt.step([np.ones(3), None])
    groups = [dict(group) for group in opt.param_groups]
    with refused(opt, [p, table], error, message):
        opt.load_state_dict(state)
    assert [dict(group) for group in opt.param_groups] == groups


def test_the_state_of_other_parameters_is_refused():
    saved = fastopt.Adam({"a": np.ones(3)}).state_dict()
    opt = fastopt.Adam({"b": np.ones(3)})
    with pytest.raises(ValueError, match="expected"):
        opt.load_state_dict(saved)
    with pytest.raises(ValueError, match="expected 2 groups"):
        fastopt.Adam([{"params": np.ones(3)}, {"params": np.ones(3)}]).load_state_dict(saved)


# Files


@pytest.fixture
def saved(tmp_path):
    """A file of a stepped Adam, with parameters."""
    opt = fastopt.Adam({"w": np.ones((4, 2)), "b": np.ones(2)})
    opt.step({"w": np.ones((4, 2)), "b": np.ones(2)})
    path = tmp_path / "saved"
    opt.save(path, params=True, metadata={"epoch": 3})
    return path


def fresh():
    arrays = {"w": np.full((4, 2), 2.0), "b": np.full(2, 2.0)}
    opt = fastopt.Adam(arrays)
    opt.step({"w": np.ones((4, 2)), "b": None})
    return opt, list(arrays.values())


def test_a_missing_file_or_a_folder_raises_os_error(tmp_path):
    opt, arrays = fresh()
    with refused(opt, arrays, FileNotFoundError, "missing"):
        opt.load(tmp_path / "missing")
    with refused(opt, arrays, IsADirectoryError, ""):
        opt.load(tmp_path)
    with refused(opt, arrays, OSError, ""):
        opt.save(tmp_path / "no folder" / "file")


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 100, -1, -60])
def test_a_truncated_file_is_refused(saved, cut):
    saved.write_bytes(saved.read_bytes()[:cut])
    opt, arrays = fresh()
    with refused(opt, arrays, ValueError, "saved is not a whole safetensors file"):
        opt.load(saved, params=True)


def test_foreign_files_are_refused(saved):
    from safetensors.numpy import save_file

    opt, arrays = fresh()
    saved.write_text("not a file of tensors, but long enough to look like one")
    with refused(opt, arrays, ValueError, "not a whole safetensors file"):
        opt.load(saved)
    for metadata in (None, {"other": "1"}):
        save_file({"a": np.ones(3)}, saved, metadata)
        with refused(
            opt, arrays, ValueError, "holds no optimizer: expected a file that Optimizer.save wrote"
        ):
            opt.load(saved)


def rewrite(path, change, drop=()):
    """Write ``path`` again with its header changed, and checksums that fit."""
    with tensors.opened(path) as file:
        header = json.loads(file.metadata["fastopt"])
        arrays = {name: file.read(name) for name in file.names if name not in drop}
    change(header)
    tensors.write(path, arrays, {"fastopt": json.dumps(header)})


HEADERS = [
    (lambda h: h.update(format=3), "has format 3: expected 1 to 2, load it with a newer fastopt"),
    (lambda h: h.update(optimizer="SGD"), "is of the optimizer 'SGD'"),
    (lambda h: h.update(steps=-3), "is -3"),
    (lambda h: h["parameters"][0].update(key="other"), "expected one entry for each of the parameters"),
    (lambda h: h["parameters"].pop(), "expected"),
    (lambda h: h["param_groups"].pop(), "has 0 entries: expected 1 groups"),
    (lambda h: h["param_groups"][0].update(lr=-1.0), "lr of"),
    (lambda h: h["param_groups"][0].update(amsgrad=True), "belongs to an optimizer with the state"),
    (lambda h: h["param_groups"][0].update(lr={"schedule": "cosine(total=3)"}), "as lr the schedule cosine"),
    (lambda h: h.pop("format"), "saved"),
    (lambda h: h.pop("parameters"), "saved"),
    (lambda h: h.pop("params"), "saved"),
    (lambda h: h.pop("steps"), "saved"),
    (lambda h: h.pop("metadata"), "saved"),
    (lambda h: h["parameters"][0].pop("slots"), "saved"),
    (lambda h: h["param_groups"][0].pop("lr"), ""),
]


@pytest.mark.parametrize("number", range(len(HEADERS)))
def test_files_with_another_header_are_refused(saved, number):
    change, message = HEADERS[number]
    rewrite(saved, change)
    opt, arrays = fresh()
    with refused(opt, arrays, ValueError, message):
        opt.load(saved, params=True)


def test_files_that_lack_a_tensor_or_hold_no_json_are_refused(saved):
    from safetensors.numpy import save_file

    opt, arrays = fresh()
    rewrite(saved, lambda header: None, drop={"state.1.exp_avg"})
    with refused(opt, arrays, ValueError, "not a whole"):
        opt.load(saved)
    for text in ("{", "[]", "3"):
        save_file({"a": np.ones(3)}, saved, {"fastopt": text})
        with refused(opt, arrays, ValueError, "saved is not as Optimizer.save saved it"):
            opt.load(saved)


def test_files_without_or_with_other_parameters_are_refused_when_parameters_are_wanted(saved):
    opt, arrays = fresh()
    opt.save(saved)
    with refused(opt, arrays, ValueError, "saved holds no parameters, and params=True asks for them"):
        opt.load(saved, params=True)
    opt.load(saved)
    sgd = fastopt.SGD({"w": np.ones((2, 4))})
    sgd.save(saved, params=True)
    for other in (np.ones((4, 2)), np.ones((2, 4), np.float32)):
        twin = fastopt.SGD({"w": other})
        with refused(twin, [other], ValueError, r"holds params\['w'\] with shape .* and dtype"):
            twin.load(saved, params=True)


def test_another_schedule_than_the_saved_one_is_refused(saved):
    p = np.ones(2)
    cosine = fastopt.schedules.cosine
    opt = fastopt.SGD(p, lr=0.5 * cosine(10))
    opt.save(saved)
    fastopt.SGD(p, lr=0.5 * cosine(10)).load(saved)
    for lr in (0.5 * cosine(11), 0.1):
        twin = fastopt.SGD(p, lr=lr)
        with refused(twin, [p], ValueError, "has as lr the schedule .*: build the optimizer with that"):
            twin.load(saved)


def test_metadata_that_json_does_not_hold_is_refused_and_leaves_the_file(saved):
    before = saved.read_bytes()
    opt, _ = fresh()
    with pytest.raises(TypeError, match="JSON"):
        opt.save(saved, metadata={"a": object()})
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


# Behind the optimizer's back


@pytest.mark.parametrize("number", [10**400, 1e300])
def test_numbers_beyond_the_range_of_the_parameter_are_refused(number):
    p = np.ones(2, np.float32)
    with refused(fastopt.Adam(p), [p], ValueError, "lr of params|step_size"):
        opt = fastopt.Adam(p, lr=0.1)
        opt.param_groups[0]["lr"] = number
        opt.step(np.ones(2, np.float32))
    with pytest.raises(ValueError, match="clip_norm"):
        fastopt.Adam(p).step(np.ones(2, np.float32), clip_norm=10**400)


def test_an_array_put_in_the_place_of_a_parameter_is_refused():
    params = {"w": np.ones(2), "b": np.ones(1)}
    opt = fastopt.SGD(params, lr=1.0)
    old = params["w"]
    params["w"] = old * 2
    with refused(opt, [old, params["w"], params["b"]], ValueError, "the params of params were changed"):
        opt.step({"w": np.ones(2), "b": np.ones(1)})
    opt = fastopt.SGD([old], lr=1.0)
    opt.param_groups[0]["params"][0] = old * 2
    with refused(opt, [old], ValueError, "the params of params were changed"):
        opt.step([np.ones(2)])


def test_an_array_as_learning_rate_is_refused():
    p = np.ones(2)
    opt = fastopt.SGD(p)
    opt.param_groups[0]["lr"] = np.array([0.1, 0.2])
    with refused(opt, [p], TypeError, "lr of params"):
        opt.step(np.ones(2))


def test_a_kernel_that_can_not_be_compiled_changes_nothing(monkeypatch):
    params = [np.ones(3), np.ones((4, 2))]
    opt = fastopt.Adam(params)
    grads = [np.ones(3), fastopt.IndexedSlices(np.array([1]), np.ones((1, 2)))]

    class Interrupted(Kernel):
        def ready(self, work, args, types):
            raise KeyboardInterrupt

    monkeypatch.setattr("fastopt.kernels.cpu.backend.rows.update_tables", Interrupted(lambda: None))
    before = snapshot(opt, params)
    with pytest.raises(KeyboardInterrupt):
        opt.step(grads)
    assert snapshot(opt, params) == before


@pytest.mark.parametrize(
    ("make", "kernel"),
    [(fastopt.LAMB, "trust.find_trust_ratios"), (fastopt.Adafactor, "factored.update_tiles")],
    ids=["LAMB", "Adafactor"],
)
def test_kernels_of_several_passes_are_compiled_before_the_first_write(make, kernel, monkeypatch):
    params = [np.ones(3), np.ones((4, 2))]  # Adafactor's vector is updated by another kernel, or a first one

    class Interrupted(Kernel):
        def ready(self, work, args, types):
            raise KeyboardInterrupt

    module, name = kernel.split(".")
    for where in (f"fastopt.kernels.cpu.{module}", "fastopt.kernels.cpu.backend.arrays"):
        monkeypatch.setattr(f"{where}.{name}", Interrupted(lambda: None), raising=False)
    opt = make(params)
    before = snapshot(opt, params)
    with pytest.raises(KeyboardInterrupt):
        opt.step([np.ones(3), np.ones((4, 2))])
    assert snapshot(opt, params) == before


def test_metadata_that_is_no_dict_or_no_json_is_refused(tmp_path):
    opt = fastopt.SGD(np.ones(2))
    for metadata in ("abc", [1], {"a": np.ones(2)}):
        with pytest.raises(TypeError, match="metadata"):
            opt.save(tmp_path / "saved", metadata=metadata)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        opt.save(tmp_path)
