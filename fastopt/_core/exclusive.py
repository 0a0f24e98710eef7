"""Methods of an object that is for one thread at a time."""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def exclusive(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Have a method raise RuntimeError while this or another such method of the same object is at work: in
    another thread, or in this one, from a signal handler or from a function that was passed to it. The object
    has a dict ``calls``, used as a set, of those that are.

    A lock would stay taken where a signal handler raises before the block that releases it is entered. Here
    a call is entered within the block, and leaves by the first thing done at its end, which is a call of C.
    """

    @functools.wraps(method)
    def guarded(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        calls, own = self.calls, object()
        try:
            calls[own] = None
            if len(calls) > 1:
                raise RuntimeError(
                    f"{type(self).__name__}.{method.__name__} was called while another call of the same "
                    "object is at work, in another thread or in a signal handler, or was when this process "
                    "was forked: expected one at a time"
                )
            return method(self, *args, **kwargs)
        finally:
            calls.pop(own, None)

    return guarded
