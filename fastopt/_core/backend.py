"""The seam between the package and the devices: the only file that names one.

A backend is a module that has the names of :class:`Backend`. Each array chooses its own, which is loaded when
it is first used; an array of a device that no backend works on is refused.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from fastopt.kernels.formats import Format
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


Calls = Sequence[Callable[[], object]]  # for :meth:`Backend.run`


class Launch(Protocol):
    """Work on tables: all of it was checked and placed."""

    def prepare(self) -> Calls:
        """The calls that do it. Their machine code is ready, which takes seconds the first time; nothing that
        they change has changed yet. What they work on lives as long as the launch."""


class DenseLaunch(Protocol):
    """A dense update, which is kept from step to step.

    numbers: float64 [class, fields of the rule's and the weight decay's hyperparameters]; what the caller
    writes there the next calls use.
    """

    numbers: np.ndarray

    def place(self, parameters: np.ndarray, gradients: np.ndarray) -> None:
        """Take over the addresses of the parameters and of their gradients."""

    def set_keys(self, keys: list[int]) -> None:
        """Set the key of the random bits of each class."""

    def prepare(self, zero_grads: bool) -> Calls:
        """The calls that update the parameters and their state, and set gradients to zero if ``zero_grads``;
        as those of a :class:`Launch`."""


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

    def advance(self, lr: float) -> Calls:
        """The calls that take in the next step; ValueError if ``lr * weight_decay`` is too large for it."""

    def of_rows(self, last_step: np.ndarray, rows: int, compute: np.dtype) -> RowSteps:
        """What a launch needs to know for ``rows`` of the table's rows."""


class Identities(Protocol):
    """Which objects a list held."""

    def are_those_of(self, values: list) -> bool:
        """Whether ``values`` holds the same objects in the same order."""


class Backend(Protocol):
    """What a device offers: a module with these names.

    Arrays of parameters, gradients, state, indices and rows lie in its memory; addresses, numbers of
    hyperparameters and histories are NumPy arrays. Where nothing else is said, floating point arrays are
    float32 or float64, C-contiguous, and all of one call have the same dtype.
    """

    Locator: Callable[[Sequence[np.dtype], Sequence[tuple[int, ...]]], Locator]  # of dtypes and shapes
    Identities: Callable[[list], Identities]
    ArraysLaunch: Callable[[Spec, Sequence[ArrayWork], int], DenseLaunch]  # the last: how many classes
    MatrixLaunch: Callable[[Spec, ArrayWork], DenseLaunch]  # of a parameter with state of rows and columns
    Squares: Callable[[np.dtype, Format, Sequence[int]], Squares]  # of a format, sizes
    History: type[History]

    def run(self, calls: Iterable[Callable[[], object]]) -> None:
        """Make these calls in turn, of launches and of C, with no signal handler run between them (see
        ``fastopt.kernels.at_once``)."""

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of any content."""

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Zeros, which begin with a cache line."""

    def address(self, array: np.ndarray) -> int:
        """The address of the first element."""

    def bounds(self, indices: np.ndarray) -> tuple[int, int]:
        """Smallest and largest of 1-D indices, which are not empty."""

    def segments_of(self, parts: Sequence[tuple[np.ndarray, int]]) -> list[Segments]:
        """Segments of the 1-D indices of each table, given with how many rows it has, by one stable sort."""

    def update_rows(self, spec: Spec, works: Sequence[TableWork]) -> Launch:
        """The update of the rows that gradients name, each once, of tables that share ``spec``."""

    def catch_up(
        self, spec: Spec, stored: StoredTable, row_steps: RowSteps, step: int, rows: np.ndarray | None
    ) -> Launch:
        """Have different rows, or all, take the steps that they missed, up to the history's last."""

    def sum_squares_rows(self, gradients: Sequence[TableGradient], scale: float) -> float:
        """The sum of squares of the gradients of all rows, times ``scale**2``."""

    def scale(self, array: np.ndarray, factor: float) -> None:
        """Multiply an array, of 16 bits too, by a number, in place."""

    def clip(self, array: np.ndarray, limit: float) -> None:
        """Clip each element, of 16 bits too, to [-limit, limit], in place."""

    def coalesce(self, values: np.ndarray, segments: Segments) -> None:
        """Put the sum of a segment's values in the place of its first, and zeros in those of the others."""

    def widen(self, array: np.ndarray) -> np.ndarray:
        """``array``, in float32 if it is of 16 bits."""

    def gather(self, table: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """The rows of ``table``, of 16 bits too, that 1-D indices name."""

    def pool(
        self,
        table: np.ndarray,
        indices: np.ndarray,
        offsets: np.ndarray,
        weights: np.ndarray | None,
        mean: bool,
        padding: int,
    ) -> np.ndarray:
        """[bags, dim]: sums of rows times weights, or these divided by how many rows; without ``padding``."""

    def pool_max(
        self, table: np.ndarray, indices: np.ndarray, offsets: np.ndarray, padding: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """[bags, dim]: maxima, and the positions, int32, that they come from."""

    def bags_of_positions(
        self,
        offsets: np.ndarray,
        indices: np.ndarray,
        scales: np.ndarray | None,
        mean: bool,
        padding: int,
    ) -> np.ndarray:
        """The bag of each position, int32; ``scales`` are divided by the number of the bag's rows if
        ``mean``."""

    def take(self, values: np.ndarray, segments: Segments) -> np.ndarray:
        """The 1-D ``values``, one for each position, in the order of the segments."""

    def row_products(
        self,
        table: np.ndarray,
        indices: np.ndarray,
        bags_of: np.ndarray,
        scales: np.ndarray | None,
        padding: int,
        grad_output: np.ndarray,
    ) -> np.ndarray:
        """The product of each position's row with its bag's ``grad_output``, times its scale."""

    def limit_norms(self, table: np.ndarray, rows: np.ndarray, max_norm: float) -> None:
        """Scale those of the different ``rows`` whose norm is above ``max_norm`` down to it, in place."""

    def reblock(
        self,
        kind: Format,
        codes: np.ndarray,
        scales: np.ndarray,
        new: np.ndarray,
        new_scales: np.ndarray,
    ) -> None:
        """Set ``new`` and ``new_scales`` to 8-bit codes whose blocks end with rows, of codes whose blocks do
        not."""


@functools.cache
def _load(name: str) -> Backend:
    backend: Any = importlib.import_module(_MODULES[name])
    return backend


def host() -> Backend:
    """The backend of NumPy arrays, in whose memory Python's own objects lie too."""
    return _load("cpu")


def backend_of(value: Any, label: str = "array") -> Backend:
    """The backend that works where ``value`` lies: a NumPy array, a torch tensor, a table in files.

    Raises:
        TypeError: there is none for that device.
    """
    if isinstance(value, np.ndarray):
        return host()
    torch = sys.modules.get("torch")  # loaded, if a tensor is at hand
    if torch is not None and isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise TypeError(
                f"{label} is on {value.device}: expected a tensor on the CPU; move a model there by "
                "model.cpu() before its optimizer is built, other tensors by .cpu()"
            )
    elif hasattr(value, "__cuda_array_interface__"):
        raise TypeError(
            f"{label} is a CUDA array: expected an array in the CPU's memory, copy it there first"
        )
    return host()
