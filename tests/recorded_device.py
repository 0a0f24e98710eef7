"""A device that captures graphs, over NumPy arrays.

What is launched while it captures is recorded, and done by ``replay``. Numbers of hyperparameters have to be
brought to it, as to a device with memory of its own.
"""

import math

from fastopt._core import arrays, parameters
from fastopt._core.backend import host
from fastopt._step import norms
from fastopt.kernels.element import NORM_EPS


class Norm:
    """A norm that is found when its launch comes, and read when somebody asks."""

    def __init__(self, device, squares, gradients):
        self.reads = 0
        self._squares, self._gradients = squares, gradients
        self._found = None
        self._device = device
        device.launch(self._find)

    def _find(self):
        total = sum(squares.sum(addresses, 1.0) for squares, addresses in self._squares)
        if self._gradients:
            total += host().sum_squares_rows(self._gradients, 1.0)
        self._found = math.sqrt(total)

    def value(self):
        assert not self._device.capturing
        self.reads += 1
        return self._found

    def factor(self, grad_scale, max_norm):
        return lambda: min(1.0, max_norm / (grad_scale * self._found + NORM_EPS))


class Launch:
    """A dense update that finds numbers and keys where they were brought last."""

    def __init__(self, device, spec, works, classes):
        self._device = device
        self._inner = host().ArraysLaunch(spec, works, classes)
        self._scale_at = len(spec.h)
        self.numbers = self._inner.numbers.copy()
        self._keys = None

    def place(self, parameters_at, gradients_at):
        self._inner.place(parameters_at, gradients_at)

    def set_keys(self, keys):
        self._keys = keys

    def refresh(self):
        return [self._upload]

    def prepare(self, zero_grads, factor=None):
        device, calls = self._device, self._inner.prepare(zero_grads)

        def update():
            scale = self._brought[:, self._scale_at]
            self._inner.numbers[...] = self._brought
            self._inner.numbers[:, self._scale_at] = scale if factor is None else scale * factor()
            host().run(calls)

        launch = [lambda: device.launch(update)]
        return launch if device.capturing else [self._upload, *launch]

    def _upload(self):
        assert not self._device.capturing
        self._device.uploads += 1
        self._brought = self.numbers.copy()
        if self._keys is not None:
            self._inner.set_keys(self._keys)


class RowsLaunch:
    """An update of rows whose gradients are scaled by a factor that is known when its launch comes."""

    def __init__(self, spec, works, factor):
        self._spec, self._works, self._factor = spec, works, factor

    def prepare(self):
        return [self._update]

    def _update(self):
        at, works = len(self._spec.h), []
        for work in self._works:
            numbers = list(work.numbers)
            numbers[at] *= self._factor()
            works.append(work._replace(numbers=tuple(numbers)))
        host().run(host().update_rows(self._spec, works).prepare())


class Device:
    """What the host offers, with graphs, and norms on their way."""

    def __init__(self, number):
        self.device = number
        self.capturing = False
        self.graph = []
        self.uploads = 0
        self.norms = []

    def __getattr__(self, name):
        return getattr(host(), name)

    def ArraysLaunch(self, spec, works, classes):
        return Launch(self, spec, works, classes)

    def norm(self, squares, gradients):
        self.norms.append(Norm(self, squares, gradients))
        return self.norms[-1]

    def update_rows(self, spec, works, factor=None):
        return host().update_rows(spec, works) if factor is None else RowsLaunch(spec, works, factor)

    def launch(self, call):
        if self.capturing:
            self.graph.append(call)
        else:
            call()

    def capture(self, call):
        """What ``call`` returns, its launches recorded."""
        self.graph, self.capturing = [], True
        try:
            return call()
        finally:
            self.capturing = False

    def replay(self):
        for call in self.graph:
            call()


def put_on_devices(monkeypatch, number_of=lambda array: 0, devices=(0,)):
    """Have NumPy arrays of optimizers that are made from now on lie where ``number_of`` says."""
    made = {number: Device(number) for number in devices}
    monkeypatch.setattr(arrays, "device_of", number_of)
    monkeypatch.setattr(parameters, "backend_at", lambda number: made.get(number, host()))
    monkeypatch.setattr(norms, "backend_of", lambda array: made.get(number_of(array), host()))
    return made
