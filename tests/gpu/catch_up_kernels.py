"""The kernels by which rows catch up: of each way that missed steps are made up for."""

from collections.abc import Iterator

import numpy as np

from fastopt.kernels import rules
from fastopt.kernels.cuda.catch_up import catch_up_rows, tabulate
from fastopt.kernels.cuda.launch import Kernel
from fastopt.kernels.formats import BLOCK, Format
from fastopt.kernels.rule import L2, Adaptive, Decoupled, Linear, Loop, Still
from gpu.dense_kernels import DOUBLE, SINGLE, STORED, code

MADE_UP_FOR = [
    (rules.SGD, L2, Still),
    (rules.ROWWISE_ADAGRAD, Decoupled, Still),
    (rules.MOMENTUM, L2, Linear),
    (rules.ADAM, Decoupled, Adaptive),
    (rules.ROWWISE_ADAM, Decoupled, Adaptive),
    (rules.LION, Decoupled, Loop),
    (rules.ADAM, L2, Loop),
    (rules.ROWWISE_ADAM, L2, Loop),
    (rules.LAMB, Decoupled, Loop),
]


def catch_up_kernels() -> Iterator[tuple[str, str, Kernel]]:
    """Of each kernel a name, the bytes that it moves for an element, and the kernel."""
    for kind in (Still, Linear, Adaptive):
        for compute in (SINGLE, DOUBLE):
            yield f"coefficients: {kind.__name__}, {compute}", "-", tabulate(kind, compute)
    for rule, decay, kind in MADE_UP_FOR:
        for name, parameter, gradient, signed, not_negative, compute in STORED:
            slots = [not_negative if slot in rule.not_negative else signed for slot in rule.state_slots]
            own = code(rule, decay, (parameter, gradient, *slots), compute)
            title = f"{kind.__name__}, {rule.hyper.__name__.removesuffix('H')}, {name}"
            yield f"catch up: {title}", _moved(own.formats, compute), catch_up_rows(own, kind)


def _moved(formats: tuple[Format, ...], compute: np.dtype) -> str:
    """Bytes of an element that are read and written; of a master, both copies are written and one is read."""
    total = 0.0
    for kind in (formats[0], *formats[2:]):
        own = kind.itemsize(compute) + (4 / BLOCK if kind.coded else 0)
        total += own + 2 * compute.itemsize if kind.master else 2 * own
    return f"{total:g}"
