"""Going on with what was read and checked."""

from collections.abc import Callable
from functools import partial
from operator import setitem

import numpy as np

from fastopt._core.groups import Definition
from fastopt._core.parameters import Parameters
from fastopt.checkpoint.state_dict import Restored
from fastopt.kernels.at_once import at_once


def take_over(parameters: Parameters, restored: Restored, definition: Definition) -> None:
    """Go on with what was restored. Where the state of a table in files is empty it has first values, or,
    after steps, stays as its files have it."""
    steps = [*(own.step for own in restored.states), restored.steps]
    calls: list[Callable[[], object]] = [partial(setitem, parameters.clock, ..., np.array(steps))]
    for group, options, named in zip(parameters.groups, restored.options, restored.names, strict=True):
        if options is not None:
            own = {**options, **named}
            calls.append(partial(group.options.update, own))
            calls.append(group.adopting(options, {**group.options, **own}, definition))
    for parameter, (parameter_step, state, tracking) in zip(parameters.all, restored.states, strict=True):
        calls.append(partial(setattr, parameter, "tracking", tracking))
        calls.append(partial(setattr, parameter, "described", None))  # which would keep the former state
        if parameter.in_files is None:
            calls.append(partial(setattr, parameter, "state", state))
        elif state or (parameter.state and not parameter_step):
            slots = parameter.slots()
            own = parameter.state or parameter.in_files.state(slots)
            parameter.before_writing(None)
            calls.append(partial(setattr, parameter, "state", own))
            for name, slot in slots.items():
                calls.append(partial(setitem, own[name], ..., state.get(name, slot.first)))
    for parameter, value in zip(parameters.all, restored.values, strict=True):
        if value is not None:
            parameter.before_writing(None)
            calls.append(partial(setitem, parameter.view(), ..., value))
    at_once(calls)
