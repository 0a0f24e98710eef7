"""Replays of a step that was captured in a graph of a device (CUDA graphs)."""

from fastopt._core.backend import Calls
from fastopt._core.groups import Definition
from fastopt._core.parameters import Parameters
from fastopt._core.versions import written
from fastopt._step.catch_up import adopt_changed
from fastopt._step.planner import Planner


def next_replay(parameters: Parameters, planner: Planner, definition: Definition) -> Calls:
    """The calls that make the captured step ready to be replayed once, as the next step, and count it.

    Raises:
        RuntimeError: what was captured is not what a step would do now.
        TypeError, ValueError: as :meth:`Planner.options`.
    """
    plan = planner.kept
    if plan is None or plan.captured is None:
        raise _not_replayed("none was captured since arrays, options or kinds of gradients last changed")
    options = planner.options(definition)
    if options.other_plan:
        raise _not_replayed("options other than learning rates changed")
    adopt_changed(parameters, options, definition)
    calls = plan.replay(options.rates)
    written(plan.captured.written)
    return calls


def _not_replayed(reason: str) -> RuntimeError:
    return RuntimeError(
        f"there is no step to replay: {reason}; make an ordinary step, and capture opt.step(...) in a graph"
    )
