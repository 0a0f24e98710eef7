"""How a launch over tables is shared out among threads."""

from collections.abc import Sequence

import numpy as np

from fastopt.kernels.cpu.threads import thread_count

PARTS_PER_THREAD = 8  # of a launch, so that threads that are held up do not hold up the others


def equal_parts(amounts: Sequence[int]) -> np.ndarray:
    """int64 [any number, 3]: tables, which have these amounts of work, each with a part and how many parts it
    has; the parts of a table are of about equal work.

    A thread takes one stretch of these. Rows of a large table come from memory, those of a small one from
    caches, and take a fraction of the time: so each table has as many parts in the stretch of each thread.
    """
    threads = thread_count()
    goal = max(1, sum(amounts) // PARTS_PER_THREAD)  # of all threads together
    return np.array(
        [
            (table, thread * share + part, threads * share)
            for thread in range(threads)
            for table, amount in enumerate(amounts)
            for share in [-(-amount // goal)]
            for part in range(share)
        ],
        np.int64,
    ).reshape(-1, 3)
