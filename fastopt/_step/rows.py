"""Tables with gradients by rows: those that share a rule and formats are updated in one launch."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from fastopt._core.backend import Backend, Factor, Launch
from fastopt._core.missed import ROW_STEPS, Tracking, fold_of
from fastopt._core.parameters import Parameter
from fastopt._step.catch_up import catch_up, step_of_catch_up, tracked
from fastopt._step.numbers import Conditions, decay_numbers, rule_numbers
from fastopt.gradients.rows import RowGradient
from fastopt.kernels.formats import PLAIN
from fastopt.kernels.rule import Lazy, PerRow
from fastopt.kernels.work import Array, Spec, TableWork


class RowUpdate(NamedTuple):
    """A parameter and its checked gradient by rows; table: where the parameter is now."""

    parameter: Parameter
    gradient: RowGradient
    table: Array


def keep_rows(parameter: Parameter, gradient: RowGradient) -> None:
    """Have a table in files keep the rows that a gradient changes. Reading one for which the disk has no room
    would end the process, so this comes before what a step reads of it."""
    if parameter.in_files is not None:
        parameter.before_writing(gradient.segments_written)


def find_winners(updates: Sequence[RowUpdate]) -> None:
    """Find where the maxima of bags come from, in rows that are up to date."""
    for parameter, gradient, table in updates:
        if gradient.takes_maxima:
            keep_rows(parameter, gradient)
            catch_up(parameter, gradient.indices)
            gradient.find_winners(table)


class ReadyRows(NamedTuple):
    """An update by rows with what it needs of its parameter: its state, and which rows are behind."""

    parameter: Parameter
    gradient: RowGradient
    table: Array
    state: dict[str, Array]
    tracking: Tracking | None


def ready_rows(update: RowUpdate) -> ReadyRows:
    """An update with state and tracking, new where they are missing: the parameter is to have them."""
    parameter, gradient, _ = update
    tracking, state = None, parameter.ready_state(by_row=True)
    keep_rows(parameter, gradient)
    if gradient.dense:
        catch_up(parameter)
    elif parameter.group.checked["rows"] == "dense":
        tracking = tracked(parameter)
    return ReadyRows(*update, state, tracking)


def row_launches(updates: Sequence[ReadyRows], conditions: Conditions, factor: Factor = None) -> list[Launch]:
    """The launches of these updates; ``factor``: of a norm that is on its way (see Norm)."""
    alike: dict[tuple, tuple[Backend, Spec, list[TableWork]]] = {}
    known: dict[tuple, Spec] = {}  # tables of a group that have made as many steps have the same numbers
    for update in updates:
        parameter = update.parameter
        step = parameter.step + 1
        kind = parameter.group.number, parameter.dtype, step
        if kind not in known:
            known[kind] = _spec(parameter, conditions, step)
        spec, work = _work(update, known[kind], conditions, step)
        alike.setdefault((parameter.backend, *spec.key), (parameter.backend, spec, []))[-1].append(work)
    return [backend.update_rows(spec, works, factor) for backend, spec, works in alike.values()]


def _spec(parameter: Parameter, conditions: Conditions, step: int) -> Spec:
    """The update of a table whose rows have missed no steps."""
    group, compute = parameter.group, parameter.compute
    options, lr = group.checked, conditions.rates[group.number]
    h = rule_numbers(group, options, lr, step, compute)
    c = decay_numbers(group, options, group.decay, lr, conditions.scale, conditions.limit, compute)
    return Spec(h, c, compute, (parameter.own_format, PLAIN, *parameter.state_formats), Lazy())


def _work(update: ReadyRows, spec: Spec, conditions: Conditions, step: int) -> tuple[Spec, TableWork]:
    parameter, gradient, table, state, tracking = update
    group = parameter.group
    by_row, numbers = gradient.by_row(), (*spec.h, *spec.c)
    row_steps, missed_key = None, 0
    if ROW_STEPS in state:
        spec = spec._replace(mode=PerRow())
        numbers = conditions.rates[group.number], *spec.h[1:], *spec.c
        fold = fold_of(group.rule, group.checked)
        row_steps = parameter.backend.counted_steps(state[ROW_STEPS], by_row.segments, fold, parameter.step)
    elif tracking is not None:
        history = tracking.history
        spec = spec._replace(mode=history.kind())
        row_steps = history.of_rows(tracking.last_step, by_row.segments.rows.size, spec.compute)
        missed_key = parameter.random_key(step_of_catch_up(parameter))
    limit = group.checked["clip_row_norm"]
    limit = math.inf if limit is None else limit
    stored = parameter.stored_table(table, state, step)
    return spec, TableWork(stored, by_row, numbers, limit, step, row_steps, missed_key)
