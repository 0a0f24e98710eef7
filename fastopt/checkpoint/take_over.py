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
    """Go on with what was restored; tables in files have first values where a state is empty."""
    steps = [*(own.step for own in restored.states), restored.steps]
    calls: list[Callable[[], object]] = [partial(setitem, parameters.clock, ..., np.array(steps))]
    for group, options, named in zip(parameters.groups, restored.options, restored.names, strict=True):
        if options is not None:
            own = {**options, **named}
            calls.append(partial(group.options.update, own))
            calls.append(group.adopting(options, {**group.options, **own}, definition))
    for parameter, (_, state, tracking) in zip(parameters.all, restored.states, strict=True):
        calls.append(partial(setattr, parameter, "tracking", tracking))
        if parameter.in_files is None:
            calls.append(partial(setattr, parameter, "state", state))
        elif state or parameter.state:
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
