"""An exception of a signal handler leaves a step wholly before or wholly after."""

import _thread
import copy
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import fastopt

ROWS, DIM, LAST = 60, 4, 4
PACKAGE = str(Path(fastopt.__file__).parent)


def drawn(shape, seed, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def slices(seed, dtype=np.float32):
    indices = np.random.default_rng(seed).integers(0, ROWS, 12)
    return fastopt.IndexedSlices(indices, drawn((12, DIM), seed + 1, dtype))


def bags(seed, mode):
    indices = np.random.default_rng(seed).integers(0, ROWS, (6, 3))
    return fastopt.BagGradient(indices, None, drawn((6, DIM), seed + 1), mode=mode)


def table(dtype=np.float32):
    return np.ones((ROWS, DIM), dtype)


def halved(step):
    return 0.5**step


# the optimizer of new parameters, the gradients of a step, and its arguments
KINDS = {
    "dense": (
        lambda: fastopt.AdamW([np.ones(7), table()], lr=halved),
        lambda k: [drawn(7, k, np.float64), drawn((ROWS, DIM), k)],
        {"clip_norm": 1.0, "zero_grads": True},
    ),
    "large": (lambda: fastopt.Adam(np.ones(140_000)), lambda k: drawn(140_000, k, np.float64), {}),
    "sparse": (
        lambda: fastopt.NAdam([table(), table()], step_per_row=True),
        lambda k: [slices(k), bags(k, "mean")],
        {"zero_grads": True},
    ),
    "now dense, now sparse": (
        lambda: fastopt.Adam([table(), np.ones(9, np.float32)], state_dtype="8bit"),
        lambda k: [slices(k) if k % 2 else drawn((ROWS, DIM), k), drawn(9, k) if k % 3 else None],
        {},
    ),
    "16 bits": (
        lambda: fastopt.AdaGrad(table(ml_dtypes.bfloat16), master_weights=True, state_dtype="bfloat16"),
        lambda k: slices(k, ml_dtypes.bfloat16),
        {},
    ),
    "missed steps of moments": (
        lambda: fastopt.Adam(table(), weight_decay=0.125, rows="dense"),
        slices,
        {},
    ),
    "missed steps of momentum": (
        lambda: fastopt.SGD(table(), lr=0.125, momentum=0.5, rows="dense"),
        lambda k: slices(k) if k != 2 else drawn((ROWS, DIM), k),
        {},
    ),
    "missed steps of maxima": (
        lambda: fastopt.RMSProp(table(), rows="dense"),
        lambda k: bags(k, "max"),
        {"clip_norm": 1.0},
    ),
    "missed steps one by one": (lambda: fastopt.Lion(table(), rows="dense"), slices, {}),
    "trust ratio": (
        lambda: fastopt.LAMB([table(), np.ones(7, np.float32)]),
        lambda k: [drawn((ROWS, DIM), k), drawn(7, k)],
        {"zero_grads": True},
    ),
    "factored": (
        lambda: fastopt.Adafactor([table(), np.ones(7, np.float32)]),
        lambda k: [drawn((ROWS, DIM), k), drawn(7, k)],
        {},
    ),
    "table in files": (
        lambda path: fastopt.Adam(fastopt.open_table(path, rows=ROWS, dim=DIM)),
        slices,
        {"zero_grads": True},
    ),
}


def made(kind, folder, name):
    make = KINDS[kind][0]
    return make(folder / name) if kind == "table in files" else make()


def bits(opt):
    """The parameters and the state of an optimizer; of rows that may be behind, only how far they are."""
    [group] = opt.param_groups
    params = group["params"] if isinstance(group["params"], list) else [group["params"]]
    state = copy.deepcopy(opt.state_dict()["state"])
    found = {("param", k): np.asarray(getattr(p, "weights", p)) for k, p in enumerate(params)}
    found |= {(k, name): np.asarray(value) for k, own in state.items() for name, value in own.items()}
    return {key: value.tobytes() for key, value in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_no_handler_comes_within_a_step(kind, tmp_path, monkeypatch):
    """The signal comes right before the calls that make the step: its handler runs right after them."""
    from fastopt.kernels.cpu import backend

    opt, twin = made(kind, tmp_path, "own"), made(kind, tmp_path, "twin")
    _, gradients, arguments = KINDS[kind]
    run = backend.run
    for step in range(LAST):
        grads = gradients(step)
        signalled = monkeypatch.context()
        with signalled as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(backend, "run", lambda calls: run([_thread.interrupt_main, *calls]))
            opt.step(grads, **arguments)
        if opt.steps == step:  # it came to rows that take missed steps, before the step
            opt.step(grads, **arguments)
        twin.step(gradients(step), **arguments)
        assert opt.steps == twin.steps == step + 1
        assert bits(opt) == bits(twin)
        if arguments.get("zero_grads"):
            for grad in grads if isinstance(grads, list) else [grads]:
                assert not np.any(getattr(grad, "values", getattr(grad, "grad_output", grad)))


class Raised(Exception):
    pass


def raised_at(number, call):
    """Make ``call``, with an exception before byte code ``number`` of the package; returns whether it came.

    This is harder than signals, whose handlers Python runs after calls and before loops alone. Left out are
    the few byte codes by which a call enters and leaves (exclusive.py), which rest on that, and a lock's.
    """
    count = 0

    def trace(frame, event, _):
        nonlocal count
        name = frame.f_code.co_filename
        if not name.startswith(PACKAGE) or name.endswith(("exclusive.py", "memory.py")):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            count += 1
            if count == number:
                raise Raised
        return trace

    sys.settrace(trace)
    try:
        call()
    except Raised:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_interrupted_anywhere_is_made_or_not(kind, tmp_path):
    _, gradients, arguments = KINDS[kind]
    twin = made(kind, tmp_path, "twin")
    expected = [bits(twin)]
    for step in range(LAST):
        twin.step(gradients(step), **arguments)
        expected.append(bits(twin))
    twin.flush()
    flushed = bits(twin)
    runs, came = 0, True
    while came:
        opt = made(kind, tmp_path, f"run {runs}")
        at, number = runs % LAST, 1 + 31 * runs
        for step in range(at):
            opt.step(gradients(step), **arguments)
        for again in (number, number // 3 + 1):  # an interrupt, and another when the step is tried anew
            if opt.steps == at:
                raised = raised_at(again, lambda own=opt, k=at: own.step(gradients(k), **arguments))
                came = raised if again == number else came
                assert opt.steps in ({at, at + 1} if raised else {at + 1})
                if "missed" not in kind:  # there rows may have taken the steps that they missed
                    assert bits(opt) == expected[opt.steps]
        for step in range(opt.steps, LAST):
            opt.step(gradients(step), **arguments)
        opt.flush()
        assert bits(opt) == flushed
        runs += 1
    assert runs > 5
