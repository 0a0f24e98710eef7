"""Norms of gradients, which the host need not wait for."""

import math
from collections.abc import Sequence

import numpy as np

from fastopt.kernels.cuda.array import DeviceArray, check_not_captured, empty, upload
from fastopt.kernels.cuda.driver import driver
from fastopt.kernels.cuda.launch import Kernel
from fastopt.kernels.cuda.norms import (
    RESULT_FACTOR,
    RESULT_SUMS,
    RESULT_TOTAL,
    RESULT_UNIT,
    SUMMED,
    add_partials,
    find_factor,
    sum_squares,
)
from fastopt.kernels.cuda.row_norms import SEGMENTS, row_of, segments_of, sum_squares_of_rows
from fastopt.kernels.cuda.streams import current
from fastopt.kernels.formats import Format
from fastopt.kernels.work import TableGradient

MOST_BLOCKS = 2**20  # of a launch, each of which then takes several blocks of elements


class _Part:
    """A part of what is summed up, of one dtype: partial sums on the device.

    Attributes:
        device: the number of the device. is_double: whether squares may leave the range of float64.
        partials: float64.
    """

    def __init__(self, device: int, compute: np.dtype, kernel: Kernel, blocks: int) -> None:
        self.device = device
        self.is_double = compute == np.float64
        self.partials = empty(device, blocks, np.float64)
        self._kernel = kernel

    def add(self, scale: float, unit: int) -> None:
        """Find the partial sums: of elements times ``scale``, or over the unit at an address, if not 0."""
        blocks = self.partials.size
        if blocks:
            given = *self._given(), scale, unit, blocks, self.partials.address
            self._kernel.ready(self.device, min(blocks, MOST_BLOCKS), *given)()

    def _given(self) -> tuple[int, int, int]:
        """The kernel's first arguments."""
        raise NotImplementedError


class Squares(_Part):
    """Sums of squares of arrays of one format, which are kept from step to step.

    Attributes:
        kept: by how many parts are summed up, memory for the results of norms that are captured in a CUDA
            graph and begin with these squares: it lasts as long as they do.
    """

    def __init__(self, device: int, compute: np.dtype, kind: Format, sizes: Sequence[int]) -> None:
        bases = np.cumsum([0, *sizes], dtype=np.int64)
        super().__init__(device, compute, sum_squares(kind, compute), -(-int(bases[-1]) // SUMMED))
        self.kept: dict[int, DeviceArray] = {}
        self._bases = upload(device, bases)
        self._host_addresses = np.zeros(len(sizes), np.int64)
        self._addresses = upload(device, self._host_addresses)

    def place(self, addresses: np.ndarray) -> None:
        """Take over the addresses of the arrays.

        Raises:
            ValueError: they are new, and work is being captured in a graph, to which they can't be brought.
        """
        if not self.partials.size or np.array_equal(self._host_addresses, addresses):
            return
        if driver().capturing(self.device):
            raise ValueError(
                "a norm that is captured in a CUDA graph is of other gradients than the norm before it: take "
                "the norm of these, in the same memory, before the capture"
            )
        self._host_addresses[:] = addresses
        driver().upload(self.device, self._addresses.address, self._host_addresses)

    def sum(self, addresses: np.ndarray, scale: float) -> float:
        """The sum of squares of all arrays, which lie at ``addresses``, times ``scale**2``; waits for it."""
        self.place(addresses)
        return _sum(self.device, [self], [], scale)

    def _given(self) -> tuple[int, int, int]:
        return self._addresses.address, self._bases.address, self._addresses.size


class _RowSquares(_Part):
    """Sums of squares of the gradients of rows, of values of one dtype.

    Raises:
        ValueError: work is being captured in a graph.
    """

    def __init__(self, device: int, gradients: Sequence[TableGradient]) -> None:
        if driver().capturing(device):
            raise ValueError(
                "the norm of gradients by rows can't be captured in a CUDA graph, since each step has other "
                "rows: take it outside the graph"
            )
        compute = gradients[0].values.dtype
        blocks = [-(-segments_of(gradient).positions // SEGMENTS) for gradient in gradients]
        bases = np.cumsum([0, *blocks], dtype=np.int64)
        super().__init__(device, compute, sum_squares_of_rows(compute), int(bases[-1]))
        table = np.array([row_of(gradient) for gradient in gradients], np.int64)
        self._table, self._bases = upload(device, table), upload(device, bases)

    def _given(self) -> tuple[int, int, int]:
        return self._table.address, self._bases.address, len(self._table)


class Norm:
    """The L2 norm of gradients, on its way.

    Args:
        dense, rows: the parts that it is of, whose sums of squares are added in this order.
    """

    def __init__(self, device: int, dense: Sequence[Squares], rows: Sequence[_RowSquares]) -> None:
        self._captured = driver().capturing(device)
        self._result = _memory_of(device, dense, len(dense) + len(rows), self._captured)
        self._value: float | None = None
        self._factors: dict[tuple[float, float], DeviceArray] = {}
        checked = any(part.is_double for part in (*dense, *rows))
        self._stream = current(device)
        _add_up(self._result, dense, rows, 1.0, checked)

    def value(self) -> float:
        """The norm; waits for it."""
        if self._value is not None:
            return self._value
        check_not_captured(self._result.device, "what reads a norm")
        driver().wait_for(self._result.device, self._stream.handle)
        total, unit = self._result[: RESULT_UNIT + 1].tolist()
        norm = math.sqrt(total) * unit
        if not self._captured:  # else the next replay finds another
            self._value = norm
        return norm

    def factor(self, grad_scale: float, max_norm: float) -> DeviceArray:
        """What launches are to multiply the scale of gradients by: float64 [1]."""
        key = grad_scale, max_norm
        if key not in self._factors:
            if not self._factors:
                own = self._result[RESULT_FACTOR : RESULT_FACTOR + 1]
            elif self._captured:
                raise ValueError(
                    f"grad_scale and max_norm are {key}, after {[*self._factors]}: a norm that is captured "
                    "in a CUDA graph limits gradients in one way; use the same for all"
                )
            else:
                own = empty(self._result.device, 1, np.float64)
            find_factor().ready(own.device, 1, *key, self._result.address, own.address)()
            self._factors[key] = own
        return self._factors[key]


def _memory_of(device: int, dense: Sequence[Squares], parts: int, captured: bool) -> DeviceArray:
    """Memory for the result of a norm.

    That of one that is captured has been there since the norm before it, and lasts: the graph is replayed
    when nobody has the norm any more.
    """
    kept = dense[0].kept if dense else {}
    if not captured:
        if dense and parts not in kept:
            kept[parts] = empty(device, RESULT_SUMS + parts, np.float64)
        return empty(device, RESULT_SUMS + parts, np.float64)
    if parts not in kept:
        raise ValueError(
            "a norm that is captured in a CUDA graph needs memory that it can't take there: take the norm of "
            "the same gradients once before the capture"
        )
    return kept[parts]


def _add_up(
    result: DeviceArray, dense: Sequence[Squares], rows: Sequence[_RowSquares], scale: float, checked: bool
) -> None:
    """Have the device find the sum of squares of elements times ``scale``.

    checked: whether all is to be summed up once more, in the unit that this sum asks for, if that is not 1.
    """
    parts: list[_Part] = [*dense, *rows]
    device = result.device
    if not parts:
        driver().zero(device, result.address, result.nbytes)
    for again in (False, True) if checked else (False,):
        unit = result[RESULT_UNIT:].address if again else 0
        for k, part in enumerate(parts):
            part.add(scale, unit)
            own = part.partials.address, part.partials.size, k, len(dense), len(parts)
            add_partials().ready(device, 1, *own, int(checked), int(again), result.address)()


def _sum(device: int, dense: Sequence[Squares], rows: Sequence[_RowSquares], scale: float) -> float:
    """The sum of squares of elements times ``scale``; waits for it."""
    result = empty(device, RESULT_SUMS + 1, np.float64)
    _add_up(result, dense, rows, scale, checked=False)
    return float(result[RESULT_TOTAL].item())


PlacedSquares = tuple[Squares, np.ndarray]  # with the addresses of their arrays


class Norms:
    """Sums of squares and norms of a backend (see ``fastopt._core.backend``)."""

    device: int

    def Squares(self, compute: np.dtype, kind: Format, sizes: Sequence[int]) -> Squares:
        """Sums of squares of arrays of one format."""
        return Squares(self.device, compute, kind, sizes)

    def sum_squares_rows(self, gradients: Sequence[TableGradient], scale: float) -> float:
        """The sum of squares of the gradients of all rows, times ``scale**2``; waits for it."""
        return _sum(self.device, [], [_RowSquares(self.device, gradients)], scale)

    def norm(self, squares: Sequence[PlacedSquares], gradients: Sequence[TableGradient]) -> Norm:
        """The norm of dense gradients and of gradients by rows, on its way."""
        for own, addresses in squares:
            own.place(addresses)
        alike: dict[np.dtype, list[TableGradient]] = {}
        for gradient in gradients:
            alike.setdefault(gradient.values.dtype, []).append(gradient)
        rows = [_RowSquares(self.device, own) for own in alike.values()]
        return Norm(self.device, [own for own, _ in squares], rows)
