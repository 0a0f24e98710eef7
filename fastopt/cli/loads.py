"""``fastopt loads``: what tables on many ranks would send and move, before there is a second machine."""

import enum
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from fastopt.distributed.loads import Machine, Size, Step
    from fastopt.distributed.placement import Placement
    from fastopt.distributed.plans import Plan

MEGA, GIGA, MILLI, MICRO = 1e6, 1e9, 1e-3, 1e-6
FLOAT32 = 4  # bytes
WIDTH = 110  # of the table, which is not cut off
COLUMNS = "ranks", "held", "read", "MB sent", "mean", "moved", "ms sent", "moved", "messages", "M/s"


class Placed(enum.StrEnum):
    """How tables are placed."""

    planner = "planner"
    planner_columns = "planner-columns"
    round_robin = "round-robin"
    rows = "rows"
    columns = "columns"


Ranks = Annotated[str, typer.Option(help="How many ranks, separated by commas.")]
Bags = Annotated[int, typer.Option(min=1, help="Bags of a batch on each rank.")]
Tables = Annotated[int, typer.Option(min=1, help="How many tables.")]
Smallest = Annotated[int, typer.Option(min=1, help="Rows of the smallest table.")]
Largest = Annotated[int, typer.Option(min=1, help="Rows of the largest one; between, they grow evenly.")]
Dim = Annotated[int, typer.Option(min=1, help="Columns of each table.")]
Lookups = Annotated[float, typer.Option(min=0, help="Indices of a bag.")]
Exponent = Annotated[float, typer.Option(min=0, help="Popularity of rows: rank ** -exponent.")]
ByFrequency = Annotated[bool, typer.Option("--by-frequency", help="Popular rows come first in a table.")]
Ids = Annotated[
    Path | None,
    typer.Option(
        help="Recorded ids in place of made-up ones: an .npz file, for each table [bags, indices of each].",
        show_default=False,
        exists=True,
        dir_okay=False,
    ),
]
Place = Annotated[
    list[Placed], typer.Option(help="How tables are placed; given several times, side by side.")
]
State = Annotated[int, typer.Option(min=0, help="Numbers of state for each parameter; Adam has 2.")]
Bfloat16 = Annotated[bool, typer.Option("--bfloat16", help="Results and gradients travel in bfloat16.")]
Network = Annotated[float, typer.Option(min=1e-9, help="GB/s that a rank sends, and gets at once.")]
Memory = Annotated[float, typer.Option(min=1e-9, help="GB/s of a rank's memory.")]
Message = Annotated[float, typer.Option(min=0, help="Microseconds that a message costs beside its bytes.")]
Dense = Annotated[float, typer.Option(min=0, help="Milliseconds of the rest of a step.")]


def command(
    ranks: Ranks = "1,2,4,8,16,64,256,1024",
    bags: Bags = 2_048,
    tables: Tables = 26,
    smallest: Smallest = 1_000,
    largest: Largest = 10_000_000,
    dim: Dim = 64,
    lookups: Lookups = 1.0,
    exponent: Exponent = 1.05,
    by_frequency: ByFrequency = False,
    ids: Ids = None,
    placement: Place = [Placed.planner, Placed.round_robin],  # noqa: B006
    state: State = 2,
    bfloat16: Bfloat16 = False,
    network: Network = 25.0,
    memory: Memory = 100.0,
    message: Message = 1.0,
    dense: Dense = 0.0,
) -> None:  # fmt: skip
    """Print what sharded tables send over the network and move in memory, for some numbers of ranks."""
    try:
        from fastopt.distributed.loads import Machine, Size, Step, power_law
    except ImportError as error:
        raise typer.BadParameter(f"this needs torch: pip install 'fastopt[torch]' ({error})") from None
    counts = _counts(ranks)
    if ids is None:
        sizes = np.unique(
            np.geomspace(min(smallest, largest), largest, tables).astype(int), return_counts=True
        )
        rows = np.repeat(*sizes).tolist()
        found = {
            f"table {k}": Size(
                many, dim, FLOAT32, lookups, popularity=power_law(many, exponent, scattered=not by_frequency)
            )
            for k, many in enumerate(rows)
        }
    else:
        found = _recorded(ids, dim)
    shown = Table(title=f"{len(found)} tables, {sum(size.rows for size in found.values()):,} rows of {dim}")
    for name in COLUMNS:
        shown.add_column(name, justify="right")
    shown.add_column("placement")
    step = Step(bags, state, 2 if bfloat16 else None)
    machine = Machine(network * GIGA, memory * GIGA, message * MICRO)
    for count in counts:
        for own in placement:
            plan = _plan(own, found, count, step, machine)
            shown.add_row(*_foretold(plan, step, machine, dense), own.value)
        shown.add_section()
    console = Console(soft_wrap=True, width=max(Console().width, WIDTH))
    console.print(shown)
    console.print(
        "held, read: the largest share of tables, and of rows looked up, over the mean. MB sent, mean: of "
        "the busiest rank in a step and of all of them, over the network; moved: of the busiest, in memory. "
        "Then the time of each and of messages, the longest in bold, and millions of samples a second.",
        highlight=False,
    )


def _foretold(plan: "Plan", step: "Step", machine: "Machine", dense: float) -> list[str]:
    """A line of the table; ``dense``: milliseconds of the rest of a step."""
    from fastopt.distributed.loads import over_mean, times

    loads = plan.loads(step)
    own = times(loads, machine)
    parts = [seconds / MILLI for seconds in own]
    rate = plan.ranks * step.bags / max(sum(own) + dense * MILLI, 1e-12)
    return [
        str(plan.ranks),
        f"{over_mean(loads.held):.2f}",
        f"{over_mean(loads.lookups):.2f}",
        f"{np.maximum(loads.sent(), loads.received()).max() / MEGA:,.1f}",
        f"{loads.sent().mean() / MEGA:,.1f}",
        f"{loads.memory.max() / MEGA:,.1f}",
        *(f"[bold]{part:,.2f}[/bold]" if part == max(parts) else f"{part:,.2f}" for part in parts),
        f"{rate / MEGA:,.2f}",
    ]


def _counts(ranks: str) -> list[int]:
    try:
        found = [int(part) for part in ranks.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise typer.BadParameter(f"--ranks is {ranks!r}: expected whole numbers from 1 on, such as 1,2,4")
    return found


def _arrays(path: Path) -> "np.lib.npyio.NpzFile":
    """Those of an .npz file, at least one."""
    try:
        arrays = np.load(path)
    except (ValueError, OSError, EOFError) as error:
        raise typer.BadParameter(f"{path} can't be read: expected an .npz file ({error})") from None
    if not isinstance(arrays, np.lib.npyio.NpzFile) or not arrays.files:
        raise typer.BadParameter(
            f"{path} holds no named arrays: expected an .npz file with one for each table"
        )
    return arrays


def _recorded(path: Path, dim: int) -> "dict[str, Size]":
    """Tables whose rows are as popular as they are in a file's arrays."""
    from fastopt.distributed.loads import Size

    found = {}
    with _arrays(path) as arrays:
        for name, indices in arrays.items():
            if (
                indices.dtype.kind not in "iu"
                or indices.ndim not in (1, 2)
                or not indices.size
                or indices.min() < 0
            ):
                raise typer.BadParameter(
                    f"{path}: {name!r} has dtype {indices.dtype} and shape {indices.shape}: expected whole "
                    "numbers from 0 on, [bags, indices of each] or [bags]"
                )
            counts = np.bincount(indices.reshape(-1))
            lookups = indices.size / len(indices)
            found[name] = Size(len(counts), dim, FLOAT32, lookups, popularity=counts / counts.sum())
    return found


def _plan(
    placement: Placed, sizes: "Mapping[str, Size]", ranks: int, step: "Step", machine: "Machine"
) -> "Plan":
    from fastopt.distributed import ByColumns, ByRows, Plan, Whole
    from fastopt.distributed.planner import plan_of_sizes

    if placement in (Placed.planner, Placed.planner_columns):
        columns = placement is Placed.planner_columns
        return plan_of_sizes(sizes, ranks, columns=columns, step=step, machine=machine)
    made: dict[Placed, Callable[[int], Placement]] = {
        Placed.round_robin: lambda k: Whole(k % ranks),
        Placed.rows: lambda k: ByRows(),
        Placed.columns: lambda k: ByColumns(),
    }
    return Plan({name: made[placement](k) for k, name in enumerate(sizes)}, sizes, ranks)
