"""The memory of a device that waits for its next use, and the streams that used it.

Getting memory from the driver takes as long as a launch, so that what was given back is used again. What was
put on a stream is done in order: work on the stream that used memory can use it again at once. Where several
streams used it, the one that takes it over waits for the others, and the host does not.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

MOST_WAITING = 1 << 28  # bytes of memory that wait for their next use
MOST_STREAMS = 64  # that are told apart; work on others is ordered by them


class Stream(Protocol):
    """What a pool asks of a stream of its device.

    handle: that of the driver, which is another stream's only once this object is gone.
    """

    handle: int

    def wait(self, other: Any) -> None:
        """Have later work wait for what was put on another stream so far."""

    def capturing(self) -> bool:
        """Whether work is being put into a graph in place of being done."""


class Closed(NamedTuple):
    """Memory to give back to the driver, once what was put on ``stream`` is done."""

    buffer: Any
    stream: Any


class _Lent(NamedTuple):
    """``since``: the epoch of the stream that it was lent to."""

    buffer: Any
    capacity: int
    since: int


def capacity_of(nbytes: int) -> int:
    """The size of a buffer for so many bytes: few different ones, so that those that wait fit later needs;
    of one that will not wait, no more than it takes."""
    if nbytes > MOST_WAITING:
        return nbytes
    eighth = 1 << max(nbytes.bit_length() - 4, 8)
    return -(-nbytes // eighth) * eighth


class Pool:
    """The buffers of a device.

    Args:
        stream: makes a stream, from what is given to :meth:`use`, which begins with its handle.
    """

    def __init__(self, stream: Callable[..., Any]) -> None:
        self._made = stream
        self._lock = threading.RLock()  # a collection of garbage may come while it is held
        self._streams: OrderedDict[int, Any] = OrderedDict()  # by handle, the last used one last
        self._epochs: dict[int, int] = {}  # by handle: when work last began to go to the stream
        self._lent: dict[int, _Lent] = {}
        self._waiting: dict[tuple[int, int], list[Any]] = {}  # by capacity and handle
        self._waiting_bytes = 0
        self._late: list[int] = []  # addresses given back while work was captured

    def use(self, handle: int, *given: Any) -> Any:
        """The stream of a handle, which work goes to from now on."""
        with self._lock:
            if self._streams and self._last.handle == handle:
                return self._last
            stream = self._streams.pop(handle, None)
            if stream is None:
                stream = self._made(handle, *given)
            if len(self._streams) >= MOST_STREAMS and not stream.capturing():
                self._forget(next(iter(self._streams)), stream)
            self._epochs[handle] = 1 + max(self._epochs.values(), default=0)
            self._streams[handle] = stream
            return stream

    @property
    def _last(self) -> Any:
        return next(reversed(self._streams.values()))

    def _forget(self, handle: int, stream: Any) -> None:
        """Have another stream stand for that of a handle."""
        stream.wait(self._streams.pop(handle))
        del self._epochs[handle]
        for capacity, own in [key for key in self._waiting if key[1] == handle]:
            self._waiting.setdefault((capacity, stream.handle), []).extend(self._waiting.pop((capacity, own)))

    def taken(self, capacity: int, stream: Any) -> Any:
        """A buffer that waited, for work on a stream; None if there is none."""
        with self._lock:
            waiting = self._waiting.get((capacity, stream.handle))
            if not waiting:
                return None
            self._waiting_bytes -= capacity
            return waiting.pop()

    def lend(self, buffer: Any, capacity: int, stream: Any) -> int:
        """Remember a buffer that work on a stream begins to use; returns its address."""
        address = int(buffer.handle)
        with self._lock:
            self._lent[address] = _Lent(buffer, capacity, self._epochs.get(stream.handle, 0))
        return address

    def take_back(self, address: int) -> list[Closed]:
        """Let a buffer wait, for work on the stream that was used last; returns those that are to be
        closed."""
        with self._lock:
            own, late = self._last, [*self._late, address]
            since = min(self._lent[each].since for each in late)
            others = [
                stream
                for handle, stream in self._streams.items()
                if self._epochs[handle] >= since and stream is not own
            ]
            nbytes = self._waiting_bytes + sum(self._lent[each].capacity for each in late)
            # Neither waiting nor closing is to become a part of a graph.
            if (others or nbytes > MOST_WAITING) and any(each.capturing() for each in (own, *others)):
                self._late = late
                return []
            for other in others:
                own.wait(other)
            self._late = []
            return [closed for each in late for closed in self._let_wait(self._lent.pop(each), own)]

    def _let_wait(self, lent: _Lent, stream: Any) -> list[Closed]:
        if lent.capacity > MOST_WAITING:
            return [Closed(lent.buffer, stream)]
        closed: list[Closed] = []
        if self._waiting_bytes + lent.capacity > MOST_WAITING:  # sizes that are no longer needed, too
            closed = [
                Closed(buffer, self._streams[handle])
                for (_, handle), buffers in self._waiting.items()
                for buffer in buffers
            ]
            self._waiting.clear()
            self._waiting_bytes = 0
        self._waiting.setdefault((lent.capacity, stream.handle), []).append(lent.buffer)
        self._waiting_bytes += lent.capacity
        return closed
