"""Messages between the ranks of a process group: one all-to-all carries what many tables have to send."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

_ALIGNMENT = 8  # bytes; where each array in a message begins


class Field(NamedTuple):
    """An array in a message: its dtype and how many elements it has."""

    dtype: torch.dtype
    size: int

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * self.size


class Incoming:
    """What the others send, on its way. Nothing that was handed over is written until it has come."""

    def __init__(self, sent: torch.Tensor, received: torch.Tensor, sizes: Sequence[int], work: Any) -> None:
        self._kept: torch.Tensor | None = sent
        self._received = received
        self._sizes = sizes
        self._work = work

    def wait(self) -> list[torch.Tensor]:
        """What came of each rank, 1-D."""
        if self._work is not None:
            self._work.wait()
        self._work = self._kept = None
        return [*self._received.split(list(self._sizes))]


def send(parts: Sequence[torch.Tensor], sizes: Sequence[int], group: Any, *, wait: bool = True) -> Incoming:
    """Send each rank its part and take what they send.

    Args:
        parts: for each rank, 1-D, of one dtype. sizes: how many elements each rank sends here.
        wait: whether all has come when this returns.
    """
    sent = torch.cat([*parts])
    received = sent.new_empty(sum(sizes))
    lengths = [part.numel() for part in parts]
    work = dist.all_to_all_single(received, sent, [*sizes], lengths, group=group, async_op=not wait)
    return Incoming(sent, received, sizes, work)


def exchange(parts: Sequence[torch.Tensor], sizes: Sequence[int], group: Any) -> list[torch.Tensor]:
    """The same, with what came."""
    return send(parts, sizes, group).wait()


def packed(arrays: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Arrays of any dtypes as the bytes of one message."""
    pieces = []
    for array in arrays:
        flat = array.contiguous().reshape(-1)
        # Of one element or none, any stride is contiguous, but not to view.
        own = flat.as_strided(flat.shape, (1,)).view(torch.uint8)
        pieces += [own, own.new_zeros(-own.numel() % _ALIGNMENT)]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8, device=device)


def packed_size(fields: Sequence[Field]) -> int:
    """How many bytes a message with these has."""
    return sum(field.bytes + -field.bytes % _ALIGNMENT for field in fields)


def unpacked(message: torch.Tensor, fields: Sequence[Field]) -> list[torch.Tensor]:
    """The arrays of a message, views of it."""
    found, at = [], 0
    for field in fields:
        found.append(message[at : at + field.bytes].view(field.dtype))
        at += field.bytes + -field.bytes % _ALIGNMENT
    return found
