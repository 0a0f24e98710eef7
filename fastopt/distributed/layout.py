"""Which features have their rows on which rank, as all ranks know it: nothing here depends on a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastopt.distributed.placement import ByRows, Part, Placement


class Feature(NamedTuple):
    """A feature, the position of its table, and its columns of the result."""

    name: str
    table: int
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class ShardedTable:
    """A table and its parts.

    parts: of each rank; here: that of this one. own: the module over it. mode, padding: of the whole table,
    the latter a row that counts for nothing, or None. features: the positions of those that look it up.
    """

    name: str
    rows: int
    columns: int
    placement: Placement
    parts: list[Part]
    here: Part
    own: torch.nn.EmbeddingBag
    mode: str
    padding: int | None
    features: list[int]

    @property
    def by_rows(self) -> bool:
        return isinstance(self.placement, ByRows)

    @property
    def has_parts_of_rows(self) -> bool:
        """Whether some rank has a part of the columns alone."""
        return any(part.shape[1] < self.columns for part in self.parts if not part.is_empty)

    @property
    def is_split(self) -> bool:
        """Whether some rank has a part alone."""
        whole = self.rows, self.columns
        return any(part.shape != whole for part in self.parts if not part.is_empty)

    @property
    def index_dtype(self) -> torch.dtype:
        """What rows are named by in messages."""
        return torch.int32 if self.rows <= torch.iinfo(torch.int32).max else torch.int64

    def bounds(self) -> list[int]:
        """Where the rows of each rank begin, and the last ones end; of a table by rows."""
        return [part.first_row for part in self.parts] + [self.rows]


class Layout:
    """Tables, features, and what each rank has to do with them.

    Args:
        tables, features: all of them. rank, ranks: of this process, and how many there are.
    """

    def __init__(
        self, tables: Sequence[ShardedTable], features: Sequence[Feature], rank: int, ranks: int
    ) -> None:
        self.tables = list(tables)
        self.features = list(features)
        self.rank = rank
        self.ranks = ranks
        self.columns = self.features[-1].last
        self.by_rows = [t for t, table in enumerate(self.tables) if table.by_rows]

    def table_of(self, feature: int) -> ShardedTable:
        return self.tables[self.features[feature].table]

    def at(self, rank: int, *, by_rows: bool) -> list[int]:
        """The tables of which a rank has a part, those by rows or the others."""
        return [
            t
            for t, table in enumerate(self.tables)
            if table.by_rows == by_rows and not table.parts[rank].is_empty
        ]

    def pooled_at(self, rank: int) -> list[int]:
        """The features that a rank looks up and pools for all."""
        return [f for t in self.at(rank, by_rows=False) for f in self.tables[t].features]

    def by_rows_at(self, rank: int) -> list[int]:
        """The features of whose tables a rank has rows, which others pool."""
        return [f for t in self.at(rank, by_rows=True) for f in self.tables[t].features]

    def columns_at(self, feature: int, rank: int) -> tuple[int, int]:
        """The columns of the result that a rank pools for a feature."""
        own, part = self.features[feature], self.table_of(feature).parts[rank]
        return own.first + part.first_column, own.first + part.last_column

    def width_at(self, rank: int) -> int:
        """How many columns of the result a rank pools."""
        return sum(self.table_of(f).parts[rank].shape[1] for f in self.pooled_at(rank))
