"""What this machine's processor offers, and what kernels make of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba

from fastopt.kernels.cpu.cache import cache_for
from fastopt.kernels.cpu.dense import update_arrays
from fastopt.kernels.cpu.threads import launcher

_WIDTHS = ("avx512f", 512), ("avx2", 256), ("neon", 128), ("sse2", 128)  # bits of a vector register


def about() -> Iterator[tuple[str, str]]:
    """Lines for a person: what, and how it is here."""
    features = llvmlite.binding.get_host_cpu_features()
    width = next((bits for name, bits in _WIDTHS if features.get(name)), None)
    launcher.start()
    yield "processor", llvmlite.binding.get_host_cpu_name()
    yield "vector width", "unknown" if width is None else f"{width} bits"
    yield "threads", f"{numba.get_num_threads()} of {numba.config.NUMBA_NUM_THREADS}"  # type: ignore[attr-defined]
    yield "threading layer", launcher.layer or "none, without JIT"
    kernel: Any = update_arrays
    folder = getattr(cache_for(kernel.__wrapped__), "cache_path", None)
    yield "kernels kept in", "nowhere" if folder is None else str(Path(folder))
