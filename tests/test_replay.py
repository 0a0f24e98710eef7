"""Steps that are captured in a graph and replayed, on a device that records."""

import numpy as np
import pytest
from recorded_device import put_on_devices

import fastopt


@pytest.fixture
def device(monkeypatch):
    return put_on_devices(monkeypatch)[0]


def some_arrays(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in (7, (3, 5), 300)]


def gradients_of(step):
    return [100 * array for array in some_arrays(step + 1)]


def set_to(grads, values):
    for own, value in zip(grads, values, strict=True):
        own[...] = value


OPTIMIZERS = [
    lambda params: fastopt.AdamW(params, lr=1e-2 * fastopt.schedules.cosine(9), weight_decay=0.1),
    lambda params: fastopt.Adam(params, lr=1e-2, state_dtype="bfloat16", seed=3, weight_decay=0.1),
    lambda params: fastopt.SGD(
        [{"params": params[:2], "lr": 0.5}, {"params": params[2:], "weight_decay": 0.1}], lr=0.1, momentum=0.9
    ),
]
ARGUMENTS = [
    {},
    {"clip_norm": 3.0, "grad_scale": 0.5},
    {"clip_value": 0.2, "zero_grads": True},
    {"norm": True, "grad_scale": 0.5},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("make", OPTIMIZERS, ids=["adamw", "adam", "sgd"])
def test_replays_have_the_bits_of_ordinary_steps(monkeypatch, make, arguments):
    expected = some_arrays()
    ordinary = make(expected)
    infos = []
    for step in range(7):
        infos.append(ordinary.step(gradients_of(step), **arguments))

    device = put_on_devices(monkeypatch)[0]
    params, grads = some_arrays(), gradients_of(0)
    optimizer = make(params)
    first = optimizer.step(grads, **arguments)
    before, uploads = [array.copy() for array in params], device.uploads
    captured = device.capture(lambda: optimizer.step(grads, **arguments))
    np.testing.assert_equal(params, before)
    assert (optimizer.steps, device.uploads) == (1, uploads)
    assert first == infos[0]

    for step in range(1, 7):
        set_to(grads, gradients_of(step))
        if step == 4:  # ordinary steps may come between
            assert optimizer.step(grads, **arguments) == infos[step]
            continue
        optimizer.before_replay()
        device.replay()
        assert optimizer.steps == step + 1
        assert captured == infos[step] and captured.lr == infos[step].lr
        if "zero_grads" in arguments:
            assert not any(array.any() for array in grads)
    for own, other in zip(params, expected, strict=True):
        np.testing.assert_array_equal(own, other)
    states = optimizer.state_dict()["state"].values(), ordinary.state_dict()["state"].values()
    for own, other in zip(*states, strict=True):
        np.testing.assert_equal(own, other)


def test_changed_learning_rates_go_into_replays(device, monkeypatch):
    params, grads = [np.ones(4)], [np.ones(4)]
    optimizer = fastopt.SGD(params, lr=0.5)
    optimizer.step(grads)
    device.capture(lambda: optimizer.step(grads))
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.before_replay()
    device.replay()
    np.testing.assert_array_equal(params[0], 0.25)


def test_norms_that_clip_nothing_are_read_when_they_are_asked_for(device):
    params = [np.zeros(2)]
    optimizer = fastopt.SGD(params, lr=1.0)
    info = optimizer.step([np.array([3.0, 4.0])], norm=True, grad_scale=0.5)
    assert device.norms[-1].reads == 0
    np.testing.assert_array_equal(params[0], [-1.5, -2.0])
    assert info == (2.5, False, False, None) and info.lr == 1.0
    assert device.norms[-1].reads == 1
    optimizer.step([np.array([3.0, 4.0])])
    assert len(device.norms) == 1  # which nobody asked for


def test_norms_are_read_when_they_are_asked_for(device):
    optimizer, grads = fastopt.SGD([np.zeros(2)], lr=1.0), [np.array([3.0, 4.0])]
    info = optimizer.step(grads, clip_norm=2.5)
    assert device.norms[-1].reads == 0
    np.testing.assert_allclose(optimizer.param_groups[0]["params"][0], [-1.5, -2.0], rtol=1e-6)
    assert info == (5.0, True, False, None)
    assert device.norms[-1].reads == 1

    skipped = optimizer.step([np.array([1.0, np.inf])], clip_norm=2.5, skip_nonfinite=True)
    assert skipped == (np.inf, False, True, 0)
    assert optimizer.steps == 1
    again = optimizer.step([np.array([0.6, 0.8])], clip_norm=2.5, skip_nonfinite=True)
    assert again == (pytest.approx(1.0), False, False, None)


def test_gradients_by_rows_are_clipped_by_the_norm_on_its_way(monkeypatch):
    def trained():
        params = some_arrays()
        optimizer = fastopt.Adam(params, lr=0.1)
        for step in range(3):
            grads = gradients_of(step)
            grads[1] = fastopt.IndexedSlices(np.array([2, 0, 2, 2]), np.repeat(grads[1][:2], 2, axis=0))
            info = optimizer.step(grads, clip_norm=2.0, grad_scale=0.5)
            assert info.clipped
        return params, info.norm

    want = trained()
    device = put_on_devices(monkeypatch)[0]
    np.testing.assert_equal(trained(), want)
    assert [norm.reads for norm in device.norms] == [1, 1, 2]


def test_a_norm_over_two_devices_is_that_of_all(monkeypatch):
    put_on_devices(monkeypatch, lambda array: array.size % 2, devices=(0, 1))
    params = [np.zeros(2), np.zeros(1)]
    info = fastopt.SGD(params, lr=1.0).step([np.array([2.0, 1.0]), np.array([2.0])], clip_norm=1.5)
    assert info == (3.0, True, False, None)
    np.testing.assert_allclose(np.concatenate(params), [-1.0, -0.5, -1.0], rtol=1e-6)


def refused(device, optimizer, grads, match, **arguments):
    before = [parameter.copy() for group in optimizer.param_groups for parameter in group["params"]]
    steps, launched = optimizer.steps, device.graph
    with pytest.raises(RuntimeError, match=rf"can't be captured in a graph: .*{match}.* one ordinary step"):
        device.capture(lambda: optimizer.step(grads, **arguments))
    np.testing.assert_equal(before, [p for group in optimizer.param_groups for p in group["params"]])
    assert optimizer.steps == steps
    assert not launched
    with pytest.raises(RuntimeError, match="no step to replay"):
        optimizer.before_replay()


NEW = "no step before it had its arrays"


def test_steps_that_would_do_more_than_launch_are_not_captured(device):
    params, grads = some_arrays(), gradients_of(0)
    optimizer = fastopt.SGD(params, lr=0.1, momentum=0.9)
    refused(device, optimizer, grads, NEW)
    optimizer.step(grads)
    refused(device, optimizer, gradients_of(0), NEW)
    optimizer.step(grads)
    refused(device, optimizer, [*grads[:2], None], NEW)
    optimizer.step(grads)
    refused(device, optimizer, grads, NEW, norm=True)
    optimizer.step(grads, norm=True)
    refused(device, optimizer, grads, NEW, clip_norm=1.0)
    optimizer.step(grads, clip_norm=1.0, skip_nonfinite=True)
    refused(device, optimizer, grads, NEW, clip_norm=1.0)
    optimizer.step(grads)
    refused(device, optimizer, grads, "skip_nonfinite waits", skip_nonfinite=True)
    optimizer.step(grads)
    optimizer.param_groups[0]["momentum"] = 0.5
    refused(device, optimizer, grads, NEW)
    optimizer.step(grads)
    device.capture(lambda: optimizer.step(grads))
    optimizer.before_replay()


def test_gradients_by_rows_are_not_captured(device):
    optimizer = fastopt.SGD([np.ones((3, 2))], lr=0.1)
    grads = [fastopt.IndexedSlices(np.array([1]), np.ones((1, 2)))]
    optimizer.step(grads)
    refused(device, optimizer, grads, r"grads\[0\] is by rows")

    optimizer = fastopt.SGD([np.ones((3, 2))], lr=0.1, clip_row_norm=1.0)
    optimizer.step([np.ones((3, 2))])
    refused(device, optimizer, [np.ones((3, 2))], "some gradients are by rows")

    optimizer, grads = fastopt.SGD([np.ones((3, 2))], lr=0.1, rows="dense"), [np.ones((3, 2))]
    optimizer.step(grads)
    refused(device, optimizer, grads, "rows='dense'")


def test_all_devices_have_to_capture(monkeypatch):
    devices = put_on_devices(monkeypatch, lambda array: array.size % 2, devices=(0, 1))
    params, grads = [np.zeros(2), np.zeros(1)], [np.ones(2), np.ones(1)]
    optimizer = fastopt.SGD(params, lr=1.0)
    optimizer.step(grads)
    refused(devices[0], optimizer, grads, "do not lie on a device that captures")
    optimizer.step(grads, clip_norm=1.0)
    with pytest.raises(RuntimeError, match="norm over several devices"):
        devices[0].capture(lambda: devices[1].capture(lambda: optimizer.step(grads, clip_norm=1.0)))
    optimizer.step(grads)
    devices[0].capture(lambda: devices[1].capture(lambda: optimizer.step(grads)))
    before = [array.copy() for array in params]
    optimizer.before_replay()
    devices[0].replay()
    devices[1].replay()
    for array, old in zip(params, before, strict=True):
        np.testing.assert_array_equal(array, old - 1.0)


@pytest.mark.parametrize("change", ["options", "moved", "kinds", "load", "nothing"])
def test_what_changes_a_step_drops_the_captured_one(device, change):
    params, grads = some_arrays(), gradients_of(0)
    optimizer = fastopt.SGD(params, lr=0.1, momentum=0.9)
    optimizer.step(grads)
    device.capture(lambda: optimizer.step(grads))
    if change == "options":
        optimizer.param_groups[0]["momentum"] = 0.5
    elif change == "moved":
        optimizer.step(gradients_of(0))
    elif change == "kinds":
        optimizer.step([*grads[:2], None])
        optimizer.step(grads)
    elif change == "load":
        optimizer.load_state_dict(optimizer.state_dict())
    if change == "nothing":
        optimizer.before_replay()
        return
    steps = optimizer.steps
    with pytest.raises(RuntimeError, match=r"no step to replay: .*capture opt.step"):
        optimizer.before_replay()
    assert optimizer.steps == steps


def test_there_is_nothing_to_replay_without_a_capture():
    optimizer = fastopt.SGD([np.ones(2)], lr=0.1)
    optimizer.step([np.ones(2)])
    with pytest.raises(RuntimeError, match="no step to replay"):
        optimizer.before_replay()
