"""Which rank has which table: a plan by which the slowest rank's step takes little time."""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import torch

from fastopt.distributed.filling import ROWS, WHOLE, Filling, Known, known
from fastopt.distributed.loads import MACHINE, STEP, Machine, Size, Step
from fastopt.distributed.plans import Plan

_ROOM = 1.1  # how much a rank may hold, over the mean
_EVEN = 1.1  # lookups over the mean, below which they are even enough
_SLOWER = 1.1  # how much longer a step may take for lookups that are more even
_TRIED = 12  # numbers of tables that are split


def sizes_of(
    tables: Mapping[str, torch.nn.EmbeddingBag],
    features: Mapping[str, Sequence[str]] | None = None,
    lookups: Mapping[str, float] | None = None,
    popularity: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Size]:
    """What a planner has to know of tables; arguments as for :func:`plan`."""
    features, lookups, popularity = features or {}, lookups or {}, popularity or {}
    found = {}
    for name, table in tables.items():
        of_table = features.get(name, [name])
        found[name] = Size(
            rows=table.num_embeddings,
            columns=table.embedding_dim,
            itemsize=table.weight.element_size(),
            lookups=sum(lookups.get(feature, 1.0) for feature in of_table),
            features=len(of_table),
            mode=table.mode,
            popularity=None if name not in popularity else _checked(popularity[name], name, table),
        )
    return found


def _checked(counts: np.ndarray, name: str, table: torch.nn.EmbeddingBag) -> np.ndarray:
    """How popular rows are, adding up to 1."""
    found = np.asarray(counts, np.float64)
    if found.shape != (table.num_embeddings,):
        raise ValueError(
            f"popularity[{name!r}] has shape {found.shape}: expected ({table.num_embeddings},), one a row"
        )
    total = found.sum()
    if not (found >= 0).all() or not 0 < total < np.inf:
        raise ValueError(f"popularity[{name!r}] is not finite, negative, or 0 alone: expected counts")
    return found / total


def plan(
    tables: Mapping[str, torch.nn.EmbeddingBag],
    features: Mapping[str, Sequence[str]] | None = None,
    *,
    ranks: int,
    lookups: Mapping[str, float] | None = None,
    popularity: Mapping[str, np.ndarray] | None = None,
    columns: bool = False,
) -> Plan:
    """A plan by which the slowest rank's step is foretold to take about the least time.

    No rank holds more than a tenth above the mean, as far as tables can be split. Of the plans that take at
    most a tenth longer than the fastest, it is the fastest one whose lookups are within a tenth of the mean
    too, or the evenest, since the bandwidths that it goes by may not be this machine's. Each table goes whole
    to a rank or by rows to all, unless its mode is "max"; by columns only if that is allowed.

    Args:
        tables, features: as for :class:`ShardedEmbeddingBagCollection`; tables on the meta device do.
        ranks: how many processes there are.
        lookups: how many indices a bag of a feature has on average, by its name; 1 of those not named.
        popularity: how often each row of a table was looked up, by the table's name; of those not named, all
            rows are taken to be looked up alike.
        columns: whether tables may go by columns, which optimizers refuse that take a norm or mean of rows.

    Raises:
        ValueError: ``ranks`` is below 1, ``lookups`` names a feature that there is not, or ``popularity`` a
            table, or it has not a number from 0 on for each row.

    Example:
        >>> tables = {"a": torch.nn.EmbeddingBag(10_000, 8, device="meta"), "b": torch.nn.EmbeddingBag(10, 8)}
        >>> plan(tables, ranks=2)["a"]
        ByRows(bounds=(0, 5000, 10000))
    """
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}: expected at least 1")
    own = [feature for name in tables for feature in (features or {}).get(name, [name])]
    for argument, given, what, expected in (
        ("lookups", lookups, "feature", own),
        ("popularity", popularity, "table", [*tables]),
    ):
        unknown = [name for name in given or {} if name not in expected]
        if unknown:
            raise ValueError(f"{argument} names the {what} {unknown[0]!r}: expected some of {expected}")
    return plan_of_sizes(sizes_of(tables, features, lookups, popularity), ranks, columns=columns)


def plan_of_sizes(
    sizes: Mapping[str, Size],
    ranks: int,
    *,
    columns: bool = False,
    step: Step = STEP,
    machine: Machine = MACHINE,
) -> Plan:
    """The plan of tables of these sizes, for such steps and machines."""
    pieces = [2**k for k in range(1, 10) if 2**k <= ranks] if columns else []
    tables = [
        known(name, size, ranks, [n for n in pieces if n <= size.columns], step, machine)
        for name, size in sizes.items()
    ]
    tables.sort(key=lambda table: -table.whole)
    room = _ROOM * sum(size.bytes for size in sizes.values()) / ranks
    seconds = sum(table.whole for table in tables) / ranks
    ways = [(ROWS,), *((n,) for n in pieces), *((ROWS, n) for n in pieces)]
    filled = []
    for split, evened in product(_splits(tables, room, ways), (False, True)):
        filling = Filling(ranks, room, seconds, step, machine)
        # Those by rows come last, as they even out what the others leave.
        for table, many in sorted(zip(tables, split, strict=True), key=lambda own: own[1] == ROWS):
            filling.place(table, many, evened)
        filled.append(filling)
    missing, fastest = min(own.cost() for own in filled)
    near = [own for own in filled if own.cost() <= (missing, _SLOWER * fastest)]
    best = min(near, key=lambda own: (max(own.lookups_over_mean(), _EVEN), own.cost()))
    return Plan(best.placements, sizes, ranks)


def _splits(tables: Sequence[Known], room: float, ways: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Into how many pieces tables might be split: those that a rank has no room for, and of the others some
    number of the ones that there is most to do for."""
    counts = {round(number) - 1 for number in np.geomspace(1, len(tables) + 1, _TRIED)}
    found = (
        tuple(
            table.cheapest(allowed) if k < count or table.size.bytes > room else WHOLE
            for k, table in enumerate(tables)
        )
        for count, allowed in product(sorted(counts), ways)
    )
    return [*dict.fromkeys(found)]
