"""The seam between the package and the devices: the only file that names one.

A backend is an object with the names of :class:`Backend`: the module of the host's memory, or the object of a
device, made when the first of its arrays is met. Each array chooses its own by where it lies; an array of a
device that no backend works on is refused.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from fastopt.kernels.formats import Format
from fastopt.kernels.loaded import is_tensor, loaded
from fastopt.kernels.rule import Rule
from fastopt.kernels.work import (
    Array,
    ArrayWork,
    CountFold,
    PooledLookup,
    RowSteps,
    Segments,
    Spec,
    StoredTable,
    TableGradient,
    TableWork,
)

_HOST, _CUDA = "fastopt.kernels.cpu.backend", "fastopt.kernels.cuda.backend"
_ABOUT = "fastopt.kernels.cuda.about"
_ARRAYS, _PRODUCERS = "fastopt.kernels.cuda.array", "fastopt.kernels.cuda.producers"
_DLPACK_CUDA = 2, 13  # the types of devices, kDLCUDA and kDLCUDAManaged, in DLPack

Calls = Sequence[Callable[[], object]]  # for :meth:`Backend.run`
Factor = Any  # what :meth:`Norm.factor` returns


class Launch(Protocol):
    """Work on tables: all of it was checked and placed."""

    def prepare(self) -> Calls:
        """The calls that do it. Their machine code is ready, which takes seconds the first time; nothing that
        they change has changed yet. What they work on lives as long as the launch."""


class DenseLaunch(Protocol):
    """A dense update, which is kept from step to step.

    numbers: float64 [class, fields of the rule's and the weight decay's hyperparameters], an array of NumPy;
    what the caller writes there the next calls use.
    """

    numbers: np.ndarray

    def place(self, parameters: np.ndarray, gradients: np.ndarray) -> None:
        """Take over the addresses of the parameters and of their gradients."""

    def set_keys(self, keys: list[int]) -> None:
        """Set the key of the random bits of each class."""

    def prepare(self, zero_grads: bool, factor: Factor = None) -> Calls:
        """The calls that update the parameters and their state, and set gradients to zero if ``zero_grads``;
        as those of a :class:`Launch`.

        factor: of a :class:`Norm` of the same backend: the scale of gradients, the first number of the weight
            decay's, is times it.

        While the backend is capturing the calls only launch: numbers and keys are those that
        :meth:`refresh` brings.
        """

    def refresh(self) -> Calls:
        """The calls that bring numbers and keys to where a captured launch reads them, and launch nothing
        else."""


class Locator(Protocol):
    """Finds the addresses of an optimizer's parameters and of their dense gradients, in bulk."""

    def expect(self, dtypes: Sequence[np.dtype | None]) -> None:
        """Expect dense gradients of these dtypes, and none for None."""

    def unchanged(self, parameters: list | tuple, gradients: list | tuple, writeable: bool) -> bool:
        """Read all addresses; returns whether all arrays are recognised, or None, and lie where they lay at
        the last read."""

    def parameters(self) -> tuple[np.ndarray, list[int]]:
        """The addresses last read, and the positions of those that were not recognised."""

    def gradients(self) -> tuple[np.ndarray, list[int]]:
        """The same of gradients."""


class Squares(Protocol):
    """Sums of squares of arrays, which are kept from step to step."""

    def sum(self, addresses: np.ndarray, scale: float) -> float:
        """The sum of squares of all arrays, which lie at ``addresses``, times ``scale**2``; waits for it."""


_Squares = Squares  # which a name of Backend hides


class Norm(Protocol):
    """The L2 norm of gradients, on its way: it is read when somebody asks for it. It has memory of its own,
    so that it stays what it was however late that is; a captured one is that of the last replay."""

    def value(self) -> float:
        """The norm; waits for it. NaN or infinite where a gradient is."""

    def factor(self, grad_scale: float, max_norm: float) -> Factor:
        """What launches are to multiply the scale of gradients by, without waiting for the norm:
        ``min(1, max_norm / (grad_scale * norm + NORM_EPS))`` in float64, and NaN for a NaN norm."""


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

    def of_rows(self, last_step: Array, rows: int, compute: np.dtype) -> RowSteps:
        """What a launch needs to know for ``rows`` of the table's rows, or at most so many. ``last_step``:
        int64, of each row of the table."""


class Identities(Protocol):
    """Which objects a list held."""

    def are_those_of(self, values: list) -> bool:
        """Whether ``values`` holds the same objects in the same order."""


class Backend(Protocol):
    """What a device offers.

    Arrays of parameters, gradients, state, indices, offsets and rows lie in its memory, and have what the
    package uses of NumPy's: shape, dtype, strides, ndim, size, itemsize, nbytes, flags, reshape, views by
    numbers and slices, ``array[...] = number or array``, fill and copy. Addresses, numbers of hyperparameters
    and histories are NumPy arrays. Where nothing else is said, floating point arrays are float32 or float64,
    C-contiguous, and all of one call have the same dtype; indices are int32 or int64.

    Work of a device is asked for in order, and nothing waits for it but what says so. Where the caller
    vouches for indices (``check_indices=False``) a device leaves out those outside the table: updates skip
    them, and lookups give zeros. The host never gets such.

    device: the number of the device, -1 for the host. capturing: whether work is being put into a graph, to
    be replayed, in place of being done; False for the host.
    """

    device: int
    capturing: bool
    Locator: Callable[[Sequence[np.dtype], Sequence[tuple[int, ...]], Sequence[int]], Locator]
    # of dtypes, shapes and devices; the host's, which reads the headers of all objects
    Identities: Callable[[list], Identities]  # the host's too
    ArraysLaunch: Callable[[Spec, Sequence[ArrayWork], int], DenseLaunch]  # the last: how many classes
    MatrixLaunch: Callable[[Spec, ArrayWork], DenseLaunch]  # of a parameter with state of rows and columns
    Squares: Callable[[np.dtype, Format, Sequence[int]], Squares]  # of a format, sizes
    History: type[History]

    def run(self, calls: Iterable[Callable[[], object]]) -> None:
        """Make these calls in turn, of launches and of C, with no signal handler run between them (see
        ``fastopt.kernels.at_once``)."""

    # Arrays

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> Array:
        """An array of any content."""

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """Zeros, which begin with a cache line."""

    def zeros_beside(self, array: Array, dtypes: Sequence[np.dtype]) -> list[Array]:
        """Zeros of the shape of ``array``, one array of each dtype, placed for loops over the elements of all
        of them."""

    def address(self, array: Array) -> int:
        """The address of the first element."""

    def contiguous(self, array: Array) -> Array:
        """``array`` if it is C-contiguous, or a copy that is."""

    def from_host(self, array: np.ndarray) -> Array:
        """A copy of an array of NumPy."""

    def to_host(self, array: Array) -> np.ndarray:
        """A C-contiguous copy as an array of NumPy; waits for it."""

    def scale(self, array: Array, factor: float) -> None:
        """Multiply an array, of 16 bits too, by a number, in place."""

    def clip(self, array: Array, limit: float) -> None:
        """Clip each element, of 16 bits too, to [-limit, limit], in place."""

    def widen(self, array: Array) -> Array:
        """``array``, in float32 if it is of 16 bits. The rows of a matrix may lie apart, and are brought
        together where kernels of rows do not take such."""

    def reblock(
        self,
        kind: Format,
        codes: Array,
        scales: Array,
        new: Array,
        new_scales: Array,
    ) -> None:
        """Set ``new`` and ``new_scales`` to 8-bit codes whose blocks end with rows, of codes whose blocks do
        not."""

    # Indices

    def bounds(self, indices: Array) -> tuple[int, int]:
        """Smallest and largest of 1-D indices, which are not empty; waits for them."""

    def copies(self, parts: Sequence[Array]) -> list[tuple[Array, int, int]]:
        """C-contiguous copies of indices of any shapes, none of which is empty, each with its smallest and
        largest; waits for these."""

    def segments_of(self, parts: Sequence[tuple[Array, int]]) -> list[Segments]:
        """Segments of the 1-D indices of each table, given with how many rows it has, by one stable sort.
        They have the attributes of :class:`Segments`; a device's may have room for more than there are, and
        say how many in its own memory."""

    def all_rows(self, rows: int) -> tuple[Array, Segments]:
        """The indices that name every row once, in order, int64, and their segments."""

    def distinct_rows(self, segments: Segments) -> Array:
        """The different rows, ascending, int64, as their table counts them; waits for how many there are."""

    def counts(self, segments: Segments) -> Array:
        """How many indices there are of each of the different rows, int32; waits for how many those are."""

    # Bags

    def bag_offsets(
        self, offsets: Array, size: int, with_last: bool, check: bool = True
    ) -> tuple[Array, tuple[int, int, int] | None]:
        """int64 [bags + 1]: 1-D ``offsets``, int32 or int64, followed by ``size``, the number of indices; or
        a copy of them as they are where they come ``with_last``, and are not empty. Offsets may be strided.
        Then what is found of the copy, for which a device waits: its first and its last, and the position of
        the first that is larger than the next, or -1. None where a device is not to ``check`` them."""

    def regular_offsets(self, bags: int, width: int) -> Array:
        """int64 [bags + 1]: the offsets of bags of ``width`` indices each."""

    def bags_of_positions(
        self,
        offsets: Array,
        indices: Array,
        scales: Array | None,
        mean: bool,
        padding: int,
    ) -> Array:
        """The bag of each position, int32; ``scales`` are divided by the number of the bag's rows if
        ``mean``."""

    # Rows that are read. Tables may be of 16 bits: their rows are read as float32, as which they are added.

    def gather(self, table: Array, indices: Array) -> Array:
        """The rows of ``table`` that 1-D indices name."""

    def pool(self, lookups: Sequence[PooledLookup]) -> Sequence[tuple[int, int]]:
        """Set the rows of their results to sums of rows times weights, or these divided by how many rows;
        without padding. Results are of the table's dtype; weights are float32 for one of 16 bits. The host
        returns the smallest and the largest index of each lookup, 0 and -1 of none: where these were not
        looked at, and are not all rows of the table, the result is of any content. A device has none."""

    def pool_max(self, table: Array, indices: Array, offsets: Array, padding: int) -> tuple[Array, Array]:
        """[bags, dim]: maxima, of the table's dtype, and the positions, int32, that they come from."""

    def row_products(
        self,
        table: Array,
        indices: Array,
        bags_of: Array,
        scales: Array | None,
        padding: int,
        grad_output: Array,
    ) -> Array:
        """The product of each position's row with its bag's ``grad_output``, times its scale; 0 for
        ``padding``. All but the table are of the dtype computed with, as is the result."""

    def take(self, values: Array, segments: Segments) -> Array:
        """The 1-D ``values``, one for each position, in the order of the segments."""

    # Positions of several gradients, brought together

    def shift(self, numbers: Array, by: int) -> None:
        """Add a whole number to each of the 1-D int32 ``numbers``, in place."""

    def without(self, indices: Array, row: int, *values: Array | None) -> tuple[Any, ...]:
        """1-D ``indices`` that do not name ``row``, followed by what ``values``, 1-D or None, have at their
        positions. A device keeps all positions, and has those that named ``row`` name no row of the table."""

    def won_rows(self, values: Array, bags_of: Array, winners: Array, out: Array) -> None:
        """Set row k of ``out`` to those elements of ``values``, of the row ``bags_of[k]``, whose ``winners``
        are k, and to zeros elsewhere."""

    # Rows that change

    def update_rows(self, spec: Spec, works: Sequence[TableWork], factor: Factor = None) -> Launch:
        """The update of the rows that gradients name, each once, of tables that share ``spec``; ``factor`` as
        for :meth:`DenseLaunch.prepare`."""

    def catch_up(
        self, spec: Spec, stored: StoredTable, row_steps: RowSteps, step: int, segments: Segments | None
    ) -> Launch:
        """Have the rows of segments, or all, take the steps that they missed, up to the history's last."""

    def counted_steps(self, counts: Array, segments: Segments, fold: CountFold, steps: int) -> RowSteps:
        """What a launch needs where rows count their own updates: ``counts``, int64 of each row of the table,
        and what ``fold`` makes of the counts that the rows of ``segments`` have after their next update. No
        row has had more than ``steps``."""

    def limit_norms(self, table: Array, segments: Segments, max_norm: float) -> None:
        """Scale those of the rows of segments whose norm is above ``max_norm`` down to it, in place."""

    def coalesce(self, values: Array, segments: Segments) -> None:
        """Put the sum of a segment's values in the place of its first, and zeros in those of the others."""

    # Norms

    def sum_squares_rows(self, gradients: Sequence[TableGradient], scale: float) -> float:
        """The sum of squares of the gradients of all rows, times ``scale**2``; waits for it."""

    def norm(
        self, squares: Sequence[tuple[_Squares, np.ndarray]], gradients: Sequence[TableGradient]
    ) -> Norm | None:
        """The norm of dense gradients, each :class:`Squares` with its addresses, and of gradients by rows,
        which may have different dtypes; None where sums are at hand at once, and are asked for instead.

        Its bits are those of the root of the sums, added in this order, and where there is float64 in another
        unit if they leave its range (see ``fastopt._step.norms``). While the backend is capturing it takes no
        new memory."""


def host() -> Backend:
    """The backend of NumPy arrays, in whose memory Python's own objects lie too."""
    return backend_at(-1)


@functools.cache
def backend_at(device: int) -> Backend:
    """The backend of a device, -1 for the host."""
    if device < 0:
        module: Any = importlib.import_module(_HOST)
        return module
    return importlib.import_module(_CUDA).Cuda(device, host())


def backend_of(value: Any, label: str = "array") -> Backend:
    """The backend that works where ``value`` lies: a NumPy array, a torch tensor, an array of a device, a
    table in files.

    Raises:
        TypeError: there is none for that device.
        RuntimeError: what it takes to use the device is missing.
    """
    if isinstance(value, np.ndarray):
        return host()
    found = device_array(value, label)
    return host() if found is None else backend_at(found.device)


def device_array(value: Any, label: str = "array") -> Array | None:
    """An array over the same memory, as the backend of its device takes it; None if ``value`` lies on none.

    Raises:
        TypeError, RuntimeError: as for :func:`backend_of`.
    """
    arrays: Any = sys.modules.get(_ARRAYS)  # loaded, if one of its arrays is at hand
    if arrays is not None and type(value) is arrays.DeviceArray:
        return value
    if not _lies_on_cuda(value, label):
        return None
    try:
        return importlib.import_module(_PRODUCERS).device_array(value)
    except ImportError as error:
        raise RuntimeError(
            f"{label} lies on a CUDA device, and a package is missing that it takes to use it ({error}): "
            'pip install "fastopt[cuda13]", or copy it to the host'
        ) from error
    except RuntimeError as error:  # no driver, or a package of its own is missing; it says how to get it
        raise type(error)(f"{label} lies on a CUDA device: {error}") from error


def _lies_on_cuda(value: Any, label: str) -> bool:
    """Whether an array may lie on a CUDA device, found without a look at any driver."""
    if isinstance(value, np.ndarray):
        return False
    if is_tensor(value):
        if value.device.type not in ("cpu", "cuda"):
            raise TypeError(
                f"{label} is on {value.device}: expected a tensor on the CPU or on a CUDA device; move a "
                "model there by model.cpu() or model.cuda() before its optimizer is built, other tensors by "
                ".cpu() or .cuda()"
            )
        return value.device.type == "cuda"
    if hasattr(value, "__cuda_array_interface__"):
        return True
    of_dlpack = getattr(value, "__dlpack_device__", None)
    return of_dlpack is not None and of_dlpack()[0] in _DLPACK_CUDA


def about() -> Iterator[tuple[str, str]]:
    """Lines for a person on what the host and its devices offer: what, and how it is here."""
    yield from importlib.import_module(_HOST).about()
    try:
        lines = importlib.import_module(_ABOUT).about()
    except ImportError as error:
        yield "CUDA", f'{error}: pip install "fastopt[cuda13]"'
    else:
        yield from lines


def device_name(device: int) -> str:
    """What messages call a device."""
    return "the CPU" if device < 0 else f"cuda:{device}"


def moved(value: Any, label: str, device: int) -> str:
    """The expression that makes a copy of an array called ``label`` on a device."""
    if is_tensor(value):
        return f"{label}.cpu()" if device < 0 else f'{label}.to("cuda:{device}")'
    if device < 0:
        return f"{label}.copy_to_host()" if hasattr(value, "copy_to_host") else f"cupy.asnumpy({label})"
    if loaded("torch") is not None:
        return f'torch.as_tensor({label}, device="cuda:{device}")'
    return f"cupy.asarray({label}), with device {device} the current one"
