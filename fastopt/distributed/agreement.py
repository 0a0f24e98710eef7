"""What all ranks have to be given alike, compared before anything is built on it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

Described = dict[str, Any]  # by what it is called in messages


def rank_in(group: Any) -> int:
    """The rank of this process in a group.

    Raises:
        ValueError: it is no member.
    """
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"process {dist.get_rank()} is not in group: expected its members alone")
    return rank


@contextmanager
def agree(group: Any) -> Iterator[Described]:
    """Compare what is put into the dict on all ranks at the end of the block; an error within the block on
    one rank is one of all.

    Raises:
        ValueError: two ranks differ; the same on every rank. Or another rank has raised.
    """
    described: Described = {}
    error: Exception | None = None
    try:
        yield described
    except Exception as own:
        error = own
    said = described if error is None else f"{type(error).__name__}: {error}"
    found = gathered(said, group)
    if error is not None:
        raise error
    for rank, other in enumerate(found):
        if isinstance(other, str):
            raise ValueError(f"rank {rank} was refused: {other}")
    check_same(found)


def gathered(own: Any, group: Any) -> list[Any]:
    """What each rank hands in, on every rank."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, own, group=group)
    return found


def check_same(found: Sequence[Described]) -> None:
    """Refuse what differs between ranks.

    Raises:
        ValueError: two ranks differ; the same on every rank.
    """
    for rank, other in enumerate(found):
        for name in {**found[0], **other}:
            if found[0].get(name) != other.get(name):
                raise ValueError(_difference(name, found[0].get(name), other.get(name), rank))


def _difference(name: str, first: Any, other: Any, rank: int) -> str:
    if isinstance(first, dict) and isinstance(other, dict):
        name, first, other = next(
            (f"{name}.{key}", first[key], other[key]) for key in first if first[key] != other[key]
        )
    return f"{name} is {first!r} on rank 0 and {other!r} on rank {rank}: expected the same of all ranks"
