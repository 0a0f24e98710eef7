"""The state of a parameter: which arrays there are, and in which formats they, the parameter and its gradient
are stored."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fastopt._core.arrays import DTYPES
from fastopt._core.arrays import LOW_DTYPES as LOW
from fastopt._core.backend import Backend, backend_of
from fastopt.kernels import formats
from fastopt.kernels.formats import BLOCK, Format
from fastopt.kernels.rule import Rule
from fastopt.kernels.work import Array

SINGLE, DOUBLE = DTYPES
HALF, BFLOAT16 = LOW

MASTER = "master"  # the float32 copy of a parameter of 16 bits
SCALES = "_scale"  # ends the names of the scales of 8-bit codes


class Slot(NamedTuple):
    """A state array: its shape, its dtype, and what its elements are at first."""

    shape: tuple[int, ...]
    dtype: np.dtype
    first: float = 0.0


def computed_with(dtype: np.dtype) -> np.dtype:
    """What a parameter's updates are computed with."""
    return DOUBLE if dtype == DOUBLE else SINGLE


def has_master(dtype: np.dtype, options: Mapping[str, Any]) -> bool:
    return options["master_weights"] and dtype in LOW


def parameter_format(dtype: np.dtype, options: Mapping[str, Any]) -> Format:
    if dtype not in LOW:
        return formats.PLAIN
    if has_master(dtype, options):
        return formats.HALF_OF if dtype == HALF else formats.BFLOAT16_OF
    return formats.HALF if dtype == HALF else formats.BFLOAT16


def gradient_format(dtype: np.dtype) -> Format:
    return {HALF: formats.HALF, BFLOAT16: formats.BFLOAT16}.get(dtype, formats.PLAIN)


def state_formats(rule: Rule, dtype: np.dtype, options: Mapping[str, Any]) -> tuple[Format, ...]:
    """Of each of the rule's slots that are shaped as the parameter."""
    chosen, like = options["state_dtype"], computed_with(dtype)
    return tuple(formats.state_format(chosen, slot in rule.not_negative, like) for slot in rule.state_slots)


def state_slots(
    rule: Rule,
    shape: tuple[int, ...],
    dtype: np.dtype,
    options: Mapping[str, Any],
    first: Mapping[str, float],
    by_row: bool,
) -> dict[str, Slot]:
    """The state arrays of a parameter; ``by_row``: blocks of 8-bit codes end with the rows of a table."""
    like = computed_with(dtype)
    slots = {}
    if is_factored(rule, shape):
        of_rows, of_columns = rule.matrix_slots
        slots[of_rows] = Slot((*shape[:-1], 1), like)
        slots[of_columns] = Slot((*shape[:-2], 1, shape[-1]), like)
        shaped: tuple[str, ...] = ()
    else:
        shaped = rule.state_slots
    for name, kind in zip(shaped, state_formats(rule, dtype, options), strict=False):
        value, own = first.get(name, 0.0), like if kind.dtype is None else kind.dtype
        slots[name] = Slot(shape, own, value)
        if kind.coded:
            slots[name] = Slot(shape, own, kind.largest_code if value else 0)
            slots[name + SCALES] = Slot(scale_shape(shape, by_row), SINGLE, value)
    for name in rule.row_slots:
        slots[name] = Slot((shape[0] if shape else 1,), like, first.get(name, 0.0))
    if has_master(dtype, options):
        slots[MASTER] = Slot(shape, SINGLE)
    return slots


def is_factored(rule: Rule, shape: tuple[int, ...]) -> bool:
    """Whether the state is of rows and columns."""
    return bool(rule.matrix_slots) and len(shape) >= 2


def new_state(
    slots: Mapping[str, Slot],
    backend: Backend,
    together: tuple[str, ...] = (),
    beside: Array | None = None,
) -> dict[str, Array]:
    """State arrays.

    together: names of those that lie row by row side by side, which memory answers faster. beside: an array
    whose elements are updated together with those of state arrays of its shape.
    """
    zeros = backend.zeros
    state = {}
    if len(together) > 1:
        (rows, dim), dtype, _ = slots[together[0]]
        both = zeros((rows, len(together), dim), dtype)
        state = {slot: both[:, k] for k, slot in enumerate(together)}
    if beside is not None:
        alike = [name for name, slot in slots.items() if slot.shape == beside.shape]
        state |= zip(alike, backend.zeros_beside(beside, [slots[name].dtype for name in alike]), strict=True)
    for name, (shape, dtype, value) in slots.items():
        if name not in state:
            state[name] = zeros(shape, dtype)
        if value:
            state[name][...] = value
    return {name: state[name] for name in slots}


def scale_shape(shape: tuple[int, ...], by_row: bool) -> tuple[int, ...]:
    size = math.prod(shape)
    if by_row:
        rows = shape[0] if shape else 1
        return rows, -(-size // max(rows, 1) // BLOCK)
    return (-(-size // BLOCK),)


def by_rows(kind: Format, codes: Array, scales: Array) -> tuple[Array, Array]:
    """Codes of a table whose blocks go on over its rows, with their scales, as those of blocks that end with
    its rows, rounded to the nearest."""
    backend = backend_of(codes)
    new, own = backend.empty(codes.shape, codes.dtype), backend.empty(scale_shape(codes.shape, True), SINGLE)
    backend.reblock(kind, codes, scales, new, own)
    return new, own


def random_key(seed: int, step: int) -> int:
    """64 bits for the random numbers of a step, as an int64: two rounds of splitmix64 (Steele, Lea & Flood
    2014, "Fast Splittable Pseudorandom Number Generators")."""
    key = 0
    for number in (seed, step):
        key = (key + number + 1) * 0x9E3779B97F4A7C15 % 2**64
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        key = (key ^ key >> 27) * 0x94D049BB133111EB % 2**64
        key ^= key >> 31
    return key - 2**64 if key >= 2**63 else key
