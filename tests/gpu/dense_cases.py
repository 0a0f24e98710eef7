"""Dense updates on two backends, of the same numbers: the CPU's and a device's."""

from typing import Any

import numpy as np

from fastopt.kernels.formats import BLOCK, Format
from fastopt.kernels.rule import L2, Decoupled, Rule, Scaled

OPTIONS = {
    "lr": 0.03,
    "momentum": 0.8,
    "dampening": 0.3,
    "lr_decay": 0.1,
    "momentum_decay": 0.2,
    "alpha": 0.9,
    "betas": (0.8, 0.95),
    "beta": 0.8,
    "beta2_decay": -0.8,
    "d": 0.5,
    "weight_decay": 0.125,
}


def numbers_of(rule: Rule, decay: type, step: int, compute: Any, scale: float, limit: float) -> tuple:
    """h and c of a step; every third step with Nesterov's momentum."""
    eps = (1e-4, 1e-3) if rule.matrix_slots else 1e-3
    options = {**OPTIONS, "eps": eps, "nesterov": step % 3 == 0}
    own = {Scaled: (), L2: (0.1,), Decoupled: (1.0 - 0.03 * 0.1,)}[decay]
    return rule.fold(step, options, compute), decay(scale, limit, *own)


def stored(kind: Format, size: int, compute: Any, rng: Any, positive: bool) -> list:
    """What lies at the two addresses of an array: elements and, or None, its master or scales."""
    x = rng.standard_normal(size).astype(compute)
    x = np.abs(x) if positive else x
    if kind.coded:
        scales = (np.abs(rng.standard_normal(-(-size // BLOCK))) + 0.1).astype(np.float32)
        return [rng.integers(0, 256, size).astype(np.uint8), scales]
    if kind.stored is None:
        return [x, None]
    held = x.astype(np.float32).astype(kind.dtype)
    held = held.view(kind.stored) if kind.dtype.itemsize == np.dtype(kind.stored).itemsize else held
    return [held, x if kind.master else None]
