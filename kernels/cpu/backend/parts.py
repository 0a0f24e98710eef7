"""How a launch over tables is shared out among threads."""

import functools
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
    goal = max(1, sum(amounts) // PARTS_PER_THREAD)  # of all threads together
    return _shares_of(thread_count(), tuple(-(-amount // goal) for amount in amounts))


@functools.lru_cache(maxsize=64)
def _shares_of(threads: int, shares: tuple[int, ...]) -> np.ndarray:
    """The parts of tables of which each thread has so many; not to be changed, since it is kept: batches are
    of about equal sizes, and making it takes longer than the kernel of a small one."""
    return np.array(
        [
            (table, thread * share + part, threads * share)
            for thread in range(threads)
            for table, share in enumerate(shares)
            for part in range(share)
        ],
        np.int64,
    ).reshape(-1, 3)
