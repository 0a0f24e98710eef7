"""Kernels: made for a rule, formats and a device when they are first needed, and launched."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from fastopt.kernels.cuda.cache import KernelFiles
from fastopt.kernels.cuda.compile import ptx
from fastopt.kernels.cuda.driver import driver
from fastopt.kernels.signals import deferred


class Kernel:
    """A kernel whose arguments are numbers: int64 (addresses, sizes) and float64.

    Args:
        make: makes its source, a function without default arguments, from the arguments ``what``.
        kinds: int or float, of each argument.
        threads: of a block.
        most_registers: of a thread, None for no limit.
    """

    def __init__(
        self,
        make: Callable[..., Callable],
        what: tuple,
        kinds: Sequence[type],
        threads: int,
        most_registers: int | None = None,
    ) -> None:
        self.kinds = tuple(kinds)
        self.threads = threads
        self.most_registers = most_registers
        self._make = make
        self._what = what
        self._loaded: dict[int, Any] = {}  # by device

    def ready(self, device: int, grid: int, *arguments: int | float) -> Callable[[], object]:
        """The call that launches ``grid`` blocks of it, its machine code ready."""
        kernel = self._loaded.get(device)
        if kernel is None:
            kernel = self._loaded[device] = self._load(device)
        return driver().launcher(device, kernel, grid, self.threads, arguments)

    def code(self, *ccs: tuple[int, int]) -> tuple[list[str], str]:
        """Its PTX for each of these compute capabilities, and its name there."""
        return ptx(self._make(*self._what), self.kinds, ccs)

    @deferred()
    def _load(self, device: int) -> Any:
        own = driver()
        cc = own.compute_capability(device)
        files = _files(self._make)
        key = files.key(self._what, cc, self.kinds, self.most_registers, own.code)
        found = files.load(key)
        if found is None:
            [text], name = self.code(cc)
            found = own.translate(text, cc, self.most_registers), name
            files.save(key, found)
        return own.load(device, *found)


_files = functools.cache(KernelFiles)


def kernel(kinds: str, threads: int, most_registers: int | None = None) -> Callable[[Callable], Any]:
    """Decorate a function that makes the source of a kernel, for what its machine code depends on: it then
    makes the :class:`Kernel`, once for the same arguments. ``kinds``: a letter for each argument of the
    kernel, ``i`` for an int64 and ``f`` for a float64."""
    types = tuple({"i": int, "f": float}[letter] for letter in kinds)

    def decorate(make: Callable[..., Callable]) -> Callable[..., Kernel]:
        @functools.cache
        @functools.wraps(make)
        def made(*what: Any) -> Kernel:
            return Kernel(make, what, types, threads, most_registers)

        return made

    return decorate
