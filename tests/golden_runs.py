"""Runs whose parameters and state are compared with what they were before: by digest, to the bit.

Run as a program, ``golden_runs.py FILE [PART PARTS]`` writes the digests of all runs to a JSON file:
every optimizer, dtype, kind of gradient and format of state, small (on one thread), and large (once with one
thread, once with two, which must agree).
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numba
import numpy as np

import fastopt

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "nesterov": ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.02}),
    "adagrad": ("AdaGrad", {"lr": 0.05, "lr_decay": 0.01, "initial_accumulator_value": 0.1}),
    "rowwise_adagrad": ("RowwiseAdaGrad", {"lr": 0.05, "weight_decay": 0.01, "decoupled_weight_decay": True}),
    "rmsprop": ("RMSProp", {"lr": 0.01, "alpha": 0.9}),
    "rmsprop_momentum": ("RMSProp", {"lr": 0.01, "alpha": 0.9, "momentum": 0.8}),
    "rmsprop_centered": ("RMSProp", {"lr": 0.01, "centered": True}),
    "rmsprop_centered_momentum": ("RMSProp", {"lr": 0.01, "centered": True, "momentum": 0.8}),
    "adam": ("Adam", {"lr": 0.01, "weight_decay": 0.01}),
    "adamw": ("AdamW", {"lr": 0.01, "betas": (0.8, 0.99)}),
    "amsgrad": ("AMSGrad", {"lr": 0.01}),
    "rowwise_adam": ("RowwiseAdam", {"lr": 0.01}),
    "radam": ("RAdam", {"lr": 0.01, "betas": (0.8, 0.9)}),
    "nadam": ("NAdam", {"lr": 0.01, "weight_decay": 0.01, "decoupled_weight_decay": True}),
    "lion": ("Lion", {"lr": 0.01, "weight_decay": 0.1}),
    "lamb": ("LAMB", {"lr": 0.01, "maximize": True}),
    "adafactor": ("Adafactor", {"lr": 0.01, "weight_decay": 0.01}),
}
DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
GRADIENTS = "dense", "slices", "bags_sum", "bags_mean", "bags_max", "dense_rows", "files"
FORMATS = None, "float32", "bfloat16", "8bit"
STEPS = 4


class Run(NamedTuple):
    """One of the runs. master: whether ``master_weights`` is set."""

    optimizer: str
    dtype: str
    gradient: str
    state: str | None
    master: bool
    large: bool

    def __str__(self) -> str:
        master = "-master" if self.master else ""
        size = "large" if self.large else "small"
        return f"{self.optimizer}-{self.dtype}-{self.gradient}-{self.state or 'default'}{master}-{size}"


def all_runs() -> Iterator[Run]:
    """Every combination that has a meaning of its own."""
    for optimizer in OPTIMIZERS:
        for large in (False, True):
            for dtype in DTYPES:
                low = DTYPES[dtype].itemsize == 2
                for state in FORMATS:
                    if state == "float32" and dtype != "float64":  # the default
                        continue
                    for master in (False, True) if low else (False,):
                        for gradient in GRADIENTS:
                            if gradient == "files" and low:
                                continue
                            yield Run(optimizer, dtype, gradient, state, master, large)


def digest(run: Run, threads: int) -> str:
    """Of the parameters and the state after a few steps; the type of the error for what is refused."""
    numba.set_num_threads(threads)
    try:
        return _digest(run)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}"


def _digest(run: Run) -> str:
    rng = np.random.default_rng(len(str(run.gradient)))
    dtype = DTYPES[run.dtype]
    name, options = OPTIMIZERS[run.optimizer]
    options = {**options, "state_dtype": run.state, "master_weights": run.master, "seed": 3}
    make = getattr(fastopt, name)
    if run.gradient == "dense":
        shapes = (
            [(131_072 + 777,), (300, 7), (), (2, 40, 300)] if run.large else [(700,), (5, 7), (), (2, 3, 300)]
        )
        params = [np.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
        opt = make(params, **options)
        for step in range(STEPS):
            grads = [np.asarray(rng.standard_normal(p.shape) * 0.1, dtype) for p in params]
            _step(opt, grads, step)
        return _told(opt, params)
    rows, dim, count = (2_500, 48, 3_000) if run.large else (40, 300, 60)
    if run.gradient == "dense_rows":
        options["rows"] = "dense"
    start = rng.standard_normal((rows, dim)).astype(dtype)
    if run.gradient == "files":
        with (
            tempfile.TemporaryDirectory() as folder,
            fastopt.open_table(f"{folder}/t", rows, dim, dtype, init=lambda a, b: start[a:b]) as table,
        ):
            opt = make(table, **options)
            for step in range(STEPS):
                _step(opt, _gradient(run, rng, rows, dim, count, dtype), step)
                opt.flush()
            return _told(opt, [np.array(table.weights)])
    opt = make(start, **options)
    for step in range(STEPS):
        _step(opt, _gradient(run, rng, rows, dim, count, dtype), step)
    opt.flush()
    return _told(opt, [start])


def _gradient(run: Run, rng: np.random.Generator, rows: int, dim: int, count: int, dtype: np.dtype) -> Any:
    """Of a table whose first rows are named more often than the others."""
    indices = (rng.random(count) ** 3 * rows).astype(np.int64)
    if not run.gradient.startswith("bags"):
        return fastopt.IndexedSlices(indices, (rng.standard_normal((count, dim)) * 0.1).astype(dtype))
    offsets = np.unique(np.append(0, rng.integers(0, count, count // 4)))
    grad_output = (rng.standard_normal((offsets.size, dim)) * 0.1).astype(dtype)
    mode = run.gradient.removeprefix("bags_")
    weights = rng.standard_normal(count).astype(dtype) if mode == "sum" else None
    return fastopt.BagGradient(indices, offsets, grad_output, mode, weights, padding_idx=1)


def _step(opt: fastopt.Optimizer, grads: Any, step: int) -> None:
    """Steps with other extras and other learning rates."""
    if step == 1:
        opt.step(grads, clip_norm=1.0)
    elif step == 3:
        opt.step(grads, clip_value=0.05, grad_scale=0.5)
    else:
        opt.step(grads)
    opt.param_groups[0]["lr"] *= 0.75


def _told(opt: fastopt.Optimizer, params: list[np.ndarray]) -> str:
    found = hashlib.sha256()
    for array in params:
        found.update(array.tobytes())
    for key, state in opt.state_dict()["state"].items():
        for slot, value in state.items():
            found.update(f"{key} {slot} {getattr(value, 'dtype', '')} {np.shape(value)}".encode())
            found.update(np.ascontiguousarray(value).tobytes())
    return found.hexdigest()[:16]


# Files of an earlier version, which later versions go on from to the bit


def saved_runs() -> dict[str, tuple[str, dict[str, Any], np.dtype]]:
    """Optimizers whose files are kept: name -> class, options, and dtype of the parameter."""
    return {
        "adam-8bit": ("Adam", {"lr": 0.01, "state_dtype": "8bit", "seed": 5}, DTYPES["float32"]),
        "adamw-rows": ("AdamW", {"lr": 0.01, "rows": "dense"}, DTYPES["float64"]),
        "sgd-master": ("SGD", {"lr": 0.1, "momentum": 0.9, "master_weights": True}, DTYPES["bfloat16"]),
    }


def saved_gradient(rng: np.random.Generator, dtype: np.dtype) -> Any:
    """A gradient by rows of a table of 12 rows of 8."""
    values = np.asarray(rng.standard_normal((6, 8)), dtype)
    return fastopt.IndexedSlices(rng.integers(0, 12, 6), values)


def save_all(folder: str) -> None:
    """Write the files of every saved run, and a table, after three steps."""
    for name, (optimizer, options, dtype) in saved_runs().items():
        rng = np.random.default_rng(1)
        p = np.asarray(rng.standard_normal((12, 8)), dtype)
        opt = getattr(fastopt, optimizer)(p, **options)
        for _ in range(3):
            opt.step(saved_gradient(rng, dtype))
        opt.save(f"{folder}/{name}.safetensors")
        np.save(f"{folder}/{name}.npy", p.view(np.uint8))
    rng = np.random.default_rng(1)
    with fastopt.open_table(f"{folder}/table", 12, 8) as table:
        opt = fastopt.RowwiseAdam(table, lr=0.01)
        for _ in range(3):
            opt.step(saved_gradient(rng, DTYPES["float32"]))


def go_on(folder: str) -> dict[str, str]:
    """Digests of the saved runs after three more steps; the table in ``folder`` changes."""
    found = {}
    for name, (optimizer, options, dtype) in saved_runs().items():
        rng = np.random.default_rng(2)
        p = np.load(f"{folder}/{name}.npy").view(dtype)
        opt = getattr(fastopt, optimizer)(p, **options)
        opt.load(f"{folder}/{name}.safetensors")
        for _ in range(3):
            opt.step(saved_gradient(rng, dtype))
        opt.flush()
        found[name] = _told(opt, [p])
    rng = np.random.default_rng(2)
    with fastopt.open_table(f"{folder}/table") as table:
        opt = fastopt.RowwiseAdam(table, lr=0.01)
        for _ in range(3):
            opt.step(saved_gradient(rng, DTYPES["float32"]))
        found["table"] = _told(opt, [np.array(table.weights)])
    return found


def main(path: str, part: int = 0, parts: int = 1, only: str = "") -> None:
    found = {}
    names = list(OPTIMIZERS)[part::parts]
    for run in all_runs():
        if run.optimizer not in names or only not in str(run):
            continue
        one = digest(run, 1)
        if run.large:
            two = digest(run, 2)
            if one != two:
                one = f"{one} with 1 thread, {two} with 2"
                print(run, one)
        found[str(run)] = one
        with open(path, "w") as file:
            json.dump(found, file, indent=0)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]), *sys.argv[4:])
