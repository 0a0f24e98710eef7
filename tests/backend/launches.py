"""What launches are told in these tests, and what the plain scalar rules make of the same numbers."""

import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fastopt.kernels import formats, rules
from fastopt.kernels.rule import L2, RULES, Decoupled, Scaled
from fastopt.kernels.work import ArrayWork, Segments, Spec, StoredState, StoredTable, TableGradient, TableWork

PLAIN, BFLOAT16 = formats.PLAIN, formats.BFLOAT16
BFLOAT16_OF, STOCHASTIC = formats.BFLOAT16_OF, formats.STOCHASTIC

SINGLE, DOUBLE = np.dtype(np.float32), np.dtype(np.float64)
HALF, BFLOAT = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)

# no option is one that a rule could ignore; lr is exact in float32
ADAM = {"lr": 2.0**-6, "betas": (0.8, 0.97), "eps": 1e-3, "weight_decay": 0.125}


def adam_numbers(step: int, lr: float = ADAM["lr"]) -> Any:
    return rules.ADAM.fold(step, {**ADAM, "lr": lr}, np.float64)


def decay_numbers(kind: type, scale: float = 1.0, limit: float = math.inf, lr: float = ADAM["lr"]) -> Any:
    own = {
        Scaled: (),
        L2: (ADAM["weight_decay"],),
        Decoupled: (1.0 - lr * ADAM["weight_decay"],),
    }
    return kind(scale, limit, *own[kind])


def adam_spec(decay: type, compute: np.dtype = SINGLE, formats: Sequence = (), mode: Any = None) -> Spec:
    """Of Adam, everything stored as it is computed with unless formats are given."""
    return Spec(adam_numbers(1), decay_numbers(decay), compute, tuple(formats) or (PLAIN,) * 4, mode)


def stepped(h: Any, c: Any, p: np.ndarray, g: np.ndarray, *state: np.ndarray) -> list[np.ndarray]:
    """The new parameter and state by the scalar rule, an element at a time, in the dtype of ``p``."""
    cast = p.dtype.type
    h, c = (type(x)(*(n if isinstance(n, bool) else cast(n) for n in x)) for x in (h, c))
    results = [np.empty_like(array) for array in (p, *state)]
    with np.errstate(all="ignore"):
        for i in np.ndindex(p.shape):
            new = _element(h, c, p[i], cast(g[i]), *(array[i] for array in state))
            for result, number in zip(results, new, strict=True):
                result[i] = number
    return results


def _element(h: Any, c: Any, p: Any, g: Any, *state: Any) -> list:
    rule, given = RULES[type(h)], iter(state)
    g = c.scale * g
    if not np.isnan(g):
        g = min(max(g, -c.limit), c.limit)
    if isinstance(c, L2):
        g = g + c.weight_decay * p
    if isinstance(c, Decoupled):
        p = c.keep * p
    slots = [None if slot is None else next(given) for slot in rule.slots]
    return [number for number in rule.update(h, p, g, *slots) if number is not None]


class Dense:
    """Arrays on a device, with a launch over them.

    Args:
        parameters, gradients, states: NumPy arrays; states: of each parameter its state arrays.
        numbers: of each parameter the row of its hyperparameters.
        positions: of each parameter the position of its first element; masters: float32 or None.
    """

    def __init__(
        self,
        device: Any,
        spec: Spec,
        parameters: Sequence[np.ndarray],
        gradients: Sequence[np.ndarray],
        states: Sequence[Sequence[np.ndarray]],
        numbers: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        masters: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.device = device
        self.parameters = [device.put(array) for array in parameters]
        self.gradients = [device.put(array) for array in gradients]
        self.states = [[device.put(array) for array in state] for state in states]
        self.masters = [device.put(array) for array in masters] if masters else [None] * len(parameters)
        numbers = numbers or [0] * len(parameters)
        positions = positions or [0] * len(parameters)
        works = [
            ArrayWork(row, position, array.shape, master, tuple((slot, None) for slot in state))
            for row, position, array, master, state in zip(
                numbers, positions, parameters, self.masters, self.states, strict=True
            )
        ]
        self.launch = device.backend.ArraysLaunch(spec, works, max(numbers) + 1)

    def run(self, numbers: Sequence[Any], zero_grads: bool = False, keys: Sequence[int] = ()) -> None:
        """Update the arrays with these h and c of each class."""
        self.device.backend.run(self.prepare(numbers, zero_grads, keys))

    def prepare(self, numbers: Sequence[Any], zero_grads: bool = False, keys: Sequence[int] = ()) -> Any:
        """Place the arrays; returns the calls that update them."""
        address = self.device.backend.address
        self.launch.place(
            np.array([address(array) for array in self.parameters]),
            np.array([address(array) for array in self.gradients]),
        )
        for row, (h, c) in enumerate(numbers):
            self.launch.numbers[row] = (*h, *c)
        if keys:
            self.launch.set_keys(list(keys))
        return self.launch.prepare(zero_grads)

    def got(self, k: int) -> list[np.ndarray]:
        """Parameter ``k`` and its state."""
        return [self.device.get(array) for array in (self.parameters[k], *self.states[k])]


class StoredAdam:
    """A table under Adam on a device; ``together``: its moments lie row by row side by side."""

    def __init__(
        self,
        device: Any,
        table: np.ndarray,
        exp_avg: np.ndarray,
        exp_avg_sq: np.ndarray,
        together: bool = False,
    ) -> None:
        self.device = device
        if together:
            both = device.put(np.stack([exp_avg, exp_avg_sq], axis=1))
            self.arrays = [device.put(table), both[:, 0], both[:, 1]]
        else:
            self.arrays = [device.put(array) for array in (table, exp_avg, exp_avg_sq)]

    @property
    def stored(self) -> StoredTable:
        table, *state = self.arrays
        return StoredTable(table, StoredState(tuple((array, None) for array in state)), 0, 0)

    def work(
        self,
        gradient: TableGradient,
        numbers: tuple[float, ...],
        limit: float = math.inf,
        step: int = 1,
        row_steps: Any = None,
    ) -> TableWork:
        return TableWork(self.stored, gradient, numbers, limit, step, row_steps, missed_key=7)

    def got(self) -> list[np.ndarray]:
        return [self.device.get(array) for array in self.arrays]


def segments(device: Any, indices: Sequence[int] | np.ndarray, rows: int) -> Segments:
    """The segments of one table's indices."""
    [found] = device.backend.segments_of([(device.put(np.asarray(indices, np.int64)), rows)])
    return found


def adam_state(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype = SINGLE
) -> list[np.ndarray]:
    """A parameter and its moments, as after some steps."""
    p, m, v = (np.asarray(rng.normal(size=shape)) for _ in range(3))
    return [p.astype(dtype), m.astype(dtype), (v * v).astype(dtype)]


def assert_same(got: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    """The same bits; a NaN is like another."""
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        if one.dtype in (HALF, BFLOAT):  # of which NumPy does not know all that are NaN
            one, other = one.astype(SINGLE), other.astype(SINGLE)
        np.testing.assert_array_equal(one, other)


def assert_close(got: np.ndarray, expected: np.ndarray, ulps: float, scale: Any = None) -> None:
    """Within so many ulps of the dtype of ``got``, of numbers of the size of ``scale`` (of the expected)."""
    scale = np.abs(expected) if scale is None else scale
    error = np.abs(np.asarray(got, np.float64) - expected)
    bound = ulps * float(np.finfo(got.dtype).eps) * np.asarray(scale, np.float64)
    assert (error <= bound).all(), f"off by up to {(error / np.maximum(bound, 1e-300)).max()} of the bound"
