"""What a step of sharded tables sends over the network and moves in memory, from how popular rows are.

docs/scaling.md has the formulas. They are expectations over batches whose indices are drawn independently;
what is sent is what the messages of requests.py and lookup.py hold, up to the bytes that align their arrays.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastopt.distributed.placement import ByRows, Part, Placement

_INT32, _INT64, _FLOAT32 = 4, 8, 4  # bytes
EXCHANGES = 4  # in a step: how much is asked, what, results, gradients


class Size(NamedTuple):
    """How large a table is, and how it is looked up.

    lookups: how many of its rows are looked up for each bag of a batch, over its features. features: how many
    these are. mode: of its pooling. weights: whether each index has one. popularity: float64 [rows], the
    probability of each row, adding up to 1; None where all have the same.
    """

    rows: int
    columns: int
    itemsize: int
    lookups: float
    features: int = 1
    mode: str = "sum"
    weights: bool = False
    popularity: np.ndarray | None = None

    @property
    def bytes(self) -> int:
        return self.rows * self.columns * self.itemsize


class Machine(NamedTuple):
    """network: bytes a second that a rank sends, and gets at once. memory: bytes a second. message: seconds
    that each message costs beside its bytes."""

    network: float = 25e9
    memory: float = 100e9
    message: float = 1e-6


class Step(NamedTuple):
    """What there is to do. bags: of each rank. state: how many numbers the optimizer keeps for each of a
    parameter, 2 for Adam. itemsize: bytes of a number on the wire, None for the tables' own."""

    bags: int = 2_048
    state: int = 2
    itemsize: int | None = None


STEP, MACHINE = Step(), Machine()


class Loads(NamedTuple):
    """Of each rank, float64 [ranks].

    held: bytes of the tables that it has. requests, gradients: bytes that each rank sends to this one.
    results: bytes that it sends to each rank. lookups: rows that it reads for all ranks; of a table by rows
    each once for a rank. memory: bytes that it reads and writes.
    """

    held: np.ndarray
    requests: np.ndarray
    results: np.ndarray
    gradients: np.ndarray
    lookups: np.ndarray
    memory: np.ndarray

    def sent(self) -> np.ndarray:
        """Bytes that each rank sends to others in a step."""
        of_others = len(self.results) - 1
        asked = self.requests + self.gradients
        return asked.sum() - asked + of_others * self.results

    def received(self) -> np.ndarray:
        """Bytes that each rank gets from others in a step."""
        of_others = len(self.results) - 1
        return of_others * (self.requests + self.gradients) + self.results.sum() - self.results

    def seconds(self, machine: Machine) -> np.ndarray:
        """How long each rank's bytes take, over the network and then in memory."""
        return np.maximum(self.sent(), self.received()) / machine.network + self.memory / machine.memory

    def own_seconds(self, machine: Machine, ranks: int) -> np.ndarray:
        """How much of that is for the parts of tables that ranks have; so much more than others have those
        that have some. What is sent and what is received count half each."""
        travel = max(ranks - 2, 0) / 2 * (self.requests + self.results + self.gradients)
        return travel / machine.network + self.memory / machine.memory


class Times(NamedTuple):
    """Seconds of a step's parts: the slowest rank's bytes over the network and in memory, and messages."""

    network: float
    memory: float
    messages: float


def power_law(rows: int, exponent: float, *, scattered: bool = True) -> np.ndarray:
    """The popularity of rows that falls as ``rank ** -exponent``: float64 [rows].

    Args:
        scattered: whether popular rows lie anywhere in the table, as by a hash, the same at each call; else
            they come first, as where ids are given by frequency.
    """
    found = np.arange(1, rows + 1, dtype=np.float64) ** -exponent
    found /= found.sum()
    return np.random.default_rng(0).permutation(found) if scattered else found


class Sums(NamedTuple):
    """Over the rows of a table before each of ``bounds``, float64: the share of the lookups, and how many
    different rows one rank, and all of them together, are expected to name in a step."""

    bounds: np.ndarray
    shares: np.ndarray
    distinct: np.ndarray
    updated: np.ndarray

    def between(self, bounds: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Shares, distinct and updated rows between some of the bounds."""
        return [np.diff(np.interp(bounds, self.bounds, numbers)) for numbers in self[1:]]


def sums(size: Size, bounds: Sequence[int] | np.ndarray, ranks: int, step: Step) -> Sums:
    """Those of a table."""
    at = np.asarray(bounds, np.int64)
    popularity = np.float64(1 / max(size.rows, 1)) if size.popularity is None else size.popularity
    drawn = step.bags * size.lookups
    never = np.log1p(-np.minimum(popularity, 1 - 1e-12))
    chances = popularity, -np.expm1(drawn * never), -np.expm1(drawn * ranks * never)
    if size.popularity is None:
        return Sums(at, *(at * chance for chance in chances))
    return Sums(at, *(np.concatenate([[0.0], np.cumsum(chance)])[at] for chance in chances))


def loads(
    size: Size, placement: Placement, parts: Sequence[Part], step: Step, known: Sums | None = None
) -> Loads:
    """What a step costs each rank for one table, of which it has these parts.

    Args:
        known: sums at the bounds of the parts and others, where they have been made before.
    """
    ranks = len(parts)
    bounds = [0, size.rows]
    if isinstance(placement, ByRows):
        bounds = [part.first_row for part in parts] + [size.rows]
    between = (known or sums(size, bounds, ranks, step)).between(bounds)
    if isinstance(placement, ByRows):
        return loads_by_rows(size, ranks, np.diff(bounds), between, step)
    columns = np.array([0 if part.is_empty else part.shape[1] for part in parts], np.float64)
    has = columns > 0
    indices = has * step.bags * size.lookups
    bags = step.bags * size.features
    # Rows are read, and pooled ones written; the gradient of each index is read, and each row that is named
    # read and written with its state.
    numbers = ranks * (2 * indices + bags) + 2 * (1 + step.state) * between[2]
    return Loads(
        held=size.itemsize * size.rows * columns,
        requests=has * _INT32 * bags + (_index(size) + size.weights * _FLOAT32) * indices,
        results=_wire(size, step) * bags * columns,
        gradients=_wire(size, step) * bags * columns,
        lookups=ranks * indices,
        memory=size.itemsize * columns * numbers,
    )


def loads_by_rows(
    size: Size, ranks: int, rows: np.ndarray, between: Sequence[np.ndarray], step: Step
) -> Loads:
    """What a step on so many ranks costs those that have so many rows. between: as of :class:`Sums`."""
    shares, distinct, updated = between
    indices, bags = step.bags * size.lookups, step.bags * size.features
    used = bags * (1 - np.maximum(1 - shares, 0) ** (size.lookups / max(size.features, 1)))
    factors = size.weights or size.mode == "mean"
    # Rows are read and sent; with those that come, each rank pools its own bags.
    read = 2 * ranks * distinct + indices + bags
    moved = ranks * indices * shares + 2 * (1 + step.state) * updated
    return Loads(
        held=size.itemsize * size.columns * rows,
        requests=_index(size) * distinct + _INT32 * used + (_INT32 + factors * _FLOAT32) * indices * shares,
        results=_wire(size, step) * size.columns * distinct,
        gradients=_wire(size, step) * size.columns * used,
        lookups=ranks * distinct,
        memory=size.itemsize * size.columns * (read + moved),
    )


def times(own: Loads, machine: Machine) -> Times:
    """How long the parts of a step take on such machines, one after the other."""
    network = np.maximum(own.sent(), own.received()).max() / machine.network
    messages = EXCHANGES * (len(own.results) - 1) * machine.message
    return Times(float(network), float(own.memory.max() / machine.memory), messages)


def over_mean(numbers: Sequence[float] | np.ndarray) -> float:
    """The largest over the mean, 1 where all are 0."""
    mean = float(np.mean(numbers))
    return float(np.max(numbers)) / mean if mean else 1.0


def _index(size: Size) -> int:
    """Bytes of an index in a message."""
    return _INT32 if size.rows <= np.iinfo(np.int32).max else _INT64


def _wire(size: Size, step: Step) -> int:
    """Bytes of a number of a result or gradient in a message."""
    return size.itemsize if step.itemsize is None else step.itemsize
