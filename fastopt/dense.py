"""Dense gradients: the parameters that have them, in one launch for all that share a rule and formats."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastopt.kernels import formats
from fastopt.kernels.cpu import norms
from fastopt.kernels.cpu.dense import update_arrays
from fastopt.kernels.cpu.factored import update_matrices
from fastopt.kernels.cpu.memory import empty
from fastopt.kernels.cpu.runs import RUN
from fastopt.kernels.cpu.threads import runs_serial, thread_count
from fastopt.kernels.cpu.trust import update_whole_arrays
from fastopt.kernels.formats import Format
from fastopt.kernels.layout import (
    ARRAY_GRADIENT,
    ARRAY_KEY,
    ARRAY_NUMBERS,
    ARRAY_PARAMETER,
    ARRAY_POSITION,
    ARRAY_STATE,
)
from fastopt.kernels.rule import Rule
from fastopt.launch import PARTS_PER_THREAD
from fastopt.precision import DOUBLE, SINGLE, computed_with, gradient_format, random_key

Fold = Callable[[int, type, np.dtype, int], tuple[Any, Any]]


class Kind(NamedTuple):
    """What parameters of one launch have in common. ``decay``: the type of weight decay, in which there
    may be none; ``like``: the dtype that is computed with."""

    rule: Rule
    decay: type
    like: np.dtype
    members: tuple[Format, ...]


# What the gradient of a parameter is: of its dtype, float32 for one of 16 bits, none, or by rows
SAME, FLOAT32, NONE, ROWS = range(4)


class Member(NamedTuple):
    """A parameter of a launch.

    number: among all of the optimizer; group: the number of its group; position: of its first element among
    those of all parameters; second: the address of a master; state: two addresses for each slot.
    """

    number: int
    group: int
    step: int
    size: int
    position: int
    seed: int
    second: int
    state: list[int]


class Squares:
    """Sums of squares of arrays of one dtype."""

    def __init__(self, dtype: np.dtype, sizes: Sequence[int]) -> None:
        self._like, self._kinds = computed_with(dtype).type(0), formats.formats(gradient_format(dtype))
        self._bases = np.cumsum([0, *sizes])
        self._serial = True
        self._entry: Callable | None = None

    def sum(self, addresses: np.ndarray, scale: float) -> float:
        """Of all arrays, which are at ``addresses``, times ``scale**2``."""
        size = int(self._bases[-1])
        if not size:
            return 0.0
        partials = empty(-(-size // norms.SUMMED), np.float64)
        args = self._like, self._kinds, addresses, self._bases, scale, partials
        serial = runs_serial(size)
        entry = self._entry
        if entry is None or serial != self._serial:
            entry = norms.sum_squares_arrays.entry(serial, args)
            self._serial, self._entry = serial, entry
        norms.sum_squares_arrays.run(entry, serial, args)
        return float(partials.sum())


class Batch:
    """The gradients of a step, and what is kept for the next one that is alike.

    kinds: int8, one of SAME, FLOAT32, NONE, ROWS for each parameter; dense: the parameters with dense
    gradients; where: their gradients' addresses; bytes: their gradients' sizes; increments: what is added to
    each parameter's steps; complete: whether there are bundles; placed: whether they know these addresses
    and those of the parameters; may_clear: whether gradients may be written.
    """

    def __init__(self, kinds: np.ndarray, dtypes: Sequence[np.dtype], sizes: np.ndarray) -> None:
        self.kinds = kinds
        self.dense = np.flatnonzero(kinds <= FLOAT32)
        self.increments = (kinds != NONE).astype(np.int64)
        self.where = np.zeros(0, np.int64)
        self.bundles: list[Bundle | Matrix] = []
        self.complete = self.placed = self.may_clear = False
        own = {i: SINGLE if kinds[i] == FLOAT32 else dtypes[i] for i in self.dense.tolist()}
        self.formats = {i: gradient_format(dtype) for i, dtype in own.items()}
        self.bytes = np.array([sizes[i] * dtype.itemsize for i, dtype in own.items()], np.int64)
        alike: dict[np.dtype, list[int]] = {}
        for i, dtype in own.items():
            alike.setdefault(dtype, []).append(i)
        self.has_double = DOUBLE in alike
        self._squares = [
            (Squares(dtype, sizes[indices].tolist()), np.array(indices)) for dtype, indices in alike.items()
        ]

    def take_over(self, where: np.ndarray) -> bool:
        """Set where gradients are; returns whether that is new."""
        if np.array_equal(self.where, where):
            return False
        self.where = where
        return True

    @property
    def may_repeat(self) -> bool:
        """Whether all is dense, and updated in one pass."""
        whole = all(isinstance(b, Bundle) and b.kind.rule.trust_ratio is None for b in self.bundles)
        return whole and self.placed and bool((self.kinds != ROWS).all())

    def sum_of_squares(self, scale: float) -> float:
        """Of all dense gradients, times ``scale**2``."""
        return sum(squares.sum(self.where[indices], scale) for squares, indices in self._squares)


class Bundle:
    """The parameters of one launch, and the table that describes them to it."""

    def __init__(self, kind: Kind, members: Sequence[Member]) -> None:
        self.kind = kind
        self.indices = np.array([member.number for member in members])
        self.table = np.zeros((len(members), ARRAY_STATE + 2 * (len(kind.members) - 2)), np.int64)
        self.table[:, ARRAY_POSITION] = [member.position for member in members]
        self.table[:, ARRAY_PARAMETER + 1] = [member.second for member in members]
        self.table[:, ARRAY_STATE:] = [member.state for member in members]
        self.bases = np.cumsum([0, *(member.size for member in members)])
        self.size = int(self.bases[-1])
        # parameters of a group with the same number of steps have the same hyperparameters
        self._classes: dict[tuple[int, int, int], int] = {}
        for row, member in enumerate(members):
            key = member.group, member.step, member.seed
            self.table[row, ARRAY_NUMBERS] = self._classes.setdefault(key, len(self._classes))
        self._steps = 0  # since then
        self._random = any(member.random for member in kind.members)
        self._kinds = formats.formats(*kind.members)
        self._like = kind.like.type(0)
        self._numbers = np.empty((0, 0))
        self._launched: tuple = ()
        self._most = float(np.finfo(kind.like).max)

    def place(self, parameters: np.ndarray, gradients: np.ndarray) -> None:
        """Take over where parameters and gradients are."""
        self.table[:, ARRAY_PARAMETER] = parameters[self.indices]
        self.table[:, ARRAY_GRADIENT] = gradients[self.indices]

    def prepare(self, fold: Fold, zero_grads: bool) -> None:
        """Set the hyperparameters of the next step, ``fold(group, decay, dtype, step)`` for each class, and
        have everything compiled."""
        kind = self.kind
        for row, (group, step, _) in enumerate(self._classes):
            h, c = fold(group, kind.decay, kind.like, step + self._steps + 1)
            if not self._numbers.size:
                self._numbers = np.empty((len(self._classes), len(h) + len(c)))
                self._prototypes = _prototype(h, kind.like), _prototype(c, kind.like)
            self._numbers[row] = (*h, *c)
        self._set_keys()
        serial = runs_serial(self.size)
        parts = 1 if serial else PARTS_PER_THREAD * thread_count()
        launched = serial, zero_grads, parts
        if launched != self._launched:
            chunk = max(-(-self.size // (parts * RUN)), 1) * RUN
            given = self._like, self._kinds, self.table, self.bases, self._numbers, zero_grads, chunk
            self._arguments = *self._prototypes, *given
            if kind.rule.trust_ratio is None:
                self._entry = update_arrays.entry(serial, self._arguments)
            self._launched = launched

    def prepare_again(self, options: list[dict[str, Any]]) -> bool:
        """Set what a step has that differs from the last one in nothing but its number, for the groups'
        options; returns whether the numbers fit."""
        if runs_serial(self.size) is not self._launched[0]:
            return False
        fold, most = self.kind.rule.fold, self._most
        for row, (group, step, _) in enumerate(self._classes):
            h = fold(step + self._steps + 1, options[group], self.kind.like)
            if max(h) > most:
                return False
            self._numbers[row, : len(h)] = h
        self._set_keys()
        return True

    def _set_keys(self) -> None:
        """Set the keys of the next step's random bits."""
        if self._random:
            keys = [random_key(seed, step + self._steps + 1) for _, step, seed in self._classes]
            self.table[:, ARRAY_KEY] = np.array(keys)[self.table[:, ARRAY_NUMBERS]]

    def run(self) -> None:
        """Make the step that was prepared."""
        if self.size and self.kind.rule.trust_ratio is not None:
            update_whole_arrays(self.size, *self._arguments)
        elif self.size:
            update_arrays.run(self._entry, self._launched[0], self._arguments)
        self._steps += 1


class Matrix:
    """A parameter of two or more dimensions whose state is of rows and columns."""

    def __init__(self, kind: Kind, member: Member, shape: tuple[int, ...], state: list[np.ndarray]) -> None:
        self.kind, self._member = kind, member
        self._steps = 0
        self._shape = math.prod(shape[:-2]), shape[-2], shape[-1]
        self._state = [array.reshape(-1) for array in state]
        self._places = np.array([0, member.second, 0, 0], np.int64)
        self._kinds = formats.formats(*kind.members)

    def place(self, parameters: np.ndarray, gradients: np.ndarray) -> None:
        """Take over where the parameter and the gradient are."""
        self._places[::2] = parameters[self._member.number], gradients[self._member.number]

    def prepare(self, fold: Fold, zero_grads: bool) -> None:
        """Set the hyperparameters of the next step."""
        like, member = self.kind.like, self._member
        h, c = fold(member.group, self.kind.decay, like, member.step + self._steps + 1)
        numbers = np.array([*h, *c], np.float64)
        given = like.type(0), self._kinds, self._places, self._shape, *self._state, numbers, zero_grads
        self._arguments = _prototype(h, like), _prototype(c, like), *given

    def run(self) -> None:
        """Make the step that was prepared."""
        if self._member.size:
            update_matrices(*self._arguments)
        self._steps += 1


def _prototype(numbers: Any, dtype: np.dtype) -> Any:
    """A tuple of hyperparameters as a kernel computes with it; flags stay flags."""
    return type(numbers)(*(x if isinstance(x, bool) else dtype.type(1) for x in numbers))
