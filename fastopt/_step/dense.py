"""Parameters with dense gradients: those that share a rule and formats are updated in one launch."""

from collections.abc import Iterable, Sequence

import numpy as np

from fastopt._core import state
from fastopt._core.backend import DenseLaunch
from fastopt._core.parameters import Parameter
from fastopt._step.numbers import Conditions, decay_numbers, rule_numbers
from fastopt.kernels.formats import Format
from fastopt.kernels.rule import Scaled
from fastopt.kernels.work import ArrayWork, Spec

State = dict[str, np.ndarray]
Ready = tuple[Parameter, State]  # a parameter, and its state as a step needs it


class DenseUpdate:
    """The parameters of one launch, which is kept from step to step.

    Parameters of a group that have made equally many steps, with the same seed, have the same numbers in
    every step: they are a class.

    Args:
        parameters: alike in backend, rule, dtypes and formats, each with its state.
        formats: of the parameter, the gradient, and the state arrays.
        conditions: of the first step.

    ``launch`` makes the step. Where some decay, the others' weight decay is one by 0.
    """

    def __init__(
        self, parameters: Sequence[Ready], formats: tuple[Format, ...], conditions: Conditions
    ) -> None:
        decaying = next((p for p, _ in parameters if p.group.decay is not Scaled), parameters[0][0])
        self._compute = decaying.compute
        self._decay = decaying.group.decay
        self._indices = np.array([parameter.index for parameter, _ in parameters])
        rows: dict[tuple[int, int, int], int] = {}
        self._classes: list[Parameter] = []  # one parameter of each
        works = []
        for parameter, own in parameters:
            seed = parameter.group.checked["seed"]
            row = rows.setdefault((parameter.group.number, parameter.step, seed), len(rows))
            if row == len(self._classes):
                self._classes.append(parameter)
            works.append(_work(parameter, own, row))
        self._conditions: Conditions | None = None
        self._random = any(kind.random for kind in formats)
        group, lr = decaying.group, conditions.rates[decaying.group.number]
        h = rule_numbers(group, group.checked, lr, decaying.step + 1, self._compute)
        scale, limit = conditions.scale, conditions.limit
        c = decay_numbers(group, group.checked, self._decay, lr, scale, limit, self._compute)
        spec = Spec(h, c, self._compute, formats)
        self.launch: DenseLaunch
        if state.is_factored(spec.rule, decaying.shape):
            self.launch = decaying.backend.MatrixLaunch(spec, works[0])
        else:
            self.launch = decaying.backend.ArraysLaunch(spec, works, len(self._classes))
        self._of_rule = [numbers[: len(h)] for numbers in self.launch.numbers]  # where those of rules go

    def place(self, parameters_at: np.ndarray, gradients_at: np.ndarray) -> None:
        """Take over the addresses of all the optimizer's parameters and gradients."""
        self.launch.place(parameters_at[self._indices], gradients_at[self._indices])

    def set_numbers(self, conditions: Conditions) -> None:
        """Set the launch's numbers and keys to those of the next step."""
        rates, scale, limit = conditions
        same = conditions == self._conditions  # and with them the numbers of weight decay
        self._conditions = None  # until all are set, since an error may come between
        for row, parameter in enumerate(self._classes):
            group = parameter.group
            lr = rates[group.number]
            h = rule_numbers(group, group.checked, lr, parameter.step + 1, self._compute)
            self._of_rule[row][:] = h
            if not same:
                c = decay_numbers(group, group.checked, self._decay, lr, scale, limit, self._compute)
                self.launch.numbers[row, len(h) :] = c
        self._conditions = conditions
        if self._random:
            key = state.random_key
            self.launch.set_keys([key(p.group.checked["seed"], p.step + 1) for p in self._classes])


def _work(parameter: Parameter, own: State, row: int) -> ArrayWork:
    """The share of a launch of a parameter with the state ``own``; ``row``: of its hyperparameters."""
    rule = parameter.group.rule
    slots = rule.matrix_slots if state.is_factored(rule, parameter.shape) else rule.state_slots
    arrays = tuple((own[slot], own.get(slot + state.SCALES)) for slot in slots)
    return ArrayWork(row, parameter.first, parameter.shape, own.get(state.MASTER), arrays)


def dense_updates(
    parameters: Iterable[tuple[Parameter, State, Format]], conditions: Conditions
) -> list[DenseUpdate]:
    """The updates of parameters, with their state, by dense gradients of these formats."""
    updates = []
    alike: dict[tuple, dict[type, list[Ready]]] = {}
    for parameter, own, gradient in parameters:
        group, formats = parameter.group, (parameter.own_format, gradient)
        if state.is_factored(group.rule, parameter.shape):
            updates.append(DenseUpdate([(parameter, own)], formats, conditions))
        else:
            key = parameter.backend, group.rule, parameter.compute, (*formats, *parameter.state_formats)
            alike.setdefault(key, {}).setdefault(group.decay, []).append((parameter, own))
    for (*_, members), by_decay in alike.items():
        if len(by_decay) > 1 and Scaled in by_decay:  # none is a decay by 0
            without = by_decay.pop(Scaled)
            decay = next(iter(by_decay))
            by_decay[decay] = sorted(by_decay[decay] + without, key=lambda ready: ready[0].index)
        updates += [DenseUpdate(ready, members, conditions) for ready in by_decay.values()]
    return updates
