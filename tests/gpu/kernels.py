"""Every kernel for a GPU: of each rule, and of each way that arrays are stored."""

from collections.abc import Iterator

from fastopt.kernels.cuda.launch import Kernel
from gpu.catch_up_kernels import catch_up_kernels
from gpu.dense_kernels import dense_kernels
from gpu.lookups_kernels import lookups_kernels
from gpu.norms_kernels import norms_kernels
from gpu.positions_kernels import positions_kernels
from gpu.rows_kernels import rows_kernels
from gpu.sort_kernels import sort_kernels


def every_kernel() -> Iterator[tuple[str, str, Kernel]]:
    """Of each kernel a name, the bytes that it moves for an element, and the kernel."""
    yield from dense_kernels()
    yield from rows_kernels()
    yield from catch_up_kernels()
    yield from lookups_kernels()
    yield from norms_kernels()
    yield from positions_kernels()
    yield from sort_kernels()
