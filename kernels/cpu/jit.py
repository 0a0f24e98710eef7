"""How kernels for the CPU are compiled: the one place where JIT options are decided.

Options, each for a reason:

- strict IEEE arithmetic, no ``fastmath``: a loop's vector body and its tail then give the same bits,
  and NaN and infinity survive. The element-wise kernels vectorise without it and are bound by memory.
- ``error_model="numpy"``: a division that checks for zero stops a loop from vectorising.
- ``nogil=True``: other Python threads go on while a kernel runs.
- lazy signatures: ``import fastopt`` compiles nothing.
"""

import functools
import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
from numba.core.compiler_lock import global_compiler_lock

from fastopt.kernels import linked
from fastopt.kernels.cpu.cache import cache_for
from fastopt.kernels.cpu.for_each import turns
from fastopt.kernels.cpu.threads import launcher, runs_serial
from fastopt.kernels.lazy import lazy
from fastopt.kernels.signals import deferred

_config: Any = numba.config  # its attributes are set at run time
_njit: Any = numba.njit  # its type leaves out some options

OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True}


def helper(function: Callable) -> Any:
    """Decorate a function that only CPU kernels call: it is compiled with each kernel that does (see
    linked.py)."""
    return _helper(function, linked.Helper)


def inlined_helper(function: Callable) -> Any:
    """A :data:`helper` that becomes part of what calls it: a call with arrays among its arguments takes as
    long as the work on a short row."""
    return _helper(function, linked.Helper, forceinline=True)


def optimised_helper(function: Callable) -> Any:
    """A :data:`helper` that is optimised before it is linked into its kernel, and once more there: a sparse
    step of Adam gains 4 to 7%."""
    return _helper(function, linked.OptimisedHelper)


def restricted_helper(function: Callable) -> Any:
    """A :data:`helper` whose array arguments never overlap.

    Else the compiler checks that before each loop, a row of 8 elements then costing 8 times as much.
    """
    return _helper(function, linked.RestrictedHelper, forceinline=True)


def _helper(function: Callable, pipeline: type, **options: Any) -> Any:
    return _njit(function, **{**linked.OF_HELPERS, "pipeline_class": pipeline, **OPTIONS, **options})


class Kernel:
    """A function whose first argument, ``team``, says who runs its loops (see for_each.py). It is called
    without this argument:

    ``kernel(work, *args)`` has the threads run them if that suits ``work``, the number of elements touched.
    """

    def __init__(self, function: Callable) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._entries: dict[Hashable, Callable] = {}  # by types of arguments

    def __call__(self, work: int, *args: Any) -> None:
        own = team(work)
        if own:
            launcher.launch(self.compiled, (own, *args))
        else:
            self.compiled(own, *args)

    def ready(self, work: int, args: tuple, types: Hashable) -> Callable[[], None]:
        """The call with these arguments, compiled, in which no Python code runs: for
        :func:`~fastopt.kernels.cpu.threads.run`.

        ``types`` differs where the types of the arguments do: Numba takes as long to find them as a small
        kernel to run.
        """
        args = team(work), *args
        entry = self._entries.get(types)
        if entry is None:
            entry = self._entries[types] = _entry(self.compiled, args)
        return functools.partial(entry, *args)

    @lazy
    def compiled(self) -> Callable:
        return _compile(self._function)


def team(work: int) -> int:
    """The address of what has the threads run a loop, or 0 where one thread suits ``work`` elements."""
    if runs_serial(work) or _config.DISABLE_JIT:
        return 0
    launcher.start()
    return _turns_address()


@functools.cache
def _turns_address() -> int:
    dispatcher: Any = _compile(turns, no_cfunc_wrapper=False)
    dispatcher.compile((numba.int64,) * 3)
    [found] = dispatcher.overloads.values()
    return found.library.get_pointer_to_function(found.fndesc.llvm_cfunc_wrapper_name)


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
        self.call = _entry(_compile(self._function, nogil=False), args)
        return self.call(*args)


def _compile(function: Callable, **options: Any) -> Callable:
    dispatcher = _njit(**{"no_cfunc_wrapper": True, **OPTIONS, **options})(function)
    if not _config.DISABLE_JIT:
        dispatcher._cache = cache_for(function)
        # Forks wait for the lock (see forks.py): else a child could be left without collections for ever.
        compile_or_load = global_compiler_lock(_uncollected()(dispatcher.compile))
        dispatcher.compile = deferred()(compile_or_load)
    return dispatcher


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without collections of garbage: they take a tenth of the time of a compilation, most of whose objects
    live on."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
