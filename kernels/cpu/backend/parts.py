"""How a launch over tables is shared out among threads."""

from collections.abc import Sequence

import numpy as np

from fastopt.kernels.cpu.threads import thread_count

PARTS_PER_THREAD = 8  # of a launch, so that threads that are held up do not hold up the others


def equal_parts(amounts: Sequence[int]) -> np.ndarray:
    """int64 [any number, 3]: tables, which have these amounts of work, each with a part and how many parts it
    has; the parts are of about equal work."""
    goal = max(1, sum(amounts) // (PARTS_PER_THREAD * thread_count()))
    return np.array(
        [
            (table, part, parts)
            for table, amount in enumerate(amounts)
            for parts in [-(-amount // goal)]
            for part in range(parts)
        ],
        np.int64,
    ).reshape(-1, 3)
