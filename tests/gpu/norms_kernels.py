"""The kernels of norms."""

from collections.abc import Iterator

import numpy as np

from fastopt.kernels.cuda import norms, row_norms
from fastopt.kernels.cuda.launch import Kernel
from fastopt.kernels.formats import BFLOAT16, HALF, PLAIN

SINGLE, DOUBLE = np.dtype(np.float32), np.dtype(np.float64)


def norms_kernels() -> Iterator[tuple[str, str, Kernel]]:
    """Of each kernel a name, the bytes that it moves for an element, and the kernel."""
    for name, kind, compute in (
        ("float32", PLAIN, SINGLE),
        ("float64", PLAIN, DOUBLE),
        ("float16", HALF, SINGLE),
        ("bfloat16", BFLOAT16, SINGLE),
    ):
        yield f"squares: {name}", f"{kind.itemsize(compute)}", norms.sum_squares(kind, compute)
    for compute in (SINGLE, DOUBLE):
        yield f"squares of rows: {compute}", f"{compute.itemsize}", row_norms.sum_squares_of_rows(compute)
    yield "sum of squares", "-", norms.add_partials()
    yield "factor of gradients", "-", norms.find_factor()
