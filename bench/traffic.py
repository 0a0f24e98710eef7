"""The floor: kernels with the loads and stores of an update and no arithmetic to speak of."""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import prange


@numba.njit(parallel=True)
def _one(p, g):
    for i in prange(p.size):
        p[i] += g[i]


@numba.njit(parallel=True)
def _two(p, g, a):
    for i in prange(p.size):
        x = g[i]
        p[i] += x
        a[i] += x


@numba.njit(parallel=True)
def _three(p, g, a, b):
    for i in prange(p.size):
        x = g[i]
        p[i] += x
        a[i] += x
        b[i] += x


@numba.njit(parallel=True)
def _four(p, g, a, b, c):
    for i in prange(p.size):
        x = g[i]
        p[i] += x
        a[i] += x
        b[i] += x
        c[i] += x


KERNELS = {1: _one, 2: _two, 3: _three, 4: _four}


def floor(p: np.ndarray, g: np.ndarray, states: int) -> Callable[[], Any]:
    """A call that reads ``g``, and reads and writes ``p`` and ``states`` arrays as large."""
    kernel = KERNELS[1 + states]
    extra = [np.zeros_like(p) for _ in range(states)]
    return lambda: kernel(p, g, *extra)
