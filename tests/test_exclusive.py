"""An optimizer is for one call at a time."""

import copy
import pickle
import signal
import threading

import numpy as np
import pytest

import fastopt

ROWS, DIM = 200, 8


def table():
    return np.ones((ROWS, DIM), np.float32)


CALLS = {
    "step": lambda opt, path: opt.step(table()),
    "state_dict": lambda opt, path: opt.state_dict(),
    "load_state_dict": lambda opt, path: opt.load_state_dict({}),
    "save": lambda opt, path: opt.save(path),
    "load": lambda opt, path: opt.load(path),
    "flush": lambda opt, path: opt.flush(),
    "catch_up": lambda opt, path: opt.catch_up(opt.param_groups[0]["params"], np.arange(3)),
    "embedding": lambda opt, path: fastopt.embedding(
        opt.param_groups[0]["params"], np.arange(3), optimizer=opt
    ),
    "copy": lambda opt, path: copy.deepcopy(opt),
    "pickle": lambda opt, path: pickle.dumps(opt),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_beside_a_step_is_refused(name, tmp_path):
    called = []

    def lr(step):  # asked for within a step
        if called:
            return 0.5
        called.append(name)
        with pytest.raises(RuntimeError, match="was called while another call of the same object"):
            CALLS[name](opt, tmp_path / "saved")
        return 0.5

    p, twin = table(), table()
    opt = fastopt.SGD(p, lr=lr, momentum=0.5)
    opt.step(table())
    assert called and opt.steps == 1
    fastopt.SGD(twin, lr=0.5, momentum=0.5).step(table())
    np.testing.assert_array_equal(p, twin)
    opt.step(table())  # and goes on
    assert opt.steps == 2


def test_a_signal_handler_is_told_that_a_step_is_at_work():
    told = []

    def handler(*_):
        try:
            opt.step(g)
        except RuntimeError as error:
            told.append(str(error))

    p, g = np.ones(10, np.float32), np.ones(10, np.float32)
    opt = fastopt.SGD(p, lr=lambda step: signal.raise_signal(signal.SIGINT) or 0.5)
    before = signal.signal(signal.SIGINT, handler)
    try:
        opt.step(g)
    finally:
        signal.signal(signal.SIGINT, before)
    assert opt.steps == 1 and "SGD.step was called while" in told[0]


def test_copies_are_free_of_the_call_that_made_them():
    opt = fastopt.SGD(table(), lr=0.5)
    opt.step(table())
    for own in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        own.step(table())
        assert (own.steps, opt.steps) == (2, 1)


@pytest.mark.parametrize("other", ["step", "state_dict", "save"])
def test_two_threads_with_one_optimizer_err_or_count_right(other, tmp_path):
    p = [table(), np.ones(150_000, np.float32)]
    opt = fastopt.Adam(p)
    grads = [fastopt.IndexedSlices(np.arange(50), np.ones((50, DIM), np.float32)), p[1] * 0 + 1]
    opt.step(grads)
    done, errors, unexpected = [1], [], []
    go = threading.Barrier(2)

    def work(call, counts):
        go.wait()
        for _ in range(60):
            try:
                found = call()
            except RuntimeError as error:
                errors.append(error)
            except BaseException as error:
                unexpected.append(error)
            else:
                if counts:
                    done.append(1)
                elif found is not None:  # a state of one instant
                    steps = {own["step"] for own in found["state"].values()}
                    assert steps == {found["steps"]}

    calls = {
        "step": lambda: opt.step(grads),
        "state_dict": opt.state_dict,
        "save": lambda: opt.save(tmp_path / "saved"),
    }
    threads = [
        threading.Thread(target=work, args=(calls["step"], True)),
        threading.Thread(target=work, args=(calls[other], other == "step")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not unexpected
    assert opt.steps == len(done)
    assert all("was called while another call" in str(error) for error in errors)
    twin = fastopt.Adam([table(), np.ones(150_000, np.float32)])
    for _ in done:
        twin.step([grads[0], grads[1]])
    for a, b in zip(p, twin.param_groups[0]["params"], strict=True):
        np.testing.assert_array_equal(a, b)
