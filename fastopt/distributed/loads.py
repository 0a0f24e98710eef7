"""What a step of sharded tables sends over the network and moves in memory, from how popular rows are.

docs/scaling.md has the formulas. They are expectations over batches whose indices are drawn independently;
what is sent is what the messages of requests.py and lookup.py hold, up to the bytes that align their arrays.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fastopt.distributed.placement import ByRows
from fastopt.distributed.planner import Plan

_INT32, _INT64, _FLOAT32 = 4, 8, 4  # bytes
EXCHANGES = 4  # in a step: how much is asked, what, results, gradients


class Use(NamedTuple):
    """How a table is looked up.

    popularity: float64 [rows], the probability of each row. features: how many look it up. lookups: indices
    of a bag of each of them. factors: whether each index has a factor, as with weights and, by rows, in the
    mode "mean".
    """

    popularity: np.ndarray
    features: int = 1
    lookups: float = 1.0
    factors: bool = False


class Loads(NamedTuple):
    """Of each rank, float64 [ranks].

    requests, gradients: bytes that each rank sends to this one. results: bytes that it sends to each rank.
    lookups: rows that it reads for all ranks; of a table by rows each once for a rank. memory: bytes that it
    reads and writes.
    """

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


class Machine(NamedTuple):
    """network: bytes a second that a rank sends, and gets at once. memory: bytes a second. message: seconds
    that each message costs beside its bytes."""

    network: float
    memory: float
    message: float


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


def loads(
    plan: Plan, uses: Mapping[str, Use], bags: int, *, state: int, itemsize: int | None = None
) -> Loads:
    """What a step costs each rank.

    Args:
        plan: where tables are. uses: of each table.
        bags: of each rank.
        state: how many numbers the optimizer keeps for each of a parameter, 2 for Adam.
        itemsize: bytes of a number on the wire, None for the tables' own.
    """
    requests, results, gradients, lookups, memory = np.zeros((5, plan.ranks), np.float64)
    positions: np.ndarray
    for name, placement in plan.items():
        size, use = plan.sizes[name], uses[name]
        wire = size.itemsize if itemsize is None else itemsize
        index = _INT32 if size.rows <= np.iinfo(np.int32).max else _INT64
        drawn = bags * use.features * use.lookups
        columns = np.array([0 if part.is_empty else part.shape[1] for part in plan.parts[name]])
        has = columns > 0
        pooled = use.features * bags * columns
        if isinstance(placement, ByRows):
            bounds = [part.first_row for part in plan.parts[name]]
            share = _sums(use.popularity, bounds, has)
            distinct = _sums(_expected(use.popularity, drawn), bounds, has)
            updated = _sums(_expected(use.popularity, drawn * plan.ranks), bounds, has)
            used = use.features * bags * (1 - (1 - share) ** use.lookups)
            positions = drawn * share
            requests += index * distinct + _INT32 * (used + positions) + use.factors * _FLOAT32 * positions
            results += wire * distinct * columns
            gradients += wire * used * columns
            lookups += plan.ranks * distinct
            # Rows are read and sent; with those that come, each rank pools its own bags.
            read = 2 * plan.ranks * distinct * columns + (drawn + use.features * bags) * size.columns
        else:
            updated = has * _expected(use.popularity, drawn * plan.ranks).sum()
            positions = has * drawn
            requests += has * (_INT32 * use.features * bags + (index + use.factors * _FLOAT32) * drawn)
            results += wire * pooled
            gradients += wire * pooled
            lookups += plan.ranks * positions
            read = plan.ranks * (positions * columns + pooled)
        # The gradient of each position is read once, each row that is named read and written with its state.
        moved = plan.ranks * positions * columns + 2 * (1 + state) * updated * columns
        memory += size.itemsize * (read + moved)
    return Loads(requests, results, gradients, lookups, memory)


def times(own: Loads, machine: Machine) -> Times:
    """How long the parts of a step take on such machines, one after the other."""
    network = np.maximum(own.sent(), own.received()).max() / machine.network
    messages = EXCHANGES * (len(own.results) - 1) * machine.message
    return Times(float(network), float(own.memory.max() / machine.memory), messages)


def _expected(popularity: np.ndarray, drawn: float) -> np.ndarray:
    """How likely each row is to be among so many that are drawn."""
    return -np.expm1(drawn * np.log1p(-np.minimum(popularity, 1 - 1e-12)))


def _sums(numbers: np.ndarray, first_rows: Sequence[int], has: np.ndarray) -> np.ndarray:
    """The sums over the rows of each rank; those without rows have none."""
    before = np.concatenate([[0.0], np.cumsum(numbers)])
    bounds = [*first_rows, len(numbers)]
    return np.where(has, np.diff(before[bounds]), 0.0)
