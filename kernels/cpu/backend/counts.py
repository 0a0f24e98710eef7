"""Where rows count their own updates: what is folded for the counts that a launch meets."""

import numpy as np

from fastopt.kernels.cpu.backend.indices import distinct_rows
from fastopt.kernels.work import CountFold, RowSteps, Segments


def counted_steps(counts: np.ndarray, segments: Segments, fold: CountFold, steps: int) -> RowSteps:
    """What a launch needs for rows that count their updates, ``counts`` so far: what is folded at each of the
    different counts that the rows of ``segments`` have after their next, ascending. There may be far fewer of
    those than ``steps``."""
    after = np.maximum(counts[distinct_rows(segments)], 0)
    return RowSteps(counts, fold(distinct(after).astype(np.float64) + 1.0))


def distinct(counts: np.ndarray) -> np.ndarray:
    """The different ones, ascending, in a time and memory that go by how many are given."""
    if not counts.size:
        return counts
    least, most = int(counts.min()), int(counts.max())
    if most - least >= counts.size:
        ascending = np.sort(counts)
        return ascending[np.append(True, ascending[1:] != ascending[:-1])]
    seen = np.zeros(most - least + 1, bool)
    seen[counts - least] = True
    return np.flatnonzero(seen) + least
