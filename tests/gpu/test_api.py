"""Optimizers over arrays of a CUDA device, through the public API, against the same over NumPy arrays: every
rule, kind of gradient and format."""

import itertools
import os
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from devices import CUDA, bits
from golden_runs import DTYPES, OPTIMIZERS

import fastopt

GRADIENTS = "dense", "slices", "bags_sum", "bags_mean", "bags_max", "dense_rows", "step_per_row"
FORMATS = [
    ("float32", None, False),
    ("float32", "bfloat16", False),
    ("float32", "8bit", False),
    ("float64", None, False),
    ("float64", "8bit", False),
    ("float16", None, False),
    ("float16", "bfloat16", True),
    ("bfloat16", "8bit", True),
    ("bfloat16", "bfloat16", False),
]
# Sums over a row, or over all of an array, are added in another order than the CPU's.
SUMS = {"rowwise_adagrad", "rowwise_adam", "lamb", "adafactor"}
# Of the other kinds of gradient each rule has kernels apart. tests/gpu/test_dense.py and test_catch_up.py go
# over the rules; here these do, each way to catch up and to take state of rows and layers among them.
BY_EVERY_RULE = "slices", "bags_sum", "bags_mean", "bags_max"
OF_OTHERS = {
    "sgd", "nesterov", "adagrad", "rmsprop_centered", "adam", "rowwise_adam", "radam", "nadam", "lion",
    "lamb", "adafactor",
}  # fmt: skip
STEPS = 3
SPACINGS = {"bfloat16": 2.0**-8, "8bit": 2.0**-3}  # relative, of what is rounded at random


class Run(NamedTuple):
    optimizer: str
    gradient: str
    dtype: str
    state: str | None
    master: bool

    def __str__(self) -> str:
        master = "-master" if self.master else ""
        return f"{self.optimizer}-{self.gradient}-{self.dtype}-{self.state or 'default'}{master}"


def runs() -> list[Run]:
    """Every rule with slices and bags, some with each other kind of gradient, the formats in turn, but with
    one for slices and bags, which share their kernels, and none that is refused; with
    HYPOTHESIS_PROFILE=thorough every combination."""
    if os.environ.get("HYPOTHESIS_PROFILE") == "thorough":
        every = itertools.product(OPTIMIZERS, GRADIENTS, FORMATS)
        return [Run(optimizer, gradient, *own) for optimizer, gradient, own in every]
    found = {}
    for i, optimizer in enumerate(OPTIMIZERS):
        for gradient in GRADIENTS if optimizer in OF_OTHERS else BY_EVERY_RULE:
            at = i + {"dense": 3, "step_per_row": 6}.get(gradient, 0)
            formats = FORMATS
            if OPTIMIZERS[optimizer][1].get("centered"):  # which 8 bits are not for
                formats = [own for own in FORMATS if own[1] != "8bit"]
            found[Run(optimizer, gradient, *formats[at % len(formats)])] = None
    return list(found)


def gradient(run: Run, rng: np.random.Generator, rows: int, dim: int, put: Any) -> Any:
    """Of a table whose first rows are named more often than the others."""
    dtype = DTYPES[run.dtype]
    count = 30
    indices = (rng.random(count) ** 3 * rows).astype(np.int64)
    if not run.gradient.startswith("bags"):
        values = (rng.standard_normal((count, dim)) * 0.1).astype(dtype)
        return fastopt.IndexedSlices(put(indices), put(values))
    offsets = np.unique(np.append(0, rng.integers(0, count, count // 4)))
    output = (rng.standard_normal((offsets.size, dim)) * 0.1).astype(dtype)
    mode = run.gradient.removeprefix("bags_")
    weights = put(rng.standard_normal(count).astype(dtype)) if mode == "sum" else None
    return fastopt.BagGradient(put(indices), put(offsets), put(output), mode, weights, padding_idx=1)


def trained(run: Run, put: Any) -> tuple[list[Any], dict]:
    """The parameters, and the state, after some steps; ``put`` makes what the optimizer gets."""
    rng = np.random.default_rng(len(run.gradient))
    dtype = DTYPES[run.dtype]
    name, options = OPTIMIZERS[run.optimizer]
    options = {**options, "state_dtype": run.state, "master_weights": run.master, "seed": 3}
    if run.gradient == "dense_rows":
        options["rows"] = "dense"
    if run.gradient == "step_per_row":
        options["step_per_row"] = True
    shapes = [(300,), (5, 7), (), (2, 3, 40)] if run.gradient == "dense" else [(12, 36)]
    params = [put(np.asarray(rng.standard_normal(shape), dtype)) for shape in shapes]
    opt = getattr(fastopt, name)(params, **options)
    ahead = run.gradient == "dense_rows" and isinstance(params[0], np.ndarray)
    for step in range(STEPS):
        if run.gradient == "dense":
            grads = [put(np.asarray(rng.standard_normal(shape) * 0.1, dtype)) for shape in shapes]
        else:
            grads = [gradient(run, rng, *shapes[0], put)]
        if ahead:  # as a device does, which stores missed steps before it makes the next
            opt.catch_up(params[0], grads[0].indices)
        opt.step(grads, **({"clip_value": 0.05, "grad_scale": 0.5} if step == 1 else {}))
        opt.param_groups[0]["lr"] *= 0.75
    opt.flush()
    return params, opt.state_dict()


@pytest.mark.parametrize("device", CUDA)
@pytest.mark.parametrize("run", [run for run in runs() if run.optimizer == "adam"], ids=str)
def test_later_steps_make_no_kernels(device, run, monkeypatch):
    """Each source that is made is one more function of Numba's, which it never forgets."""
    step = fastopt.Adam.step

    def guarded(opt: Any, *given: Any, **options: Any) -> Any:
        if opt.steps == 0:
            return step(opt, *given, **options)
        with monkeypatch.context() as patch:
            patch.setattr("builtins.exec", lambda *_: pytest.fail("source was made"))
            return step(opt, *given, **options)

    monkeypatch.setattr(fastopt.Adam, "step", guarded)
    trained(run, device().put)


def assert_like(got: np.ndarray, want: np.ndarray, exact: bool, spacing: float) -> None:
    """The same bits, or, of sums in another order, numbers nearby, ``spacing`` being that of the numbers that
    are rounded; of codes, one may be rounded the other way."""
    assert got.dtype == want.dtype and got.shape == want.shape
    if exact or got.dtype == np.int64:
        np.testing.assert_array_equal(bits(got), bits(want))
        return
    if got.dtype == np.uint8:
        assert np.abs(got.astype(int) - want.astype(int)).max(initial=0) <= 1
        return
    spacing = max(spacing, float(ml_dtypes.finfo(got.dtype).eps))
    got, want = got.astype(np.float64), want.astype(np.float64)
    np.testing.assert_allclose(got, want, rtol=16 * spacing, atol=8 * spacing * np.abs(want).max(initial=0))


@pytest.mark.parametrize("device", CUDA)
@pytest.mark.parametrize("run", runs(), ids=str)
def test_training_on_a_device_is_that_on_the_cpu(device, run):
    on = device()
    try:
        want, want_state = trained(run, np.array)
    except (TypeError, ValueError) as error:
        with pytest.raises(type(error)):
            trained(run, on.put)
        return
    got, got_state = trained(run, on.put)
    exact = run.optimizer not in SUMS
    spacing = SPACINGS.get(run.state, 0.0)
    for one, other in zip(got, want, strict=True):
        assert_like(on.get(one), other, exact, spacing)
    assert got_state["param_groups"] == want_state["param_groups"]
    for key, own in want_state["state"].items():
        assert got_state["state"][key].keys() == own.keys()
        for slot, value in own.items():
            if slot == "step":
                assert got_state["state"][key][slot] == value
            else:
                assert_like(got_state["state"][key][slot], value, exact, spacing)
