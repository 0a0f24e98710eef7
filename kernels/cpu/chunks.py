"""Loops in chunks, each a turn of for_each.py: a turn for every number would cost more than what it does."""

from fastopt.kernels.cpu.jit import helper


@helper
def chunk_count(size, length):
    """How many chunks there are of ``size`` numbers, ``length`` each but for the last."""
    return (size + length - 1) // length


@helper
def chunk_ends(chunk, length, size):
    """The first number of a chunk, and the one after its last."""
    first = chunk * length
    return first, min(first + length, size)
