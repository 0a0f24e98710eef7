"""What this rank asks of the others for its batch, and what tells all of them whether it can be done."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch

from fastopt._core.arrays import array_view, tensor_over
from fastopt._core.backend import backend_of
from fastopt._core.indices import Indices
from fastopt.distributed.exchange import packed
from fastopt.distributed.layout import Layout, ShardedTable
from fastopt.gradients.pooling import checked_bags, weights_dtypes
from fastopt.torch.collection import check_bags
from fastopt.torch.memory import DTYPES, computed_with


class Given(NamedTuple):
    """What a feature looks up here, checked.

    indices: 1-D. offsets: int64 [bags + 1]. weights: in the dtype that is computed with, or None.
    """

    indices: torch.Tensor
    offsets: torch.Tensor
    weights: torch.Tensor | None


class Uses(NamedTuple):
    """How the bags of a feature use rows of a table by rows; a padding row counts for nothing and is not
    among them.

    given: as if the feature looked up in the distinct rows alone. kept: which of its indices are left.
    counts, positions, factors: of the bags that use rows of a rank, rank by rank, bags in order: how many,
    which of those that the rank sends, and the factor on each, None where all are 1. bags: which these are.
    bags_at, uses_at: how many bags and uses each rank has of them.
    """

    given: Given
    kept: torch.Tensor
    counts: torch.Tensor
    positions: torch.Tensor
    factors: torch.Tensor | None
    bags: torch.Tensor
    bags_at: list[int]
    uses_at: list[int]


class RowsAsked(NamedTuple):
    """The rows of a table by rows that a batch uses. distinct: ascending. at: how many of them each rank
    has. uses: of each feature, by its position."""

    distinct: torch.Tensor
    at: list[int]
    uses: dict[int, Uses]


class Request:
    """What this rank asks for.

    Args:
        given: what each feature looks up.

    Attributes:
        bags: how many there are. rows: of each table by rows, by its position.
    """

    def __init__(self, layout: Layout, given: Sequence[Given]) -> None:
        self._layout = layout
        self.given = list(given)
        self.bags = len(given[0].offsets) - 1
        self.rows = {t: _rows_asked(layout, t, self.given) for t in layout.by_rows}

    def messages(self) -> list[torch.Tensor]:
        """What goes to each rank, as bytes; Batch reads it."""
        return [self._message(rank) for rank in range(self._layout.ranks)]

    def _message(self, rank: int) -> torch.Tensor:
        layout, arrays = self._layout, []
        for t in layout.at(rank, by_rows=False):
            for f in layout.tables[t].features:
                own = self.given[f]
                arrays += [own.offsets.diff().int(), own.indices.to(layout.tables[t].index_dtype)]
                arrays += [] if own.weights is None else [own.weights]
        for t in layout.at(rank, by_rows=True):
            table, asked = layout.tables[t], self.rows[t]
            first = table.parts[rank].first_row
            arrays.append((asked.distinct.split(asked.at)[rank] - first).to(table.index_dtype))
            for uses in asked.uses.values():
                arrays += [uses.counts.split(uses.bags_at)[rank], uses.positions.split(uses.uses_at)[rank]]
                arrays += [] if uses.factors is None else [uses.factors.split(uses.uses_at)[rank]]
        return packed(arrays, self.given[0].offsets.device)

    def counts(self, rank: int) -> list[list[int]]:
        """Of each table the rows, and of each feature the indices and the bags, that go to a rank."""
        layout = self._layout
        rows = [self.rows[t].at[rank] if t in self.rows else 0 for t in range(len(layout.tables))]
        indices, bags = [], []
        for f, own in enumerate(self.given):
            uses = self.uses_of(f)
            indices.append(len(own.indices) if uses is None else uses.uses_at[rank])
            bags.append(self.bags if uses is None else uses.bags_at[rank])
        return [rows, indices, bags]

    def uses_of(self, feature: int) -> Uses | None:
        """Those of a feature of a table by rows."""
        asked = self.rows.get(self._layout.features[feature].table)
        return None if asked is None else asked.uses[feature]


def checked(layout: Layout, given: Mapping[str, tuple], device: torch.device) -> list[Given]:
    """What the features of a batch look up.

    Raises:
        ValueError, TypeError: an argument does not fit, or features have different numbers of bags.
    """
    found = [
        _checked(layout.table_of(f), given[feature.name], f"inputs[{feature.name!r}]", device)
        for f, feature in enumerate(layout.features)
    ]
    check_bags([feature.name for feature in layout.features], [len(own.offsets) - 1 for own in found])
    return found


def _checked(table: ShardedTable, given: tuple, label: str, device: torch.device) -> Given:
    indices, offsets, weights = given
    for name, own in (("indices", indices), ("offsets", offsets), ("per_sample_weights", weights)):
        if own is not None and (not isinstance(own, torch.Tensor) or own.device != device):
            where = own.device if isinstance(own, torch.Tensor) else type(own).__name__
            raise TypeError(
                f"{label}.{name} is on {where}: expected a tensor on {device}, where the tables are"
            )
    if weights is not None and table.mode != "sum":
        raise ValueError(f"{label}.per_sample_weights is given with mode {table.mode!r}: expected mode 'sum'")
    dtype = DTYPES[table.own.weight.dtype]
    arguments = SimpleNamespace(
        indices=indices,
        offsets=offsets,
        mode=table.mode,
        per_sample_weights=None if weights is None else weights.detach(),
        padding_idx=table.padding,
        include_last_offset=table.own.include_last_offset and offsets is not None,
        check_indices=True,
    )
    bags = checked_bags(arguments, label, table.rows, weights_dtypes(dtype))
    own_weights = None if bags.weights is None else tensor_over(bags.weights)
    return Given(tensor_over(bags.indices.flat), tensor_over(bags.offsets), own_weights)


def _rows_asked(layout: Layout, t: int, given: Sequence[Given]) -> RowsAsked:
    table = layout.tables[t]
    kept, own = {}, {}
    for f in table.features:
        kept[f] = given[f].indices != (-1 if table.padding is None else table.padding)
        own[f] = _without_padding(given[f], kept[f])
    named = torch.cat([own[f].indices.long() for f in table.features])
    distinct, positions = _distinct(named, table.rows)
    bounds = torch.tensor(table.bounds(), device=named.device)
    cuts = torch.searchsorted(distinct, bounds)
    parts = positions.split([len(own[f].indices) for f in table.features])
    uses = {}
    for f, of_feature in zip(table.features, parts, strict=True):
        uses[f] = _uses(table, own[f]._replace(indices=of_feature), kept[f], cuts)
    return RowsAsked(distinct, cuts.diff().tolist(), uses)


def _without_padding(given: Given, kept: torch.Tensor) -> Given:
    before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
    weights = None if given.weights is None else given.weights[kept]
    return Given(given.indices[kept], before[given.offsets], weights)


def _distinct(named: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The different rows that are named, ascending, and the position among them of each."""
    if not len(named):
        return named, named
    array = array_view(named, "indices")
    distinct = tensor_over(backend_of(array).distinct_rows(Indices(array, rows).segments))
    return distinct, torch.searchsorted(distinct, named)


def _uses(table: ShardedTable, given: Given, kept: torch.Tensor, cuts: torch.Tensor) -> Uses:
    """Those of a feature, whose indices are positions among the distinct rows; ``cuts``: where among these
    the rows of each rank begin."""
    ranks, bags = len(cuts) - 1, len(given.offsets) - 1
    lengths = given.offsets.diff()
    bag_of = torch.repeat_interleave(torch.arange(bags, device=lengths.device), lengths)
    rank_of = torch.bucketize(given.indices, cuts[1:-1], right=True)
    order = torch.argsort(rank_of, stable=True)
    pairs = (rank_of * bags + bag_of)[order]  # ascending: of each rank the bags, in order
    used, counts = torch.unique_consecutive(pairs, return_counts=True)
    factors = None
    if table.mode == "mean":
        factors = (1 / lengths.to(computed_with(table.own.weight)))[bag_of][order]
    elif given.weights is not None:
        factors = given.weights[order]
    return Uses(
        given=given,
        kept=kept,
        counts=counts.int(),
        positions=(given.indices - cuts[:-1][rank_of])[order].int(),
        factors=factors,
        bags=used % max(bags, 1),
        bags_at=torch.bincount(used // max(bags, 1), minlength=ranks).tolist(),
        uses_at=torch.bincount(rank_of, minlength=ranks).tolist(),
    )
