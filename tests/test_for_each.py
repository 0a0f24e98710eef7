"""Loops whose turns threads share."""

import numpy as np
import pytest

from fastopt.kernels.cpu.for_each import for_each
from fastopt.kernels.cpu.jit import Kernel, helper
from fastopt.kernels.cpu.threads import PARALLEL_FROM


@helper
def count_turn(k, counts, failing):
    if k == failing:
        raise MemoryError("none is left")
    counts[k] += 1


@Kernel
def count_turns(team, counts, failing):
    for_each(team, count_turn, counts.size, (counts, failing))


@pytest.mark.parametrize("work", [1, PARALLEL_FROM], ids=["one thread", "all threads"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 1_000])
def test_every_turn_is_taken_once(work, count):
    counts = np.zeros(count, np.int64)
    count_turns(work, counts, -1)
    np.testing.assert_array_equal(counts, 1)


@pytest.mark.parametrize("work", [1, PARALLEL_FROM], ids=["one thread", "all threads"])
@pytest.mark.parametrize("failing", [0, 57, 99])
def test_too_little_memory_is_told(work, failing):
    counts = np.zeros(100, np.int64)
    with pytest.raises(MemoryError):
        count_turns(work, counts, failing)
    count_turns(work, counts, -1)
    assert (counts > 0).all()
