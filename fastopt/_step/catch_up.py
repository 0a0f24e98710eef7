"""``rows="dense"``: rows take the steps that they missed, before they are next needed."""

import math

import numpy as np

from fastopt._core.indices import Indices
from fastopt._core.missed import Tracking
from fastopt._core.parameters import Parameter
from fastopt._step.numbers import decay_numbers, rule_numbers
from fastopt.kernels import formats
from fastopt.kernels.work import Spec


def begin_tracking(parameter: Parameter) -> None:
    """Have it known which rows of a table are behind, before a sparse gradient updates some."""
    tracking = parameter.tracking
    if tracking is not None and tracking.history.full:
        catch_up(parameter)
    if parameter.tracking is None:
        group, last_step = parameter.group, np.full(parameter.rows, parameter.step, np.int64)
        parameter.tracking = Tracking(group.rule, group.decay, group.checked, parameter.step, last_step)


def catch_up(parameter: Parameter, indices: Indices | None = None) -> None:
    """Let rows, those that ``indices`` name or all, take the steps that they have missed."""
    tracking = parameter.tracking
    if tracking is None:
        return
    if tracking.history.now > tracking.history.base:
        compute = parameter.compute
        rows = None if indices is None else indices.segments.own_rows()
        group, options = parameter.group, tracking.options
        spec = Spec(
            rule_numbers(group, options, 0.0, parameter.step, compute),
            decay_numbers(group, options, group.decay, 0.0, 1.0, math.inf, compute),
            compute,
            (parameter.own_format, formats.PLAIN, *parameter.state_formats),
            tracking.history.kind(),
        )
        # The random numbers differ from those of the update of that step.
        stored = parameter.stored_table(-parameter.step - 1)
        count = parameter.rows if rows is None else rows.size
        row_steps = tracking.history.of_rows(tracking.last_step, count, compute)
        launch = parameter.backend.catch_up(spec, stored, row_steps, parameter.step, rows)
        parameter.before_writing(rows)
        launch.run()
    if indices is None:
        parameter.tracking = None
