"""The memory of a device that waits for its next use, and the streams that used it.

Getting memory from the driver takes as long as a launch, so that what was given back is used again. What was
put on a stream is done in order: work on the stream that used memory can use it again at once. Where several
streams used it, the one that takes it over waits for the others, and the host does not.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

MOST_WAITING = 1 << 28  # bytes of memory that wait for their next use
MOST_STREAMS = 64  # that are told apart


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

    Garbage may be collected, and memory given back, in the middle of any of the methods: what is given back
    is only noted until nobody is at work on the pool.

    Args:
        stream: makes a stream, from what is given to :meth:`use`, which begins with its handle.
    """

    def __init__(self, stream: Callable[..., Any]) -> None:
        self._made = stream
        self._lock = threading.Lock()
        self._streams: OrderedDict[int, Any] = OrderedDict()  # by handle, the last used one last
        self._epochs: dict[int, int] = {}  # by handle: when work last began to go to the stream
        self._lent: dict[int, _Lent] = {}
        self._waiting: dict[tuple[int, int], list[Any]] = {}  # by capacity and handle
        self._waiting_bytes = 0
        self._freed: deque[int] = deque()  # addresses

    def use(self, handle: int, *given: Any) -> Any:
        """The stream of a handle, which work goes to from now on."""
        with self._lock:
            stream = self._streams.get(handle)
            if stream is not None and stream is self._last:
                return stream
            if stream is None:
                stream = self._made(handle, *given)
            self._epochs[handle] = 1 + max(self._epochs.values(), default=0)
            self._streams[handle] = stream
            self._streams.move_to_end(handle)
            if len(self._streams) > MOST_STREAMS and not stream.capturing():
                self._forget_one(stream)
            return stream

    @property
    def _last(self) -> Any:
        return next(reversed(self._streams.values()))

    def _forget_one(self, stream: Any) -> None:
        """Have a stream stand for the one that was used longest ago and is not captured."""
        for other in self._streams.values():
            if other is not stream and not other.capturing():
                break
        else:
            return
        stream.wait(other)
        handle = other.handle
        for capacity, own in [key for key in self._waiting if key[1] == handle]:
            self._waiting.setdefault((capacity, stream.handle), []).extend(self._waiting.pop((capacity, own)))
        del self._streams[handle], self._epochs[handle]

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

    def give_back(self, address: int) -> None:
        """Note that nobody needs the memory at an address any more."""
        self._freed.append(address)

    def settle(self) -> list[Closed]:
        """Let what was given back wait, for work on the stream that was used last; returns what is to be
        closed. Nothing happens while somebody is at work on the pool, or one of the streams captures:
        neither waiting nor closing is to become a part of a graph."""
        if not self._freed or not self._lock.acquire(blocking=False):
            return []
        addresses = [self._freed.popleft() for _ in range(len(self._freed))]  # more may come meanwhile
        closed = None
        try:
            closed = self._settled(addresses)
        finally:
            if closed is None:
                self._freed.extend(addresses)
            self._lock.release()
        return closed or []

    def _settled(self, addresses: list[int]) -> list[Closed] | None:
        """The same of these; None if they have to stay as they are."""
        own, others = self._last, self._users(addresses)
        lent = [self._lent[address] for address in addresses]
        large, overflows = any(one.capacity > MOST_WAITING for one in lent), self._overflows(lent)
        streams = [*self._streams.values()] if overflows else [own, *others]
        if (large or overflows or others) and any(stream.capturing() for stream in streams):
            return None
        for other in others:
            own.wait(other)
        for address in addresses:
            del self._lent[address]
        return self._let_wait(lent, own)

    def _users(self, addresses: list[int]) -> list[Any]:
        """The streams that work went to since memory was lent, but for the last."""
        since = min(self._lent[address].since for address in addresses)
        used = [self._streams[handle] for handle, epoch in self._epochs.items() if epoch >= since]
        return [stream for stream in used if stream is not self._last]

    def _overflows(self, lent: list[_Lent]) -> bool:
        """Whether there is too much memory for all that could wait to do so."""
        sizes = (own.capacity for own in lent if own.capacity <= MOST_WAITING)
        return self._waiting_bytes + sum(sizes) > MOST_WAITING

    def _let_wait(self, lent: list[_Lent], stream: Any) -> list[Closed]:
        closed: list[Closed] = []
        for own in lent:
            if own.capacity > MOST_WAITING:
                closed.append(Closed(own.buffer, stream))
                continue
            if self._overflows([own]):  # sizes that are no longer needed, too
                waiting, self._waiting, self._waiting_bytes = self._waiting, {}, 0
                pairs = [(key[1], buffer) for key, buffers in waiting.items() for buffer in buffers]
                closed += [Closed(buffer, self._streams[handle]) for handle, buffer in pairs]
            self._waiting.setdefault((own.capacity, stream.handle), []).append(own.buffer)
            self._waiting_bytes += own.capacity
        return closed
