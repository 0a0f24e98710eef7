"""Signals that come while something runs that an exception must not cut in two."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def deferred() -> Iterator[None]:
    """Let the Python handlers of signals, which may raise, run after the block, not in it.

    That suits what is rare and can't be tried again, as a compilation: it can leave its registries half
    filled for ever, and in a callback of LLVM an exception is lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread alone
        return
    handlers: dict[int, Callable] = {}
    arrived: dict[int, None] = {}
    try:
        for number in range(1, signal.NSIG):  # signal.valid_signals takes longer than all that follows
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, lambda number, _: arrived.setdefault(number))
        yield
    finally:
        try:
            _restore(handlers)
        finally:
            _deliver(list(arrived))


def _restore(handlers: Mapping[int, Any]) -> None:
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    except BaseException:  # of a handler that is back already
        _restore(handlers)
        raise


def _deliver(numbers: list[int]) -> None:
    """Raise the signals in turn, the next one although a handler raises."""
    if numbers:
        try:
            signal.raise_signal(numbers.pop(0))
        finally:
            _deliver(numbers)
