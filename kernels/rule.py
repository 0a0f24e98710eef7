"""What kernels and optimizers know of an update rule, and the kinds of what surrounds it.

Gradient scale, sign and weight decay are the same for all rules and come before them: one of
:class:`Scaled`, :class:`L2` and :class:`Decoupled`, always named ``c``. They are three types,
and not one with zeros, so that a kernel holds a single loop: a test that does not change in a
loop makes the compiler write it twice, and compile twice as long.

:class:`Still`, :class:`Linear`, :class:`Adaptive` and :class:`Loop` say how the steps are made up for that
a row without a gradient has missed (see catch_up.py), :class:`Lazy` and :class:`PerRow` that none are.
Kernels of tables get one of them, the mode, as an argument without contents, whose type selects code.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastopt.kernels.lazy import lazy


class Scaled(NamedTuple):
    """No weight decay. scale: factor on the gradient: loss scale, clipping and, when negative,
    maximisation. limit: what an element of the scaled gradient is clipped to, either way."""

    scale: float
    limit: float


class L2(NamedTuple):
    """Weight decay as an L2 penalty: weight_decay * p is added to the scaled gradient."""

    scale: float
    limit: float
    weight_decay: float


class Decoupled(NamedTuple):
    """Weight decay apart from the gradient: p = keep * p, with keep = 1 - lr * weight_decay
    (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", Algorithm 2)."""

    scale: float
    limit: float
    keep: float


class Still(NamedTuple):
    """The parameter and its slots are multiplied by a number each."""


class Linear(NamedTuple):
    """The parameter and the momentum buffer are multiplied by a matrix."""


class Adaptive(NamedTuple):
    """The first moment, over the root of the second, moves the parameter."""


class Loop(NamedTuple):
    """The steps are gone through one by one."""


class Lazy(NamedTuple):
    """No steps are made up for: a row without a gradient stays as it is."""


class PerRow(NamedTuple):
    """The row's own updates are counted, and its hyperparameters chosen by their number: what is folded for
    the learning rate 1 is times the first number of a launch's hyperparameters."""


COMPUTE_DTYPE = "compute_dtype"


@dataclass(frozen=True)
class Rule:
    """A rule as kernels and optimizers see it.

    hyper: NamedTuple class; kernels find the rule by it. Its first field is a multiple of the
        learning rate. Its classmethod ``fold(step, *, lr, **options)`` makes the tuple of one step or, with
        arrays in it, of an array of steps, float64 (which rules that are defined elsewhere are spared);
        a keyword ``compute_dtype`` of it is the dtype that the update is computed with. Without a
        ``fold``, the options are taken by field name.
    update: the scalar function ``(h, p, g, *slots, *row_slots) -> (p, *slots)``.
    slots: names of the state arrays shaped as the parameter, ``None`` for an argument of
        ``update`` that this variant does without.
    update_row, row_slots: a rule with state of one element a row has the function
        ``(h, mean_sq, *row_slots) -> row_slots``, called once a row with the mean square of the
        row's gradient, before ``update`` sees the row's elements.
    not_negative: those of ``slots`` whose elements never are negative, sums and means of squares: stored in
        8 bits, they need no sign.
    trust_ratio: where the length of the step depends on the whole array or, with a sparse gradient, on the
        whole row, ``update`` returns a direction u in place of p, and the function
        ``(h, sum of p^2, sum of u^2, unit of p, unit of u, size) -> ratio``, in float64, makes it
        p = p - ratio * h[0] * u. The sums are of p and u over their units, powers of two, which are 1 unless
        the squares leave the range of float64.
    matrix_slots: names of the state, in place of all other, of an array of two or more dimensions, by a rule
        that has means over rows and over columns (see kernels/cpu/factored.py): of the former, of the latter.
    missed, missed_l2: how missed steps are made up for, without and with an L2 penalty.
    own_decay: whether weight decay is a part of the rule, so that kernels get :class:`Scaled`.
    """

    hyper: type
    update: Callable[..., tuple]
    slots: tuple[str | None, ...] = ()
    update_row: Callable[..., tuple] | None = None
    row_slots: tuple[str, ...] = ()
    not_negative: tuple[str, ...] = ()
    trust_ratio: Callable[..., float] | None = None
    matrix_slots: tuple[str, ...] = ()
    missed: type = Loop
    missed_l2: type = Loop
    own_decay: bool = False

    @lazy
    def state_slots(self) -> tuple[str, ...]:
        """The state arrays shaped as the parameter."""
        return tuple(slot for slot in self.slots if slot is not None)

    def fold(self, step: int | np.ndarray, options: Mapping[str, Any], dtype: Any) -> Any:
        """The hyperparameters, in float64, of the ``step``-th update, which is computed with ``dtype``; of an
        array of steps, some of them are arrays."""
        names = self._folded
        if names is None:
            return self.hyper(**{name: options[name] for name in self.hyper._fields})  # type: ignore[attr-defined]
        given = {name: options[name] for name in names}
        if self._takes_dtype:
            given[COMPUTE_DTYPE] = dtype
        return self.hyper.fold(step, **given)  # type: ignore[attr-defined]

    @lazy
    def _folded(self) -> tuple[str, ...] | None:
        """The options that ``fold`` takes by name, None if there is no ``fold``."""
        if not hasattr(self.hyper, "fold"):
            return None
        parameters = inspect.signature(self.hyper.fold).parameters.values()
        names = (p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)
        return tuple(name for name in names if name != COMPUTE_DTYPE)

    @lazy
    def _takes_dtype(self) -> bool:
        return COMPUTE_DTYPE in inspect.signature(self.hyper.fold).parameters  # type: ignore[attr-defined]


RULES: dict[type, Rule] = {}


def register(rule: Rule) -> Rule:
    """Make kernels find ``rule`` by the class of its hyperparameters."""
    RULES[rule.hyper] = rule
    return rule
