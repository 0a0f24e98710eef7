"""The CPU behind the seam for devices (see ``fastopt._core.backend``, which says what each name is to do).

Nothing here is compiled: these modules allocate, write descriptors and launch kernels.
"""

from fastopt.kernels.cpu.backend.addresses import address
from fastopt.kernels.cpu.backend.arrays import ArraysLaunch, MatrixLaunch, Squares
from fastopt.kernels.cpu.backend.history import History
from fastopt.kernels.cpu.backend.locate import Locator
from fastopt.kernels.cpu.backend.reads import (
    bags_of_positions,
    clip,
    coalesce,
    gather,
    limit_norms,
    pool,
    pool_max,
    reblock,
    row_products,
    scale,
    take,
    widen,
    zeros,
)
from fastopt.kernels.cpu.backend.rows import catch_up, sum_squares_rows, update_rows
from fastopt.kernels.cpu.headers import Identities
from fastopt.kernels.cpu.index import check_bounds as bounds
from fastopt.kernels.cpu.index import segments_of
from fastopt.kernels.cpu.memory import empty
from fastopt.kernels.cpu.threads import run

__all__ = [
    "ArraysLaunch",
    "History",
    "Identities",
    "Locator",
    "MatrixLaunch",
    "Squares",
    "address",
    "bags_of_positions",
    "bounds",
    "catch_up",
    "clip",
    "coalesce",
    "empty",
    "gather",
    "limit_norms",
    "pool",
    "pool_max",
    "reblock",
    "row_products",
    "run",
    "scale",
    "segments_of",
    "sum_squares_rows",
    "take",
    "update_rows",
    "widen",
    "zeros",
]
