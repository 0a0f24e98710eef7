"""Optimizers as state dicts: taken, and checked before they are taken over."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fastopt._core import arrays
from fastopt._core.backend import host
from fastopt._core.missed import LAST_STEP, LR_HISTORY, MOST_COUNTED, ROW_STEPS, Tracking
from fastopt._core.options import FIXED, SHARED, plain
from fastopt._core.parameters import (
    Definition,
    Parameter,
    ParameterGroup,
    Snapshot,
    checked_group,
    decay_type,
)
from fastopt._core.state import SCALES
from fastopt.kernels.at_once import at_once

_KEYS = ("optimizer", "steps", "state", "param_groups")


class ParameterState(NamedTuple):
    """What a state dict holds of a parameter, checked."""

    step: int
    state: dict[str, np.ndarray]
    tracking: Tracking | None


class Restored(NamedTuple):
    """What a state dict holds, checked against an optimizer: ``options`` of each group, ``states`` of each
    parameter."""

    steps: int
    options: list[dict[str, Any]]
    states: list[ParameterState]


def state_arrays(parameter: Parameter) -> dict[str, np.ndarray]:
    """A parameter's state as it is saved, C-contiguous."""
    state = {slot: np.asarray(array, order="C") for slot, array in parameter.state.items()}
    if parameter.tracking is not None:
        state[LAST_STEP] = parameter.tracking.last_step
        state[LR_HISTORY] = parameter.tracking.history.lrs
    return state


def state_dict(snapshot: Snapshot) -> dict[str, Any]:
    """A copy of everything but the parameters."""
    return {
        "optimizer": snapshot.optimizer,
        "steps": snapshot.steps,
        "state": {
            p.key: {"step": p.step, **{slot: array.copy() for slot, array in state_arrays(p).items()}}
            for p in snapshot.parameters
        },
        "param_groups": [
            {**{name: plain(value) for name, value in group.options.items() if name != "params"},
             "params": list(group.keys)}
            for group in snapshot.groups
        ],
    }  # fmt: skip


def checked_state(snapshot: Snapshot, definition: Definition, state_dict: Mapping[str, Any]) -> Restored:
    """A copy of what ``state_dict`` holds, for the optimizer that ``snapshot`` is of.

    Raises:
        TypeError, ValueError: it does not fit the optimizer.
    """
    if not isinstance(state_dict, Mapping) or set(state_dict) != set(_KEYS):
        got = (
            ", ".join(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        )
        raise ValueError(
            f"state_dict has {got}: expected the keys {', '.join(_KEYS)}, as state_dict() returns"
        )
    name = snapshot.optimizer
    if state_dict["optimizer"] != name:
        raise ValueError(
            f"state_dict is of the optimizer {state_dict['optimizer']!r}: expected {name!r}, "
            "load it into the optimizer it came from"
        )
    steps = _count(state_dict["steps"], "state_dict['steps']")
    groups = state_dict["param_groups"]
    if not isinstance(groups, list | tuple) or len(groups) != len(snapshot.groups):
        raise ValueError(
            f"state_dict['param_groups'] has {_length(groups)}: expected {len(snapshot.groups)} groups"
        )
    options = [
        _options(definition, group, saved, f"state_dict['param_groups'][{number}]")
        for number, (group, saved) in enumerate(zip(snapshot.groups, groups, strict=True))
    ]
    keys = [parameter.key for parameter in snapshot.parameters]
    saved_state = state_dict["state"]
    if not isinstance(saved_state, Mapping) or set(saved_state) != set(keys):
        raise ValueError(
            f"state_dict['state'] has {_length(saved_state)}: expected one entry for each of the parameters "
            f"{', '.join(map(repr, keys))}"
        )
    states = [_state(definition, options[p.group.number], p, saved_state[p.key]) for p in snapshot.parameters]
    return Restored(steps, options, states)


def _options(definition: Definition, group: ParameterGroup, saved: Any, label: str) -> dict[str, Any]:
    expected = {*definition.defaults, "params"}
    if isinstance(saved, Mapping) and saved:  # of a version that lacked some of the options that all have
        saved = {**{name: SHARED[name] for name in SHARED if name in expected}, **saved}
    if not isinstance(saved, Mapping) or set(saved) != expected:
        raise ValueError(f"{label} has {_length(saved)}: expected the options {', '.join(sorted(expected))}")
    keys = group.keys
    if not isinstance(saved["params"], list | tuple) or list(saved["params"]) != keys:
        raise ValueError(
            f"{label}['params'] is {saved['params']!r}: expected {keys!r}, the optimizer's parameters"
        )
    options = checked_group({**saved, "params": None}, label, definition)
    for name in FIXED:
        if options[name] != group.checked[name]:
            raise ValueError(
                f"{label} has {name} {options[name]!r}: expected {group.checked[name]!r}, "
                "build the optimizer with the same options"
            )
    rule = definition.rule(options)
    if rule != group.rule:
        own = (*group.rule.state_slots, *group.rule.row_slots)
        raise ValueError(
            f"{label} belongs to an optimizer with the state {(*rule.state_slots, *rule.row_slots)}: "
            f"expected {own}, build the optimizer with the same options"
        )
    return options


def _state(
    definition: Definition, options: Mapping[str, Any], parameter: Parameter, saved: Any
) -> ParameterState:
    label = f"state_dict['state'][{parameter.key!r}]"
    expected = parameter.slots(_is_by_row(saved))
    if not isinstance(saved, Mapping) or "step" not in saved:
        raise ValueError(
            f"{label} has {_length(saved)}: expected step and {', '.join(expected) or 'nothing else'}"
        )
    step = _count(saved["step"], f"{label}['step']")
    behind = {LAST_STEP, LR_HISTORY} & set(saved) if options["rows"] == "dense" else set()
    slots = set(saved) - {"step"} - behind
    if slots != set(expected) and (slots or step):
        raise ValueError(
            f"{label} has the state {', '.join(sorted(map(str, slots))) or 'none'}: expected "
            f"{', '.join(expected) or 'none'}"
        )
    state = {}
    for slot in expected if slots else ():
        shape, dtype, _ = expected[slot]
        state[slot] = _array(saved[slot], f"{label}[{slot!r}]", shape, dtype)
    counts = state.get(ROW_STEPS, np.empty(0, np.int64))
    if counts.size and not 0 <= counts.min() <= counts.max() <= step:
        raise ValueError(
            f"{label}[{ROW_STEPS!r}] has counts from {counts.min()} to {counts.max()}: expected 0 to {step}"
        )
    tracking = _tracking(definition, options, parameter, saved, step) if behind else None
    return ParameterState(step, state, tracking)


def _is_by_row(saved: Any) -> bool:
    """Whether blocks of 8-bit codes end with the rows of a table."""
    scales = [value for name, value in saved.items() if str(name).endswith(SCALES)] if saved else []
    return any(getattr(value, "ndim", 0) == 2 for value in scales)


def _tracking(
    definition: Definition,
    options: Mapping[str, Any],
    parameter: Parameter,
    saved: Mapping[str, Any],
    step: int,
) -> Tracking:
    """Which rows are behind, and the steps since none was."""
    label = f"state_dict['state'][{parameter.key!r}]"
    if LAST_STEP not in saved or LR_HISTORY not in saved:
        raise ValueError(f"{label} has one of {LAST_STEP} and {LR_HISTORY}: expected both or none")
    integer = np.dtype(np.int64)
    last_step = _array(saved[LAST_STEP], f"{label}[{LAST_STEP!r}]", (parameter.rows,), integer)
    most = host().History.MOST_STEPS
    lrs = arrays.host_array(saved[LR_HISTORY], f"{label}[{LR_HISTORY!r}]")
    if lrs.ndim != 1 or lrs.dtype != np.float64 or lrs.size > min(step, most):
        raise ValueError(
            f"{label}[{LR_HISTORY!r}] has shape {lrs.shape} and dtype {lrs.dtype}: expected at most "
            f"{min(step, most)} float64 numbers"
        )
    base = step - lrs.size
    if last_step.size and not base <= last_step.min() <= last_step.max() <= step:
        raise ValueError(
            f"{label}[{LAST_STEP!r}] has steps from {last_step.min()} to {last_step.max()}: expected "
            f"{base} to {step}"
        )
    tracking = Tracking(parameter.group.rule, decay_type(definition, options), options, base, last_step)
    for lr in lrs.tolist():
        if not 0 <= lr < np.inf:
            raise ValueError(f"{label}[{LR_HISTORY!r}] holds {lr!r}: expected finite numbers, at least 0")
        at_once(tracking.history.advance(lr))
    return tracking


def _array(value: Any, label: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A copy of ``value``, which must have this shape and dtype."""
    array = arrays.host_array(value, label)
    if array.shape != shape:
        raise ValueError(f"{label} has shape {array.shape}: expected {shape}")
    if array.dtype != dtype:
        raise TypeError(f"{label} has dtype {array.dtype}: expected {dtype}")
    return np.array(array, order="C")


def _count(value: Any, label: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value <= MOST_COUNTED:
        raise ValueError(f"{label} is {value!r}: expected a whole number, at least 0")
    return int(value)


def _length(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(map(str, value)) or "no keys"
    return f"{len(value)} entries" if isinstance(value, list | tuple) else f"type {type(value).__name__}"
