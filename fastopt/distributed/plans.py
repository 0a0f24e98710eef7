"""Where each table is, and what that costs each rank, to be read and printed."""

from collections.abc import Iterator, Mapping

import numpy as np
from rich.console import Console
from rich.table import Table

from fastopt.distributed.loads import STEP, Loads, Size, Step, loads, over_mean
from fastopt.distributed.placement import Part, Placement


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

    def loads(self, step: Step = STEP) -> Loads:
        """What a step costs each rank."""
        of_tables = [loads(self.sizes[name], own, self.parts[name], step) for name, own in self.items()]
        return Loads(*np.sum(of_tables, 0)) if of_tables else Loads(*np.zeros((6, self.ranks)))

    def __rich__(self) -> Table:
        own = self.loads()
        shown = Table(
            title=f"{len(self)} tables on {self.ranks} ranks",
            caption=f"largest over mean: memory {over_mean(own.held):.3f}, "
            f"lookups {over_mean(own.lookups):.3f}; {STEP.bags:,} bags a rank",
        )
        for name in ("table", "rows", "dim", "MB", "lookups a bag", "placement"):
            shown.add_column(name, justify="left" if name in ("table", "placement") else "right")
        for name, placement in self.items():
            size = self.sizes[name]
            numbers = f"{size.rows:,}", str(size.columns), f"{size.bytes / 1e6:,.1f}", f"{size.lookups:g}"
            shown.add_row(name, *numbers, str(placement))
        shown.add_section()
        looked_up = own.lookups / (STEP.bags * self.ranks)
        for rank, (sent, received) in enumerate(zip(own.sent() / 1e6, own.received() / 1e6, strict=True)):
            held, bags = f"{own.held[rank] / 1e6:,.1f}", f"{looked_up[rank]:.3g}"
            travels = f"sends {sent:,.2f} MB a step, gets {received:,.2f}"
            shown.add_row(f"rank {rank}", "", "", held, bags, travels)
        return shown

    def __str__(self) -> str:
        console = Console(width=110, no_color=True)
        with console.capture() as captured:
            console.print(self)
        return captured.get()
