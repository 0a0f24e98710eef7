"""Parameters and gradients on several devices: which arrays are taken as they are, by where they lie."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from fastopt._core.backend import host

SINGLE = np.dtype(np.float32)
SHAPES = [(2, 3), (4,)]


def locator(devices):
    return host().Locator([SINGLE, SINGLE], SHAPES, devices)


def numpy_arrays():
    return [np.zeros(shape, SINGLE) for shape in SHAPES]


@pytest.mark.parametrize("expected_anew", [False, True])
def test_a_numpy_gradient_is_not_taken_for_a_parameter_on_another_device(expected_anew):
    """Its address would be one of the host's."""
    found = locator([0, -1])
    if expected_anew:
        found.expect([SINGLE, SINGLE])
    gradients = numpy_arrays()
    assert not found.unchanged([object(), np.zeros(4, SINGLE)], gradients, False)
    addresses, unknown = found.gradients()
    assert unknown == [0] and addresses[1] == host().address(gradients[1])


class Tensor:
    """What a locator asks of a torch tensor."""

    layout = "strided"

    def __init__(self, shape, device, address):
        self.shape, self.dtype = shape, "float32"
        self.is_cpu, self.is_cuda = device < 0, device >= 0
        self._device, self._address = device, address

    def get_device(self):
        return self._device

    def data_ptr(self):
        return self._address

    def numel(self):
        return math.prod(self.shape)

    def is_contiguous(self):
        return True

    def is_neg(self):
        return False


@pytest.fixture
def torch(monkeypatch):
    """A torch whose tensors lie on any device."""
    dtypes = {name: name for name in ("float32", "float64", "float16", "bfloat16")}
    nn = SimpleNamespace(Parameter=Tensor)
    module = SimpleNamespace(Tensor=Tensor, nn=nn, strided="strided", **dtypes)
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


def test_tensors_are_taken_on_the_device_of_their_parameter_alone(torch):
    found = locator([1, -1])
    where = [(1, -1), (0, -1), (-1, -1), (1, 1)]  # of the two tensors
    unknown = [[], [0], [0], [1]]
    for devices, expected in zip(where, unknown, strict=True):
        tensors = [Tensor(shape, d, 64 * (d + 2)) for shape, d in zip(SHAPES, devices, strict=True)]
        found.unchanged(tensors, tensors, False)
        for addresses, others in (found.parameters(), found.gradients()):
            assert others == expected
            for i in {0, 1} - set(expected):
                assert addresses[i] == tensors[i].data_ptr()
