"""The devices that tests run on, and how a test gets its arrays there and back."""

import functools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gpu.interpreted import Interpreted, Lent

from fastopt._core.backend import backend_of
from fastopt.kernels.cuda import driver
from fastopt.kernels.cuda.array import DeviceArray, upload


def bits(array: np.ndarray) -> np.ndarray:
    """The bits of an array as bytes, every NaN with the same: processors make NaNs of different bits."""
    if array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16:
        array = np.where(np.isnan(array), array.dtype.type(np.nan), array)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class Cpu:
    """The host, whose arrays are NumPy's."""

    has_read_only = True

    @staticmethod
    def put(array: np.ndarray) -> Any:
        """A copy of ``array`` in the device's memory."""
        return np.array(array, order="C")

    @staticmethod
    def get(array: Any) -> np.ndarray:
        """A copy of an array of the device as one of NumPy."""
        return np.array(array)

    @staticmethod
    def read_only(array: Any) -> Any:
        """The same memory, as an array that can't be written."""
        view = array.view()
        view.flags.writeable = False
        return view

    @staticmethod
    def tensor(array: np.ndarray) -> Any:
        """A copy of ``array`` as a torch tensor in the device's memory."""
        import torch

        return torch.from_numpy(array.copy())


class _Cuda:
    """A CUDA device. Its own arrays are DeviceArrays; ``lend`` makes one that offers the array interface."""

    has_read_only = True

    @staticmethod
    def put(array: np.ndarray) -> DeviceArray:
        return upload(0, np.asarray(array))

    @staticmethod
    def get(array: Any) -> np.ndarray:
        return array.copy_to_host()

    @staticmethod
    def read_only(array: DeviceArray) -> DeviceArray:
        return array.read_only()


@functools.cache
def _interpreted() -> Interpreted:
    """The one of this process: kernels that were loaded belong to it."""
    return Interpreted()


class InterpretedCuda(_Cuda):
    """One whose kernels are interpreted."""

    def __init__(self) -> None:
        self.driver = _interpreted()
        driver.use(self.driver)

    def lend(self, array: np.ndarray) -> Lent:
        """``array`` itself, as a library's array on the device; what is written there is seen in it."""
        return Lent(self.driver, array)


class RealCuda(_Cuda):
    """The first device of this machine."""

    def __init__(self) -> None:
        # One that is interpreted, put there by another test of this process, is none.
        assert not isinstance(driver.driver(), Interpreted), "run tests of a GPU in a process of their own"

    @staticmethod
    def tensor(array: np.ndarray) -> Any:
        import torch

        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).to("cuda").view(torch.bfloat16)
        return torch.from_numpy(array.copy()).to("cuda")


INTERPRETED = pytest.param(InterpretedCuda, marks=pytest.mark.interpreted, id="interpreted")
REAL = pytest.param(RealCuda, marks=pytest.mark.gpu, id="gpu")
CUDA = [INTERPRETED, REAL]
ALL = [pytest.param(Cpu, id="cpu"), *CUDA]


class Watched:
    """A backend, of which is known which of its names a test asked for."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.asked: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.asked.add(name)
        return getattr(self._backend, name)


def watched(device: Any) -> Watched:
    """The backend of a device."""
    return Watched(backend_of(device.put(np.zeros(1)), "array"))
