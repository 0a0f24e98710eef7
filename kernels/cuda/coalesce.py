"""The values of a segment, brought together in the place of the first.

As many lanes of a warp as a row of values has vectors take a segment, and add its values in the order of
their positions.

Bytes moved: each value read and written once.
"""

from typing import Any

import numpy as np
from numba import cuda

from fastopt.kernels.cuda.launch import kernel
from fastopt.kernels.cuda.memory import integer, load, load_vector, store_vector
from fastopt.kernels.source import define

THREADS = 256
AHEAD = 4  # positions whose values are on their way at the same time


@kernel("iiiiiii", THREADS)
def coalesce(dtype: np.dtype, length: int) -> Any:
    """``(values, dim, bits, order, starts, bounds, first_position)``: put the sum of each segment's values in
    the place of its first position, and zeros in those of the others.

    bits: 2 to this are the lanes that take a segment, ``length`` elements at a time each. bounds: address of
    which segments are this table's.
    """
    elements, size = range(length), dtype.itemsize

    def steps(count: int) -> list[str]:
        """Lines that add the values of ``count`` positions from sorted position ``j`` on."""
        places = [
            f"a{u} = begin + np.int64(load(order + (j + {u}) * 4, index)) * stride" for u in range(count)
        ]
        loads = [f"v{u} = load_vector(a{u}, zero, {length})" for u in range(count)]
        sums = [f"g{e} += v{u}[{e}]" for u in range(count) for e in elements]
        zeros = [f"store_vector(a{u}, nothing)" for u in range(count)]
        return [*places, *loads, *sums, *zeros]

    return define(
        "coalesce",
        "values, dim, bits, order, starts, bounds, first_position",
        "thread = np.int64(cuda.threadIdx.x)",
        f"segment, last_segment, stride = integer(bounds, 0), integer(bounds, 1), dim * {size}",
        f"segment += np.int64(cuda.blockIdx.x) * ({THREADS} >> bits) + (thread >> bits)",
        "lanes = np.int64(1) << bits",
        "while segment < last_segment:",
        "    first = np.int64(load(starts + segment * 4, index))",
        "    last = np.int64(load(starts + segment * 4 + 4, index))",
        f"    d = (thread & (lanes - 1)) * {length}",
        "    while d < dim and last - first > 1:",
        f"        begin = values - first_position * stride + d * {size}",
        "        target = begin + np.int64(load(order + first * 4, index)) * stride",
        f"        v = load_vector(target, zero, {length})",
        *(f"        g{e} = v[{e}]" for e in elements),
        "        j = first + 1",
        f"        while j + {AHEAD} <= last:",
        *(f"            {line}" for line in [*steps(AHEAD), f"j += {AHEAD}"]),
        "        while j < last:",
        *(f"            {line}" for line in [*steps(1), "j += 1"]),
        f"        store_vector(target, ({', '.join(f'g{e}' for e in elements)},))",
        f"        d += lanes * {length}",
        f"    segment += np.int64(cuda.gridDim.x) * ({THREADS} >> bits)",
        np=np,
        cuda=cuda,
        integer=integer,
        load=load,
        load_vector=load_vector,
        store_vector=store_vector,
        index=np.int32(0),
        zero=dtype.type(0),
        nothing=(dtype.type(0),) * length,
    )
