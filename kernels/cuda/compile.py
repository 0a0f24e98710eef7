"""What touches numba-cuda's internals and the linker: kernels become PTX, and this machine code, for a GPU
that need not be there."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import types

from fastopt.kernels.forks import hold

ROW_STACK = "row_stack"  # a name of vstack that NumPy 2.5 has no more


@contextmanager
def _with_row_stack() -> Iterator[None]:
    """numba-cuda 0.30 looks up ``numpy.row_stack`` when it is loaded and when it first compiles."""
    if hasattr(np, ROW_STACK):
        yield
        return
    setattr(np, ROW_STACK, np.vstack)
    try:
        yield
    finally:
        delattr(np, ROW_STACK)


with _with_row_stack():
    from numba.cuda import compiler as numba_compiler
    from numba.cuda import dispatcher

compiler: Any = numba_compiler  # whose names are its own

_lock = threading.RLock()
hold(_lock)

KINDS = {int: types.int64, float: types.float64}  # of kernels' arguments


def ptx(
    kernel: Callable, arguments: tuple[type, ...], ccs: Sequence[tuple[int, int]]
) -> tuple[list[str], str]:
    """PTX of ``kernel`` for GPUs of each of these compute capabilities, and its name there, for arguments
    that are int or float.

    Products and sums are rounded apart, as on the CPU: without this switch they become one instruction with
    one rounding, and other bits.
    """
    signature = types.void(*(KINDS[kind] for kind in arguments))
    with _lock, _with_row_stack():
        # The functions that a kernel calls are compiled for the current device, and without a driver there is
        # none; for other threads there may be one.
        current_device, own = dispatcher.get_current_device, threading.get_ident()
        device = SimpleNamespace(compute_capability=ccs[0])
        dispatcher.get_current_device = lambda: device if threading.get_ident() == own else current_device()
        try:
            library, _ = compiler._compile_pyfunc_with_fixup(
                kernel, signature, device=False, cc=ccs[0], abi="numba"
            )
            library._nvvm_options["fma"] = False
            return [library.get_asm_str(cc=cc) for cc in ccs], library._entry_name
        finally:
            dispatcher.get_current_device = current_device


def cubin(text: str, cc: tuple[int, int], most_registers: int | None = None) -> bytes:
    """The machine code of PTX, which needs no driver."""
    from cuda.bindings import nvjitlink

    options = [f"-arch=sm_{cc[0]}{cc[1]}"]
    if most_registers is not None:
        options.append(f"-maxrregcount={most_registers}")
    handle = nvjitlink.create(len(options), options)
    try:
        data = text.encode() + b"\0"
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, data, len(data), "kernel")
        nvjitlink.complete(handle)
        made = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, made)
        return bytes(made)
    finally:
        nvjitlink.destroy(handle)
