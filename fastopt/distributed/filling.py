"""Ranks that are filled with one table after another, each where it costs the slowest rank least."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastopt.distributed.loads import (
    Loads,
    Machine,
    Size,
    Step,
    Sums,
    loads,
    loads_by_rows,
    over_mean,
    sums,
)
from fastopt.distributed.placement import ByColumns, ByRows, Placement, Whole

WHOLE, ROWS = 1, 0  # pieces of a table; from 2 on, by columns
_PLACES = 64  # for each rank, where the rows of one may end
_UNCOUNTED = 0.01  # of the room: places lie so far apart


class Known(NamedTuple):
    """What placing a table goes by.

    sums: before the rows where those of a rank may end. until: the seconds that the rows before each of these
    cost the rank that has them. whole: the seconds that the table costs a rank. ways: seconds of all ranks
    together, of each number of pieces that the table may be split into. evenly: bounds by which ranks have
    equally many rows.
    """

    name: str
    size: Size
    sums: Sums
    until: list[float]
    whole: float
    ways: dict[int, float]
    evenly: tuple[int, ...]

    def cost(self, placement: Placement, ranks: int, step: Step) -> Loads:
        """What a step costs each rank."""
        parts = placement.parts(ranks, self.size.rows, self.size.columns)
        return loads(self.size, placement, parts, step, self.sums)

    def cheapest(self, pieces: Sequence[int]) -> int:
        """Into which of these numbers of pieces it is split at least cost; whole, if into none."""
        return min((n for n in pieces if n in self.ways), key=lambda n: self.ways[n], default=WHOLE)


def known(name: str, size: Size, ranks: int, pieces: Sequence[int], step: Step, machine: Machine) -> Known:
    """What there is to know of a table; ``pieces``: into how many it may be split by columns."""
    many = _PLACES * ranks
    places = np.linspace(0, size.rows, min(many, size.rows) + 1).astype(np.int64)
    if size.popularity is not None:
        # Also where lookups are shared out evenly, so that each hot row has places of its own.
        before = np.cumsum(size.popularity)
        even = np.searchsorted(before, np.linspace(0, before[-1], many))
        places = np.union1d(places, np.union1d(even, even + 1).clip(max=size.rows))
    every = sums(size, places, ranks, step)
    evenly = tuple(np.linspace(0, size.rows, ranks + 1).astype(int).tolist())

    def cost(placement: Placement) -> Loads:
        return loads(size, placement, placement.parts(ranks, size.rows, size.columns), step, every)

    # Small parts cost more than they do together, as each of them sends gradients of the same bags.
    parts = loads_by_rows(size, ranks, np.diff(places), every.between(places), step)
    none = loads_by_rows(size, ranks, np.zeros(1), [np.zeros(1)] * 3, step).own_seconds(machine, ranks)
    until = np.cumsum([0.0, *(parts.own_seconds(machine, ranks) - none)])
    until *= (cost(ByRows(evenly)).own_seconds(machine, ranks) - none).sum() / (until[-1] or 1.0)
    # Rows that are never looked up are shared out too.
    until += (1e-6 * until[-1] or 1e-15) * places / max(size.rows, 1)
    ways = {n: float(cost(_by_columns(size, range(n), ranks)).seconds(machine).sum()) for n in pieces}
    if ranks > 1 and size.mode != "max":
        ways[ROWS] = float(cost(ByRows(evenly)).seconds(machine).sum())
    whole = float(cost(Whole(0)).own_seconds(machine, ranks)[0])
    return Known(name, size, every, until.tolist(), whole, ways, evenly)


class Filling:
    """Placements of tables, and what they cost ranks.

    Args:
        room: how many bytes a rank is to hold at most. seconds: what tables cost a rank on average.
    """

    def __init__(self, ranks: int, room: float, seconds: float, step: Step, machine: Machine) -> None:
        self._ranks = ranks
        self._room = room or 1.0
        self._seconds = seconds or 1.0
        self._step = step
        self._machine = machine
        self.placements: dict[str, Placement] = {}
        self._loads = Loads(*np.zeros((6, ranks)))
        self._own = np.zeros(ranks)

    def place(self, table: Known, pieces: int, evened: bool) -> None:
        """Place a table in so many pieces; ``evened``: whether bounds of rows may even out what ranks do."""
        size = table.size
        if pieces == ROWS:
            ways: list[Placement] = [ByRows(table.evenly)]
            ways += [ByRows(self._bounds(table))] if evened else []
        else:
            held, own = self._loads.held + size.bytes / pieces, self._own + table.whole / pieces
            filled = np.array([held / self._room, own / self._seconds])
            ranks = np.lexsort((filled.sum(0), filled.max(0)))[:pieces]
            ways = [Whole(int(ranks[0])) if pieces == WHOLE else _by_columns(size, ranks, self._ranks)]
        costs = [table.cost(placement, self._ranks, self._step) for placement in ways]
        after = [Loads(*map(np.add, self._loads, cost)) for cost in costs]
        best = min(range(len(ways)), key=lambda k: self._cost(after[k]))
        self.placements[table.name], self._loads = ways[best], after[best]
        self._own += costs[best].own_seconds(self._machine, self._ranks)

    def _bounds(self, table: Known) -> tuple[int, ...]:
        """Those that even out what ranks have to do, where they have room."""
        places, until = table.sums.bounds.tolist(), table.until
        last = len(places) - 1
        free = np.maximum(self._room - self._loads.held, 0) * table.size.rows / max(table.size.bytes, 1)
        free += max(table.size.rows - free.sum(), 0) / self._ranks  # where all is full, each gets a part
        wanted = np.maximum(_level(self._own, until[-1]) - self._own, 0)
        of_rest = wanted / np.maximum(wanted[::-1].cumsum()[::-1], 1e-300)
        much = of_rest * np.arange(self._ranks, 0, -1) > 0.99  # as much as the later ranks on average
        given = list(zip(of_rest.tolist(), much.tolist(), self._own.tolist(), free.tolist(), strict=True))

        def cut(least: float) -> list[int]:
            """Where the rows of each rank end, if each takes its part of the rest, or up to this much."""
            at = [0]
            for part, is_much, own, rows in given:
                first = at[-1]
                seconds = until[first] + max(part * (until[-1] - until[first]), least - own)
                end = bisect_left(until, seconds, first, last)
                skips = end - first > (1 if is_much else 0)  # a hot row goes to a rank that has little to do
                if skips and seconds - until[end - 1] < until[end] - seconds:
                    end -= 1  # which is nearer
                at.append(min(end, bisect_left(places, places[first] + rows, first, last)))
            return at

        # Ranks without room leave rows to those after them; so long as some are left at the end, those before
        # have to take more.
        low = high = 0.0
        step = _level(self._own, until[-1])
        while cut(high)[-1] < last:
            low, high = high, 2 * high + step
        while high - low > step / _PLACES:
            least = (low + high) / 2
            low, high = (low, least) if cut(least)[-1] == last else (least, high)
        return tuple(places[k] for k in cut(high))

    def cost(self) -> tuple[float, float]:
        """How much too little room there is, and the seconds of the slowest rank."""
        return self._cost(self._loads)

    def lookups_over_mean(self) -> float:
        """What the rank that looks up most looks up, over the mean."""
        return over_mean(self._loads.lookups)

    def _cost(self, loads: Loads) -> tuple[float, float]:
        missing = loads.held.max() / self._room - 1
        return max(float(missing), _UNCOUNTED), float(loads.seconds(self._machine).max())


def _level(own: np.ndarray, more: float) -> float:
    """How far the lowest rise if so much is poured over them, as water is."""
    ascending = np.sort(own)
    levels = (ascending.cumsum() + more) / np.arange(1, len(own) + 1)
    return float(levels.min())


def _by_columns(size: Size, of_ranks: Sequence[int] | np.ndarray, ranks: int) -> ByColumns:
    """Columns shared out evenly to some ranks."""
    each = np.zeros(ranks, np.int64)
    each[np.sort(of_ranks)] = np.diff(np.linspace(0, size.columns, len(of_ranks) + 1).astype(int))
    return ByColumns((0, *np.cumsum(each).tolist()))
