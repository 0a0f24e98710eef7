"""The devices whose backends are tested, and how a test gets its arrays there and back."""

from typing import Any

import numpy as np

from fastopt._core.backend import backend_of


class Watched:
    """A backend, of which is known which of its names a test asked for."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.asked: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.asked.add(name)
        return getattr(self._backend, name)


class Cpu:
    """The host, whose arrays are NumPy's.

    Another device is a class with these methods. One that knows no read-only arrays says so in
    ``has_read_only``.
    """

    has_read_only = True

    def __init__(self) -> None:
        self.backend = Watched(backend_of(self.put(np.zeros(1)), "array"))

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


DEVICES = [Cpu]
