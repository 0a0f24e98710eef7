"""Steps that are captured on a CUDA device, and replayed, have the bits of ordinary steps there."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from devices import INTERPRETED

import fastopt
from gpu import interpreted


class Graph:
    """What an interpreted device is asked to do while it captures. Only launches are allowed then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, on: Any) -> None:
        self._patch, self._driver = monkeypatch, on.driver
        self._launches: list[tuple] = []

    def capture(self, call: Any) -> Any:
        """What ``call`` returns, its launches kept."""

        def refused(*args: Any) -> None:
            raise AssertionError("this ends the capture")

        with self._patch.context() as patch:
            patch.setattr(self._driver, "capturing", lambda device: True)
            patch.setattr(interpreted, "launch", lambda *args: self._launches.append(args))
            for name in ("upload", "download", "allocate", "load", "copy", "zero", "synchronize"):
                patch.setattr(self._driver, name, refused)
            return call()

    def replay(self) -> None:
        for args in self._launches:
            interpreted.launch(*args)


def gradients(step: int, dtype: Any) -> list[np.ndarray]:
    rng = np.random.default_rng(step)
    return [(rng.standard_normal(shape) * 3).astype(dtype) for shape in ((5, 7), (301,))]


RUNS = [
    (fastopt.AdamW, {"lr": 1e-2 * fastopt.schedules.cosine(9), "weight_decay": 0.1}, np.float32),
    (fastopt.Adam, {"lr": 1e-2, "state_dtype": "8bit", "weight_decay": 0.1}, np.float64),
    (fastopt.SGD, {"lr": 0.1, "momentum": 0.9, "state_dtype": "bfloat16"}, ml_dtypes.bfloat16),
    (fastopt.LAMB, {"lr": 1e-2}, np.float32),
    (fastopt.Adafactor, {"lr": 1e-2, "weight_decay": 0.1}, np.float32),
]
ARGUMENTS = {"clip_norm": 2.0, "grad_scale": 0.5}, {"zero_grads": True}


def trained(on: Any, graph: Graph | None, run: tuple, arguments: dict) -> tuple:
    """Norms, parameters and state after four steps, those after the first replayed if there is a graph."""
    make, options, dtype = run
    params, grads = ([on.put(array) for array in gradients(seed, dtype)] for seed in (100, 0))
    optimizer = make(params, **options)
    norms = [optimizer.step(grads, **arguments).norm]
    captured = graph and graph.capture(lambda: optimizer.step(grads, **arguments))
    for step in range(1, 4):
        for own, values in zip(grads, gradients(step, dtype), strict=True):
            own[...] = values
        if graph is None:
            norms.append(optimizer.step(grads, **arguments).norm)
            continue
        optimizer.before_replay()
        graph.replay()
        norms.append(captured.norm)
    assert [not on.get(array).any() for array in grads] == [arguments.get("zero_grads", False)] * 2
    assert optimizer.steps == 4
    return norms, [on.get(array) for array in params], optimizer.state_dict()["state"]


@pytest.mark.parametrize("device", [INTERPRETED])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=["clipped", "cleared"])
@pytest.mark.parametrize("run", RUNS, ids=[run[0].__name__ for run in RUNS])
def test_replays_have_the_bits_of_ordinary_steps(monkeypatch, device, run, arguments):
    on = device()
    ordinary = trained(on, None, run, arguments)
    np.testing.assert_equal(trained(on, Graph(monkeypatch, on), run, arguments), ordinary)
