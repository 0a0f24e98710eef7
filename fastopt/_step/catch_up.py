"""``rows="dense"``: rows take the steps that they missed, before they are next needed."""

import math
from typing import Any

import numpy as np

from fastopt._core.groups import Definition, ParameterGroup
from fastopt._core.indices import Indices
from fastopt._core.missed import Tracking
from fastopt._core.parameters import Parameter, Parameters
from fastopt._step.numbers import StepOptions, decay_numbers, rule_numbers
from fastopt.kernels import formats
from fastopt.kernels.work import Spec


def adopt_changed(parameters: Parameters, options: StepOptions, definition: Definition) -> None:
    """Go on with the options of a step, those of groups that changed."""
    for group, own in zip(parameters.groups, options.checked, strict=True):
        if own is not group.checked:
            adopt(parameters, group, own, definition)


def adopt(
    parameters: Parameters, group: ParameterGroup, options: dict[str, Any], definition: Definition
) -> None:
    """Go on with changed options; rows first take the steps they have missed under the old ones."""
    if {**options, "lr": None} != {**group.checked, "lr": None}:
        for parameter in parameters.of_group(group):
            catch_up(parameter)
    group.adopt(options, definition)


def tracked(parameter: Parameter) -> Tracking:
    """What tells which rows of a table are behind, before a sparse gradient updates some."""
    if parameter.tracking is not None and parameter.tracking.history.full:
        catch_up(parameter)
    if parameter.tracking is not None:
        return parameter.tracking
    group, last_step = parameter.group, parameter.backend.empty(parameter.rows, np.int64)
    last_step[...] = parameter.step
    return Tracking(group.rule, group.decay, group.checked, parameter.step, last_step)


def step_of_catch_up(parameter: Parameter) -> int:
    """The number of the step whose random bits missed steps are rounded with: no update has it."""
    return -parameter.step - 1


def catch_up(parameter: Parameter, indices: Indices | None = None) -> None:
    """Let rows, those that ``indices`` name or all, take the steps that they have missed.

    The results of later steps and lookups do not depend on when they do, so that this stays done where a
    step that needed it fails.
    """
    tracking = parameter.tracking
    if tracking is None:
        return
    if tracking.history.now > tracking.history.base:
        compute = parameter.compute
        segments = None if indices is None else indices.segments
        group, options = parameter.group, tracking.options
        spec = Spec(
            rule_numbers(group, options, 0.0, parameter.step, compute),
            decay_numbers(group, options, group.decay, 0.0, 1.0, math.inf, compute),
            compute,
            (parameter.own_format, formats.PLAIN, *parameter.state_formats),
            tracking.history.kind(),
        )
        stored = parameter.stored_table(parameter.view(), parameter.state, step_of_catch_up(parameter))
        count = parameter.rows if segments is None else segments.rows.size
        row_steps = tracking.history.of_rows(tracking.last_step, count, compute)
        launch = parameter.backend.catch_up(spec, stored, row_steps, parameter.step, segments)
        calls = launch.prepare()
        parameter.before_writing(segments)
        parameter.backend.run(calls)
    if indices is None:
        parameter.tracking = None
