"""Which rank has which table: a plan that spreads memory and lookups evenly."""

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fastopt.distributed.placement import ByRows, Part, Placement, Whole

# A table is split that would take more than this of what a rank has on average: what is left is small enough
# for whole tables to even it out.
_LARGEST_SHARE = 0.25


class Size(NamedTuple):
    """Of a table. lookups: how many of its rows are looked up for each bag of a batch, over its features."""

    rows: int
    columns: int
    itemsize: int
    lookups: float

    @property
    def bytes(self) -> int:
        return self.rows * self.columns * self.itemsize

    @property
    def traffic(self) -> float:
        """The bytes of rows that are looked up for each bag."""
        return self.lookups * self.columns * self.itemsize


class Load(NamedTuple):
    """What a rank has to hold and to do. traffic: the bytes of rows looked up there for each bag."""

    bytes: float
    traffic: float


class Plan(Mapping[str, Placement]):
    """Where each table is, by its name.

    Args:
        placements: :class:`Whole`, :class:`ByRows` or :class:`ByColumns` of each table. sizes: of each table.
        ranks: how many there are.

    ``print(plan)`` shows it as a table, with the load of each rank.

    Raises:
        ValueError: a table has no placement, or one that does not fit; or there is none of a placement.
    """

    def __init__(self, placements: Mapping[str, Placement], sizes: Mapping[str, Size], ranks: int) -> None:
        if placements.keys() != sizes.keys():
            raise ValueError(f"plan has the tables {[*placements]}: expected {[*sizes]}")
        self.sizes = dict(sizes)
        self.ranks = ranks
        self._placements = {name: placements[name] for name in sizes}
        self.parts: dict[str, list[Part]] = {}
        for name, placement in self._placements.items():
            if not isinstance(placement, Placement):
                raise ValueError(f"plan[{name!r}] is {placement!r}: expected Whole, ByRows or ByColumns")
            try:
                self.parts[name] = placement.parts(ranks, sizes[name].rows, sizes[name].columns)
            except (ValueError, TypeError) as error:
                raise ValueError(f"plan[{name!r}] is {placement!r}: {error}") from None

    def __getitem__(self, name: str) -> Placement:
        return self._placements[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._placements)

    def __len__(self) -> int:
        return len(self._placements)

    def loads(self) -> list[Load]:
        """Of each rank, if a table's rows are looked up equally often."""
        found = []
        for rank in range(self.ranks):
            shares = [
                (size, part.shape[0] * part.shape[1] / max(size.rows * size.columns, 1))
                for size, part in ((self.sizes[name], self.parts[name][rank]) for name in self)
            ]
            found.append(
                Load(
                    sum(size.bytes * share for size, share in shares),
                    sum(size.traffic * share for size, share in shares),
                )
            )
        return found

    def balance(self) -> Load:
        """The largest load over the mean, of memory and of lookups: 1 where all ranks have the same."""
        bytes_, traffic = zip(*self.loads(), strict=True)
        return Load(over_mean(bytes_), over_mean(traffic))

    def __rich__(self) -> Table:
        balance = self.balance()
        shown = Table(
            title=f"{len(self)} tables on {self.ranks} ranks",
            caption=f"largest over mean: memory {balance.bytes:.3f}, lookups {balance.traffic:.3f}",
        )
        for name in ("table", "rows", "dim", "MB", "lookups a bag", "placement"):
            shown.add_column(name, justify="left" if name in ("table", "placement") else "right")
        for name, placement in self.items():
            size = self.sizes[name]
            own = f"{size.rows:,}", str(size.columns), f"{size.bytes / 1e6:,.1f}", f"{size.lookups:g}"
            shown.add_row(name, *own, str(placement))
        shown.add_section()
        for rank, load in enumerate(self.loads()):
            shown.add_row(f"rank {rank}", "", "", f"{load.bytes / 1e6:,.1f}", f"{load.traffic:,.0f} B", "")
        return shown

    def __str__(self) -> str:
        console = Console(width=110, no_color=True)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def sizes_of(
    tables: Mapping[str, torch.nn.EmbeddingBag],
    features: Mapping[str, Sequence[str]] | None = None,
    lookups: Mapping[str, float] | None = None,
) -> dict[str, Size]:
    """What a planner has to know of tables; arguments as for :func:`plan`."""
    features, lookups = features or {}, lookups or {}
    found = {}
    for name, table in tables.items():
        own = sum(lookups.get(feature, 1.0) for feature in features.get(name, [name]))
        weight = table.weight
        found[name] = Size(table.num_embeddings, table.embedding_dim, weight.element_size(), own)
    return found


def plan(
    tables: Mapping[str, torch.nn.EmbeddingBag],
    features: Mapping[str, Sequence[str]] | None = None,
    *,
    ranks: int,
    lookups: Mapping[str, float] | None = None,
) -> Plan:
    """A plan that spreads tables over ranks, evenly by memory and by lookups.

    Tables that take more than a quarter of a rank's share of either go by rows over all ranks, unless their
    mode is "max"; each of the others goes whole to the rank that it fills least, the largest first.

    Args:
        tables, features: as for :class:`ShardedEmbeddingBagCollection`; tables on the meta device do.
        ranks: how many processes there are.
        lookups: how many indices a bag of a feature has on average, by its name; 1 of those not named.

    Raises:
        ValueError: ``ranks`` is below 1, or ``lookups`` names a feature that there is not.

    Example:
        >>> tables = {"a": torch.nn.EmbeddingBag(10_000, 8, device="meta"), "b": torch.nn.EmbeddingBag(10, 8)}
        >>> plan(tables, ranks=2)["a"]
        ByRows(bounds=None)
    """
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}: expected at least 1")
    known = [own for name in tables for own in (features or {}).get(name, [name])]
    unknown = [name for name in lookups or {} if name not in known]
    if unknown:
        raise ValueError(f"lookups names the feature {unknown[0]!r}: expected some of {known}")
    unsplit = {name for name, table in tables.items() if table.mode == "max"}
    return plan_of_sizes(sizes_of(tables, features, lookups), ranks, unsplit)


def plan_of_sizes(sizes: Mapping[str, Size], ranks: int, unsplit: Container[str] = ()) -> Plan:
    """The plan of tables of these sizes; ``unsplit``: the names of those that do not go by rows."""
    total = Load(sum(own.bytes for own in sizes.values()), sum(own.traffic for own in sizes.values()))
    shares = {
        name: Load(ranks * own.bytes / max(total.bytes, 1), ranks * own.traffic / (total.traffic or 1))
        for name, own in sizes.items()
    }
    placements: dict[str, Placement] = {}
    filled = [Load(0.0, 0.0)] * ranks
    for name in sorted(shares, key=lambda name: -max(shares[name])):
        share = shares[name]
        if ranks > 1 and max(share) > _LARGEST_SHARE and name not in unsplit:
            placements[name] = ByRows()
            filled = [_filled(own, share.bytes / ranks, share.traffic / ranks) for own in filled]
            continue
        after = [_filled(own, *share) for own in filled]
        rank = min(range(ranks), key=lambda rank: (max(after[rank]), sum(after[rank])))
        placements[name] = Whole(rank)
        filled[rank] = after[rank]
    return Plan(placements, sizes, ranks)


def _filled(load: Load, more_bytes: float, more_traffic: float) -> Load:
    return Load(load.bytes + more_bytes, load.traffic + more_traffic)


def over_mean(numbers: Sequence[float] | np.ndarray) -> float:
    """The largest over the mean, 1 where all are 0."""
    mean = float(np.mean(numbers))
    return float(np.max(numbers)) / mean if mean else 1.0
