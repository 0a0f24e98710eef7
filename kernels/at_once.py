"""Changes that belong together, made where nothing can come between them."""

import operator
from collections import deque
from collections.abc import Callable, Iterable


def at_once(calls: Iterable[Callable[[], object]]) -> None:
    """Make the calls in turn, with no signal handler run between them.

    Python runs the handlers of signals, which may raise, between byte codes. The loop over the calls is in C:
    if they are callables of C too, there is no byte code until the last has returned. Such are a compiled
    kernel, ``functools.partial`` of ``setattr``, of ``operator.setitem`` or of ``os.replace``, a ufunc, a
    method of ``dict`` or ``list``; many functions of NumPy (``np.copyto``) are not. An exception that a call
    raises itself ends the loop there.
    """
    deque(map(operator.call, calls), maxlen=0)
