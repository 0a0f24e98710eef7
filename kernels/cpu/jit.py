"""How kernels for the CPU are compiled: the one place where JIT options are decided.

Options, each for a reason:

- strict IEEE arithmetic, no ``fastmath``: a loop's vector body, its tail, the serial and the
  parallel variant then give the same bits, and NaN and infinity survive. The element-wise
  kernels vectorise without it and are bound by memory.
- ``error_model="numpy"``: a division that checks for zero stops a loop from vectorising.
- ``nogil=True``: other Python threads go on while a kernel runs.
- lazy signatures: ``import fastopt`` compiles nothing.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import numba

from fastopt.kernels.cpu.cache import cache_for
from fastopt.kernels.cpu.threads import launcher, runs_serial
from fastopt.kernels.lazy import lazy
from fastopt.kernels.signals import deferred

_config: Any = numba.config  # its attributes are set at run time
_njit: Any = numba.njit  # its type leaves out some options

OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True}


def helper(function: Callable, **options: Any) -> Any:
    """Decorate a function that only CPU kernels call: compiled once, shared by both variants."""
    return _njit(function, no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS, **options)


def restricted_helper(function: Callable) -> Any:
    """A :data:`helper` whose array arguments never overlap, compiled into its callers.

    Else the compiler checks that before each loop, a row of 8 elements then costing 8 times as much.
    """
    dispatcher = helper(function, forceinline=True)
    compiler = getattr(dispatcher, "_compiler", None)  # none without JIT
    if compiler is not None:
        customize = compiler._customize_flags

        def without_overlap(flags: Any) -> Any:
            flags = customize(flags)
            flags.noalias = True
            return flags

        compiler._customize_flags = without_overlap
    return dispatcher


class Kernel:
    """A function in two compiled variants, ``parallel``, for its ``prange`` loops, and ``serial``.

    ``kernel(work, *args)`` runs the one that suits ``work``, the number of elements touched.
    """

    def __init__(self, function: Callable) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._entries: dict[tuple, Callable] = {}  # by variant and types of arguments

    def __call__(self, work: int, *args: Any) -> None:
        if runs_serial(work):
            self.serial(*args)
        else:
            launcher.launch(self.parallel, args)

    def ready(self, work: int, args: tuple, types: Hashable) -> Callable[[], None]:
        """The call of the variant that suits ``work`` with these arguments, compiled, in which no Python code
        runs: for :func:`~fastopt.kernels.cpu.threads.run`.

        ``types`` differs where the types of the arguments do: Numba takes as long to find them as a small
        kernel to run.
        """
        serial = runs_serial(work)
        entry = self._entries.get((serial, types))
        if entry is None:
            entry = self._entries[serial, types] = _entry(self.serial if serial else self.parallel, args)
        if not serial:
            launcher.start()
        return functools.partial(entry, *args)

    @lazy
    def serial(self) -> Callable:
        return _compile(self._function, parallel=False)

    @lazy
    def parallel(self) -> Callable:
        return _compile(self._function, parallel=True)


def _entry(dispatcher: Any, args: tuple) -> Callable:
    if _config.DISABLE_JIT:
        return dispatcher
    return dispatcher.compile(tuple(map(numba.typeof, args)))


class Direct:
    """A small function that is called often: compiled for the types of its first call, and not to be called
    with others. It holds the global interpreter lock."""

    def __init__(self, function: Callable) -> None:
        self.__doc__ = function.__doc__
        self._function = function
        self.call: Callable = self._first_call

    def _first_call(self, *args: Any) -> Any:
        self.call = _entry(_compile(self._function, parallel=False, nogil=False), args)
        return self.call(*args)


def _compile(function: Callable, parallel: bool, **options: Any) -> Callable:
    dispatcher = _njit(parallel=parallel, no_cfunc_wrapper=True, **{**OPTIONS, **options})(function)
    if not _config.DISABLE_JIT:
        dispatcher._cache = cache_for(function, parallel)
        dispatcher.compile = deferred()(dispatcher.compile)  # or loads from the cache
    return dispatcher
