"""The CPU behind the seam for devices (see ``fastopt._core.backend``, which says what each name is to do).

Nothing here is compiled: these modules allocate, write descriptors and launch kernels.
"""

from fastopt.kernels.cpu.backend.about import about
from fastopt.kernels.cpu.backend.addresses import address
from fastopt.kernels.cpu.backend.arrays import ArraysLaunch, MatrixLaunch, Squares, norm
from fastopt.kernels.cpu.backend.counts import counted_steps
from fastopt.kernels.cpu.backend.history import History
from fastopt.kernels.cpu.backend.indices import (
    all_rows,
    bag_offsets,
    bounds,
    copies,
    counts,
    distinct_rows,
    regular_offsets,
)
from fastopt.kernels.cpu.backend.locate import Locator
from fastopt.kernels.cpu.backend.reads import (
    bags_of_positions,
    clip,
    coalesce,
    contiguous,
    from_host,
    gather,
    limit_norms,
    pool,
    pool_max,
    reblock,
    row_products,
    scale,
    shift,
    take,
    to_host,
    widen,
    without,
    won_rows,
    zeros,
    zeros_beside,
)
from fastopt.kernels.cpu.backend.rows import catch_up, sum_squares_rows, update_rows
from fastopt.kernels.cpu.backend.segments import segments_of
from fastopt.kernels.cpu.headers import Identities
from fastopt.kernels.cpu.memory import empty
from fastopt.kernels.cpu.threads import run

device = -1
capturing = False  # there are no graphs

__all__ = [
    "ArraysLaunch",
    "History",
    "Identities",
    "Locator",
    "MatrixLaunch",
    "Squares",
    "about",
    "address",
    "all_rows",
    "bag_offsets",
    "bags_of_positions",
    "bounds",
    "capturing",
    "catch_up",
    "clip",
    "coalesce",
    "contiguous",
    "copies",
    "counted_steps",
    "counts",
    "device",
    "distinct_rows",
    "empty",
    "from_host",
    "gather",
    "limit_norms",
    "norm",
    "pool",
    "pool_max",
    "reblock",
    "regular_offsets",
    "row_products",
    "run",
    "scale",
    "segments_of",
    "shift",
    "sum_squares_rows",
    "take",
    "to_host",
    "update_rows",
    "widen",
    "without",
    "won_rows",
    "zeros",
    "zeros_beside",
]
