"""Optimizers made of update rules that are defined outside fastopt."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastopt._core.options import SHARED
from fastopt.kernels.rule import COMPUTE_DTYPE, RULES, Rule, register
from fastopt.optimizer import Optimizer


def register_rule(
    name: str,
    hyper: type,
    update: Callable[..., tuple],
    slots: Sequence[str] = (),
    *,
    decoupled_weight_decay: bool = False,
) -> type[Optimizer]:
    """Make an optimizer, with dense and sparse kernels, of a scalar update rule.

    Args:
        name: the name of the new optimizer class.
        hyper: a NamedTuple class of the numbers that the rule needs, with ``lr`` among them. Its fields and
            their defaults are the optimizer's options. If some numbers depend on the step, give it a
            classmethod ``fold(cls, step, *, lr, ..., **_)`` that returns the tuple for the ``step``-th
            update of a parameter, 1 being the first. Then the keyword arguments of ``fold`` are the options.
            Fields are cast to the parameter's dtype, but those of type bool stay bool.
        update: a function ``(h, p, g, *slots) -> (p, *slots)``, which gets one element of the parameter, of
            its gradient and of each state array, and returns a tuple of numbers. It is compiled by Numba in
            nopython mode. Use ``math`` for functions, and no literals in arithmetic, because ``1`` or
            ``1.0`` would turn float32 arithmetic into the slower float64.
        slots: the names of the state arrays, which have the parameter's shape and start from 0.
        decoupled_weight_decay: whether ``weight_decay`` is decoupled, as in AdamW, and not an L2 penalty;
            False by default. Every optimizer has the options ``weight_decay``, 0 by default, and
            ``maximize``, which act on the gradient and the parameter before the rule does.

    Returns:
        A subclass of :class:`fastopt.Optimizer` that takes ``params``, and the options by keyword.
        Define ``hyper`` and ``update`` at the top level of a module: then kernels are cached on disk, and
        compiled again when the rule's code changes.

    Raises:
        TypeError: ``hyper`` is not a NamedTuple class, or ``update`` is not a function.
        ValueError: ``hyper`` belongs to another rule or lacks ``lr``, or ``name`` or one of ``slots`` is not
            a valid name.

    Example:
        This is Signum (Bernstein et al. 2018, "signSGD: Compressed Optimisation for Non-Convex Problems",
        Algorithm 2).

        >>> import math
        >>> from typing import NamedTuple
        >>> import fastopt
        >>> class SignumH(NamedTuple):
        ...     lr: float = 1e-4
        ...     beta: float = 0.9
        >>> def signum(h, p, g, exp_avg):
        ...     exp_avg = g + h.beta * (exp_avg - g)
        ...     if exp_avg:
        ...         p = p - math.copysign(h.lr, exp_avg)
        ...     return p, exp_avg
        >>> Signum = fastopt.register_rule("Signum", SignumH, signum, ["exp_avg"])
    """
    if not (isinstance(hyper, type) and issubclass(hyper, tuple) and hasattr(hyper, "_fields")):
        raise TypeError(f"hyper is {hyper!r}: expected a NamedTuple class")
    update = getattr(update, "py_func", update)
    if not inspect.isfunction(update):
        raise TypeError(f"update is {update!r}: expected a function (h, p, g, *slots)")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name is {name!r}: expected the name of a class")
    if isinstance(slots, str) or not all(isinstance(slot, str) and slot.isidentifier() for slot in slots):
        raise ValueError(f"slots is {slots!r}: expected a list of names")
    if len({*slots, "step"}) != len(slots) + 1:
        raise ValueError(f"slots is {slots!r}: expected names that differ, none of them 'step'")
    rule = Rule(hyper, update, tuple(slots))
    if RULES.get(hyper, rule) != rule:
        raise ValueError(
            f"hyper, {hyper.__qualname__}, belongs to another rule: define a NamedTuple for this one"
        )
    options = _options(hyper)
    for taken in ("params", "weight_decay", "maximize", *SHARED):
        if taken in options:
            raise ValueError(
                f"hyper, {hyper.__qualname__}, has {taken!r}, which every optimizer has: leave it out"
            )
    if "lr" not in options:
        raise ValueError(
            f"hyper, {hyper.__qualname__}, has {', '.join(options) or 'nothing'}: expected lr among them"
        )
    options |= {"weight_decay": 0.0, "maximize": False, **SHARED}
    by_step = hasattr(hyper, "fold")
    register(rule)
    keyword = inspect.Parameter.KEYWORD_ONLY
    signature = inspect.Signature(
        [inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        + [inspect.Parameter(option, keyword, default=default) for option, default in options.items()]
    )

    class Registered(Optimizer):
        def __init__(self, params: Any, **given: Any) -> None:
            bound = signature.bind(params, **given)
            bound.apply_defaults()
            own = {name: value for name, value in bound.arguments.items() if name not in SHARED}
            tables = {name: bound.arguments[name] for name in SHARED}
            super().__init__(own.pop("params"), tables, **own)

        def check_options(self, options: Mapping[str, Any], label: str) -> None:
            super().check_options(options, label)
            _try(rule, options)
            if options["step_per_row"] and (by_step or hyper._fields[0] != "lr"):  # type: ignore[attr-defined]
                raise ValueError(
                    f"{label} has step_per_row=True: expected False, as {name} folds the step itself or its "
                    "first number is not lr"
                )

        def rule(self, options: Mapping[str, Any]) -> Rule:
            return rule

        def decoupled(self, options: Mapping[str, Any]) -> bool:
            return decoupled_weight_decay

    Registered.__name__ = Registered.__qualname__ = name
    Registered.__module__ = hyper.__module__
    Registered.__doc__ = update.__doc__
    Registered.__signature__ = signature  # type: ignore[attr-defined]
    return Registered


def _options(hyper: type) -> dict[str, Any]:
    """The options of a rule and their defaults, without the options that all optimizers share."""
    if hasattr(hyper, "fold"):
        parameters = inspect.signature(hyper.fold).parameters.values()
        options = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        options.pop(COMPUTE_DTYPE, None)
    else:
        defaults = hyper._field_defaults  # type: ignore[attr-defined]
        fields = hyper._fields  # type: ignore[attr-defined]
        options = {name: defaults.get(name, inspect.Parameter.empty) for name in fields}
    return options


def _try(rule: Rule, options: Mapping[str, Any]) -> None:
    """Call the rule once on plain numbers, so that mistakes in it are reported at once and clearly."""
    lr = options["lr"]
    h = rule.fold(1, {**options, "lr": lr(0) if callable(lr) else lr}, np.float64)
    if not isinstance(h, rule.hyper):
        raise ValueError(
            f"fold of {rule.hyper.__qualname__} returned {h!r}: expected a {rule.hyper.__qualname__}"
        )
    # NumPy's arithmetic divides by zero without raising, as kernels do.
    zero = np.float64(0)
    with np.errstate(all="ignore"):
        result = rule.update(h, zero + 1, zero + 0.5, *(zero for _ in rule.slots))
    if not isinstance(result, tuple) or len(result) != 1 + len(rule.slots):
        raise ValueError(
            f"{rule.update.__qualname__} returned {result!r}: expected a tuple of {1 + len(rule.slots)}, "
            f"the parameter{''.join(', ' + str(slot) for slot in rule.slots)}"
        )
