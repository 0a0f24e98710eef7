"""The kernels that look rows up."""

from collections.abc import Iterator

import numpy as np

from fastopt.kernels.cuda import lookups
from fastopt.kernels.cuda.lanes import VECTOR_BYTES
from fastopt.kernels.cuda.launch import Kernel
from fastopt.kernels.formats import BFLOAT16, HALF, PLAIN

SINGLE, DOUBLE = np.dtype(np.float32), np.dtype(np.float64)
READ = {"float32": (PLAIN, SINGLE), "float64": (PLAIN, DOUBLE), "bfloat16": (BFLOAT16, SINGLE)}
READ["float16"] = HALF, SINGLE


def lookups_kernels() -> Iterator[tuple[str, str, Kernel]]:
    """Of each kernel a name, the bytes that it moves for an element of a row that an index names, and the
    kernel."""
    for size in lookups.WORDS:
        yield f"lookups: gather by {size} bytes", "twice its own", lookups.gather(size)
    for name, (kind, like) in READ.items():
        size = kind.itemsize(like)
        for length in (VECTOR_BYTES // size, 1):
            own = f"{name}, {length} at a time"
            yield f"lookups: pool {own}", str(size), lookups.pool(kind, like, length)
            yield f"lookups: maximum {own}", str(size), lookups.pool_max(kind, like, length)
            products = lookups.row_products(kind, like, length)
            yield f"lookups: products {own}", f"{size} to {size + like.itemsize}", products
