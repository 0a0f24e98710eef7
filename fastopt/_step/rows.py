"""Tables with gradients by rows: those that share a rule and formats are updated in one launch."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
    for update in updates:
        spec, work = _work(update, conditions)
        backend = update.parameter.backend
        alike.setdefault((backend, *spec.key), (backend, spec, []))[-1].append(work)
    return [backend.update_rows(spec, works, factor) for backend, spec, works in alike.values()]


def _work(update: ReadyRows, conditions: Conditions) -> tuple[Spec, TableWork]:
    parameter, gradient, table, state, tracking = update
    group, options, compute = parameter.group, parameter.group.checked, parameter.compute
    lr, step = conditions.rates[group.number], parameter.step + 1
    h = rule_numbers(group, options, lr, step, compute)
    c = decay_numbers(group, options, group.decay, lr, conditions.scale, conditions.limit, compute)
    by_row = gradient.by_row()
    mode: Any = Lazy()
    row_steps, missed_key, numbers = None, 0, (*h, *c)
    if ROW_STEPS in state:
        mode, numbers = PerRow(), (lr, *h[1:], *c)
        fold = fold_of(group.rule, options)
        row_steps = parameter.backend.counted_steps(state[ROW_STEPS], by_row.segments, fold, parameter.step)
    elif tracking is not None:
        history = tracking.history
        mode = history.kind()
        row_steps = history.of_rows(tracking.last_step, by_row.segments.rows.size, compute)
        missed_key = parameter.random_key(step_of_catch_up(parameter))
    spec = Spec(h, c, compute, (parameter.own_format, PLAIN, *parameter.state_formats), mode)
    limit = options["clip_row_norm"]
    limit = math.inf if limit is None else limit
    stored = parameter.stored_table(table, state, step)
    return spec, TableWork(stored, by_row, numbers, limit, step, row_steps, missed_key)
