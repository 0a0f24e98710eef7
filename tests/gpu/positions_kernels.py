"""The kernels over positions of indices, over rows that segments name, and over elements of an array."""

from collections.abc import Iterator

import numpy as np

from fastopt.kernels.cuda import bags, elementwise
from fastopt.kernels.cuda.coalesce import coalesce
from fastopt.kernels.cuda.launch import Kernel
from fastopt.kernels.cuda.limits import limit_norms
from fastopt.kernels.cuda.reblock import reblock
from fastopt.kernels.formats import BFLOAT16, HALF, ROOT8, SIGNED8

LENGTHS = {np.dtype(np.float32): (4, 1), np.dtype(np.float64): (2, 1)}


def positions_kernels() -> Iterator[tuple[str, str, Kernel]]:
    """Of each kernel a name, the bytes that it moves for a position or an element, and the kernel."""
    yield "bags of positions", "4", bags.find_bags()
    yield "padding of bags", "12", bags.count_padding()
    yield "numbers shifted", "8", bags.shift()
    yield "indices left out", "8", bags.leave_out(8)
    for dtype, lengths in LENGTHS.items():
        size = dtype.itemsize
        yield f"scales of bags, {dtype}", str(4 + 2 * size), bags.divide_scales(dtype)
        yield f"values in order, {dtype}", str(4 + 2 * size), bags.take(size)
        yield f"elements won, {dtype}", str(4 + 2 * size), bags.won_rows(dtype)
        for length in lengths:
            yield f"limit of norms, {dtype} by {length}", str(size), limit_norms(dtype, length)
            yield f"coalesced, {dtype} by {length}", str(2 * size), coalesce(dtype, length)
            yield f"scaled, {dtype} by {length}", str(2 * size), elementwise.scale(dtype, length)
            yield f"clipped, {dtype} by {length}", str(2 * size), elementwise.clip(dtype, length)
        yield f"copied, {dtype}", str(2 * size), elementwise.copy(dtype, dtype)
        yield f"set, {dtype}", str(size), elementwise.fill(size)
    for kind in (HALF, BFLOAT16):
        dtype = np.dtype(kind.dtype)
        yield f"widened, {dtype}", "6", elementwise.copy(dtype, np.dtype(np.float32))
        yield f"scaled, {dtype}", "4", elementwise.scale(dtype, 4)
        yield f"clipped, {dtype}", "4", elementwise.clip(dtype, 4)
    for kind in (SIGNED8, ROOT8):
        yield f"blocks of rows, {kind.name}", "2", reblock(kind)
