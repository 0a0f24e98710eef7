"""The seam between the package and the devices: the only file that names one.

A backend is a module that has the names of :class:`Backend`. Each array chooses its own, which is loaded when
it is first used; an array of a device that no backend works on is refused.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from fastopt.kernels.rule import Rule
from fastopt.kernels.work import (
    ArrayWork,
    RowSteps,
    Segments,
    Spec,
    StoredTable,
    TableGradient,
    TableWork,
)

_MODULES = {"cpu": "fastopt.kernels.cpu.backend"}


class Launch(Protocol):
    """Work that is ready to be done: all of it was checked and placed."""

    def compile(self) -> None:
        """Have the machine code ready, which takes seconds the first time and writes nothing."""

    def run(self) -> None:
        """Do it."""


class DenseLaunch(Protocol):
    """A dense update, which is kept from step to step.

    numbers: float64 [class, fields of the rule's and the weight decay's hyperparameters]; what the caller
    writes there the next run uses.
    """

    numbers: np.ndarray

    def place(self, parameters: np.ndarray, gradients: np.ndarray) -> None:
        """Take over the addresses of the parameters and of their gradients."""

    def set_keys(self, keys: list[int]) -> None:
        """Set the key of the random bits of each class."""

    def prepare(self, zero_grads: bool) -> None:
        """Have the machine code ready for a run, which sets gradients to zero if ``zero_grads``."""

    def run(self) -> None:
        """Update the parameters and their state."""


class Locator(Protocol):
    """Finds the addresses of an optimizer's parameters and of their dense gradients, in bulk."""

    def expect(self, dtypes: Sequence[np.dtype | None]) -> None:
        """Expect dense gradients of these dtypes, and none for None."""

    def unchanged(self, parameters: list | tuple, gradients: list | tuple, writeable: bool) -> bool:
        """Read all addresses; returns whether all arrays are recognised, and lie where they lay at the last
        read."""

    def parameters(self, values: Sequence[Any]) -> tuple[np.ndarray, list[int]]:
        """The addresses last read, and the positions of those that were not recognised."""

    def gradients(self, values: Sequence[Any]) -> tuple[np.ndarray, list[int]]:
        """The same of gradients."""


class Squares(Protocol):
    """Sums of squares of arrays, which are kept from step to step."""

    def sum(self, addresses: np.ndarray, scale: float) -> float:
        """The sum of squares of all arrays, which lie at ``addresses``, times ``scale**2``."""


class History(Protocol):
    """The steps of a table since some of its rows are behind (``rows="dense"``).

    base: the step before its first; now: its last step; lrs: float64, their learning rates; kind: how missed
    steps are made up for, the type of a launch's mode; full: whether it holds as many as it can.
    """

    MOST_STEPS: int

    def __init__(self, rule: Rule, decay: type, options: dict[str, Any], base: int) -> None: ...

    base: int
    now: int
    kind: type

    @property
    def lrs(self) -> np.ndarray: ...

    @property
    def full(self) -> bool: ...

    def advance(self, lr: float) -> None:
        """Take in the next step; raises ValueError where ``lr * weight_decay`` is too large for it."""

    def of_rows(self, last_step: np.ndarray, rows: int, compute: np.dtype) -> RowSteps:
        """What a launch needs to know for ``rows`` of the table's rows."""


class Identities(Protocol):
    """Which objects a list held."""

    def are_those_of(self, values: list) -> bool:
        """Whether ``values`` holds the same objects in the same order."""


class Backend(Protocol):
    """What a device offers. Arrays that are passed and returned lie in its memory."""

    # Memory
    empty: Callable[[int | tuple[int, ...], Any], np.ndarray]
    zeros: Callable[[tuple[int, ...], np.dtype], np.ndarray]
    address: Callable[[np.ndarray], int]
    Locator: Callable[..., Locator]
    Identities: Callable[[list], Identities]

    # Indices
    bounds: Callable[[np.ndarray], tuple[int, int]]
    segments_of: Callable[[Sequence[tuple[np.ndarray, int]]], list[Segments]]

    # Updates
    ArraysLaunch: Callable[[Spec, Sequence[ArrayWork], int], DenseLaunch]
    MatrixLaunch: Callable[[Spec, ArrayWork], DenseLaunch]
    update_rows: Callable[[Spec, Sequence[TableWork]], Launch]
    catch_up: Callable[[Spec, StoredTable, RowSteps, int, np.ndarray | None], Launch]
    History: type[History]
    Lazy: type
    PerRow: type

    # Norms and clipping
    Squares: Callable[..., Squares]
    sum_squares_rows: Callable[[Sequence[TableGradient], float], float]
    scale: Callable[[np.ndarray, float], None]
    clip: Callable[[np.ndarray, float], None]
    coalesce: Callable[[np.ndarray, Segments], None]

    # Rows
    widen: Callable[[np.ndarray], np.ndarray]
    reblock: Callable[..., None]
    gather: Callable[[np.ndarray, np.ndarray], np.ndarray]
    pool: Callable[..., np.ndarray]
    pool_max: Callable[..., tuple[np.ndarray, np.ndarray]]
    bags_of_positions: Callable[..., np.ndarray]
    take: Callable[[np.ndarray, Segments], np.ndarray]
    row_products: Callable[..., np.ndarray]
    limit_norms: Callable[[np.ndarray, np.ndarray, float], None]


@functools.cache
def _load(name: str) -> Backend:
    backend: Any = importlib.import_module(_MODULES[name])
    return backend


def host() -> Backend:
    """The backend of NumPy arrays, in whose memory Python's own objects lie too."""
    return _load("cpu")


def backend_of(value: Any, label: str) -> Backend:
    """The backend that works where ``value`` lies: a NumPy array, a torch tensor, a table in files.

    Raises:
        TypeError: there is none for that device.
    """
    if isinstance(value, np.ndarray):
        return host()
    torch = sys.modules.get("torch")  # loaded, if a tensor is at hand
    if torch is not None and isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise TypeError(f"{label} is on {value.device}: expected a tensor on the CPU, pass {label}.cpu()")
    elif hasattr(value, "__cuda_array_interface__"):
        raise TypeError(
            f"{label} is a CUDA array: expected an array in the CPU's memory, copy it there first"
        )
    return host()
