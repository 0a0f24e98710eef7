"""The kernels of dense updates: of every rule, and of each way that arrays are stored."""

from collections.abc import Iterator

import numpy as np

from fastopt.kernels import rules
from fastopt.kernels.cuda import factored, settings, trust
from fastopt.kernels.cuda.dense import update_arrays
from fastopt.kernels.cuda.elements import Code
from fastopt.kernels.cuda.launch import Kernel
from fastopt.kernels.formats import BFLOAT16, BFLOAT16_OF, PLAIN, ROOT8, SIGNED8, STOCHASTIC, Format
from fastopt.kernels.rule import L2, RULES, Decoupled, Rule, Scaled

FLAGS = {"nesterov"}  # fields of hyperparameters that are flags
SINGLE, DOUBLE = np.dtype(np.float32), np.dtype(np.float64)
# name, of the parameter, the gradient, a slot that may be negative and one that is not; computed with
STORED = [
    ("float32", PLAIN, PLAIN, PLAIN, PLAIN, SINGLE),
    ("bfloat16 state", PLAIN, PLAIN, STOCHASTIC, STOCHASTIC, SINGLE),
    ("8-bit state", PLAIN, PLAIN, SIGNED8, ROOT8, SINGLE),
    ("bfloat16 with master", BFLOAT16_OF, BFLOAT16, STOCHASTIC, STOCHASTIC, SINGLE),
    ("bfloat16", BFLOAT16, BFLOAT16, STOCHASTIC, STOCHASTIC, SINGLE),
    ("float64", PLAIN, PLAIN, PLAIN, PLAIN, DOUBLE),
]


def code(rule: Rule, decay: type, formats: tuple[Format, ...], compute: np.dtype) -> Code:
    flags = tuple(name in FLAGS for name in rule.hyper._fields)  # type: ignore[attr-defined]
    return Code(rule.hyper, flags, decay, compute, formats)


def moved(own: Code, reads: int, writes: int = 0) -> str:
    """Bytes of an element: of ``reads`` arrays in these formats that are read and of all but the gradient, if
    ``writes``."""
    read = [_bytes(kind, own.compute, kind.master) for kind in own.formats]
    written = [_bytes(kind, own.compute, False) + 4 * kind.master for kind in own.formats]
    total = sum(read[:reads]) + writes * (sum(written) - written[1])
    return f"{total:g}"


def _bytes(kind: Format, compute: np.dtype, master: bool) -> float:
    scale = 4 / 256 if kind.coded else 0
    return (compute.itemsize if master else kind.itemsize(compute)) + scale


def dense_kernels() -> Iterator[tuple[str, str, Kernel]]:
    """Of each kernel a name, the bytes that it moves for an element, and the kernel."""
    decays = [L2, Scaled, Decoupled]
    elementwise = [
        rule
        for hyper, rule in RULES.items()
        if hyper.__module__.startswith("fastopt.kernels.rules.") and not rule.row_slots
    ]
    for i, rule in enumerate(elementwise):
        decay = Scaled if rule.own_decay else decays[i % 3]
        for name, parameter, gradient, signed, not_negative, compute in STORED:
            slots = (not_negative if slot in rule.not_negative else signed for slot in rule.state_slots)
            own = code(rule, decay, (parameter, gradient, *slots), compute)
            title = f"{rule.hyper.__name__.removesuffix('H')}, {name}"
            yield f"dense: {title}", moved(own, len(own.formats), 1), update_arrays(own)
            if rule.trust_ratio:
                yield f"squares: {title}", moved(own, len(own.formats)), trust.sum_directions(own)
                if parameter is PLAIN and signed is PLAIN:
                    yield f"trust ratios: {title}", "-", trust.find_trust_ratios(own)
    for name, parameter, gradient, signed, _, compute in STORED:
        if signed is PLAIN or parameter.master:
            own = code(rules.ADAFACTOR, Decoupled, (parameter, gradient), compute)
            yield from _of_matrices(f"Adafactor, {name}", own)
    yield "scale of gradients", "-", settings.scale_gradients(own)


def _of_matrices(title: str, own: Code) -> Iterator[tuple[str, str, Kernel]]:
    yield f"squares of tiles: {title}", moved(own, 2), factored.add_tiles(own)
    yield f"moments: {title}", "-", factored.average_moments(own)
    yield f"means: {title}", "-", factored.find_means(own)
    gradient = f"{own.formats[1].itemsize(own.compute)}"
    yield f"squares of updates: {title}", gradient, factored.add_updates(own, False)
    if own.compute == DOUBLE:
        yield f"squares in units: {title}", moved(own, 2), factored.add_updates(own, True)
    yield f"factor: {title}", "-", factored.find_factor(own)
    yield f"update of matrices: {title}", moved(own, 2, 1), factored.take_step(own)
