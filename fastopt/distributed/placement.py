"""Where the parts of a table are: on one rank, by rows on several, or by columns on several."""

from collections.abc import Sequence
from itertools import pairwise
from operator import index
from typing import NamedTuple

import torch

_SHOWN = 4  # sizes of parts that are told one by one


class Part(NamedTuple):
    """The rows from ``first_row`` to ``last_row`` of a table, and of these the columns likewise; both without
    the last."""

    first_row: int
    last_row: int
    first_column: int
    last_column: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.last_row - self.first_row, self.last_column - self.first_column

    @property
    def is_empty(self) -> bool:
        return 0 in self.shape

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """A view of this part of a tensor of the table's shape."""
        return whole[self.first_row : self.last_row, self.first_column : self.last_column]


class Whole(NamedTuple):
    """A table whole on one rank.

    Lookups, gradients and updates have the bits of one process with the batches of all ranks, one after the
    other.
    """

    rank: int

    def parts(self, ranks: int, rows: int, columns: int) -> list[Part]:
        """The part that each rank has.

        Raises:
            ValueError, TypeError: there is no such rank.
        """
        if not 0 <= index(self.rank) < ranks:
            raise ValueError(f"rank is {self.rank}: expected one from 0 to {ranks - 1}")
        return [Part(0, rows if rank == self.rank else 0, 0, columns) for rank in range(ranks)]

    def __str__(self) -> str:
        return f"whole on rank {self.rank}"


class ByRows(NamedTuple):
    """A table of which each rank has rows that lie one after the other.

    ``bounds``: rank r has the rows from ``bounds[r]`` to ``bounds[r + 1]``, where these are equal none; None:
    as many each as ``torch.chunk`` gives. Bits as for :class:`Whole`, since the gradients of a row are added
    up where the row is, in the order of the bags of all ranks. Not for mode "max".
    """

    bounds: Sequence[int] | None = None

    def parts(self, ranks: int, rows: int, columns: int) -> list[Part]:
        """The part that each rank has.

        Raises:
            ValueError, TypeError: the bounds are not those of so many rows on so many ranks.
        """
        bounds = _checked(self.bounds, ranks, rows, "rows")
        return [Part(first, last, 0, columns) for first, last in pairwise(bounds)]

    def __str__(self) -> str:
        return _described("rows", self.bounds)


class ByColumns(NamedTuple):
    """A table of which each rank has some columns of every row; ``bounds`` as for :class:`ByRows`.

    Every rank that has some looks all indices up, so that load is even however hot a row is. Bits as for
    :class:`Whole`, for rules that update each element by itself; those that take a norm or a mean of rows
    are refused.
    """

    bounds: Sequence[int] | None = None

    def parts(self, ranks: int, rows: int, columns: int) -> list[Part]:
        """The part that each rank has.

        Raises:
            ValueError, TypeError: the bounds are not those of so many columns on so many ranks.
        """
        bounds = _checked(self.bounds, ranks, columns, "columns")
        return [Part(0, rows, first, last) for first, last in pairwise(bounds)]

    def __str__(self) -> str:
        return _described("columns", self.bounds)


Placement = Whole | ByRows | ByColumns


def _checked(bounds: Sequence[int] | None, ranks: int, size: int, name: str) -> list[int]:
    if bounds is None:
        each = -(-size // ranks)
        return [min(rank * each, size) for rank in range(ranks + 1)]
    own = [index(bound) for bound in bounds]
    fits = len(own) == ranks + 1 and own[0] == 0 and own[-1] == size
    if not fits or any(last < first for first, last in pairwise(own)):
        raise ValueError(
            f"bounds is {tuple(own)}: expected {ranks + 1} numbers that do not fall, from 0 to {size}, "
            f"the {name} of the table"
        )
    return own


def _described(name: str, bounds: Sequence[int] | None) -> str:
    if bounds is None:
        return f"{name}, on all ranks"
    sizes = [last - first for first, last in pairwise(bounds)]
    some = [size for size in sizes if size]
    if len(sizes) > _SHOWN:
        return f"{name}: {min(some, default=0):,} to {max(some, default=0):,} on {len(some)} ranks"
    return f"{name}: {', '.join(f'{size:,}' for size in sizes)}"
