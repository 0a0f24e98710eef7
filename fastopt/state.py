"""Restoring an optimizer's state: everything is checked, then everything is taken over."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fastopt import arrays

if TYPE_CHECKING:
    from fastopt.optimizer import Optimizer, _Group, _Parameter

MOST_STEPS = 2**53  # which float64 still counts
_KEYS = ("optimizer", "steps", "state", "param_groups")


def restore(optimizer: "Optimizer", state_dict: Mapping[str, Any]) -> None:
    """Take over a copy of ``state_dict``; change nothing if it does not fit."""
    if not isinstance(state_dict, Mapping) or set(state_dict) != set(_KEYS):
        got = (
            ", ".join(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        )
        raise ValueError(
            f"state_dict has {got}: expected the keys {', '.join(_KEYS)}, as state_dict() returns"
        )
    name = type(optimizer).__name__
    if state_dict["optimizer"] != name:
        raise ValueError(
            f"state_dict is of the optimizer {state_dict['optimizer']!r}: expected {name!r}, "
            "load it into the optimizer it came from"
        )
    steps = _count(state_dict["steps"], "state_dict['steps']")
    groups = state_dict["param_groups"]
    if not isinstance(groups, list | tuple) or len(groups) != len(optimizer._groups):
        raise ValueError(
            f"state_dict['param_groups'] has {_length(groups)}: expected {len(optimizer._groups)} groups"
        )
    options = [
        _options(optimizer, group, saved, f"state_dict['param_groups'][{number}]")
        for number, (group, saved) in enumerate(zip(optimizer._groups, groups, strict=True))
    ]
    keys = [parameter.key for parameter in optimizer._parameters()]
    saved_state = state_dict["state"]
    if not isinstance(saved_state, Mapping) or set(saved_state) != set(keys):
        raise ValueError(
            f"state_dict['state'] has {_length(saved_state)}: expected one entry for each of the parameters "
            f"{', '.join(map(repr, keys))}"
        )
    states = [
        _state(optimizer, group, parameter, saved_state[parameter.key])
        for group in optimizer._groups
        for parameter in group.parameters
    ]

    optimizer._steps = steps
    for group, new in zip(optimizer._groups, options, strict=True):
        group.options.update(new)
        group.checked = new
    for parameter, (step, arrays_by_slot) in zip(optimizer._parameters(), states, strict=True):
        parameter.step = step
        parameter.state = arrays_by_slot


def _options(optimizer: "Optimizer", group: "_Group", saved: Any, label: str) -> dict[str, Any]:
    expected = {*optimizer.defaults, "params"}
    if not isinstance(saved, Mapping) or set(saved) != expected:
        raise ValueError(f"{label} has {_length(saved)}: expected the options {', '.join(sorted(expected))}")
    keys = [parameter.key for parameter in group.parameters]
    if not isinstance(saved["params"], list | tuple) or list(saved["params"]) != keys:
        raise ValueError(
            f"{label}['params'] is {saved['params']!r}: expected {keys!r}, the optimizer's parameters"
        )
    options = optimizer._check({**saved, "params": None}, label)
    rule = optimizer.rule(options)
    if rule != group.rule:
        own = (*group.rule.state_slots, *group.rule.row_slots)
        raise ValueError(
            f"{label} belongs to an optimizer with the state {(*rule.state_slots, *rule.row_slots)}: "
            f"expected {own}, build the optimizer with the same options"
        )
    return options


def _state(
    optimizer: "Optimizer", group: "_Group", parameter: "_Parameter", saved: Any
) -> tuple[int, dict[str, np.ndarray]]:
    label = f"state_dict['state'][{parameter.key!r}]"
    shapes = dict(optimizer._slot_shapes(group, parameter))
    if not isinstance(saved, Mapping) or "step" not in saved:
        raise ValueError(
            f"{label} has {_length(saved)}: expected step and {', '.join(shapes) or 'nothing else'}"
        )
    step = _count(saved["step"], f"{label}['step']")
    slots = set(saved) - {"step"}
    if slots != set(shapes) and (slots or step):
        raise ValueError(
            f"{label} has the state {', '.join(sorted(map(str, slots))) or 'none'}: expected "
            f"{', '.join(shapes) or 'none'}"
        )
    state = {}
    for slot in shapes if slots else ():
        array = arrays.host_array(saved[slot], f"{label}[{slot!r}]")
        if array.shape != shapes[slot]:
            raise ValueError(f"{label}[{slot!r}] has shape {array.shape}: expected {shapes[slot]}")
        if array.dtype != parameter.dtype:
            raise TypeError(f"{label}[{slot!r}] has dtype {array.dtype}: expected {parameter.dtype}")
        state[slot] = np.array(array, order="C")
    return step, state


def _count(value: Any, label: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value <= MOST_STEPS:
        raise ValueError(f"{label} is {value!r}: expected a whole number, at least 0")
    return int(value)


def _length(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(map(str, value)) or "no keys"
    return f"{len(value)} entries" if isinstance(value, list | tuple) else f"type {type(value).__name__}"
