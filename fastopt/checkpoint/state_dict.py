"""Optimizers as state dicts: taken, and checked before they are taken over."""

import re
from collections.abc import Iterable, Mapping
from reprlib import repr as short
from typing import Any, NamedTuple

import numpy as np

from fastopt._core import arrays
from fastopt._core.backend import backend_of, host
from fastopt._core.groups import NAME, Definition, ParameterGroup, checked_group, decay_type
from fastopt._core.missed import LAST_STEP, LR_HISTORY, MOST_COUNTED, ROW_STEPS, Tracking
from fastopt._core.options import FIXED, SHARED, plain
from fastopt._core.parameters import Parameter, Snapshot
from fastopt._core.state import SCALES
from fastopt.kernels.at_once import at_once
from fastopt.kernels.work import Array

_KEYS = ("optimizer", "steps", "state", "param_groups")
_MOST_LISTED = 20  # names in an error


class ParameterState(NamedTuple):
    """What a state dict holds of a parameter, checked, where the parameter lies."""

    step: int
    state: dict[str, Array]
    tracking: Tracking | None


class Restored(NamedTuple):
    """What a state dict or a file holds, checked against an optimizer: all that is to change.

    options: of each group, None to keep its own. names: of each group, its name as it stands among options,
    or nothing. states: of each parameter. values: the new value of each parameter, None to keep its own.
    """

    steps: int
    options: list[dict[str, Any] | None]
    names: list[dict[str, str]]
    states: list[ParameterState]
    values: list[np.ndarray] | list[None]


class SavedSchedule(NamedTuple):
    """The place of a learning rate's schedule in a file, which has its ``repr`` alone."""

    text: str


def state_arrays(parameter: Parameter) -> dict[str, Array]:
    """A parameter's state as it is saved, C-contiguous, where it lies."""
    contiguous = parameter.backend.contiguous
    state = {slot: contiguous(array) for slot, array in parameter.state.items()}
    if parameter.tracking is not None:
        state[LAST_STEP] = parameter.tracking.last_step
        state[LR_HISTORY] = parameter.tracking.history.lrs
    return state


def copied(array: Array) -> np.ndarray:
    """A copy in the memory of the host."""
    return backend_of(array).to_host(array)


def state_dict(snapshot: Snapshot) -> dict[str, Any]:
    """A copy of everything but the parameters, in the memory of the host."""
    return {
        "optimizer": snapshot.optimizer,
        "steps": snapshot.steps,
        "state": {
            p.key: {"step": p.step, **{slot: copied(array) for slot, array in state_arrays(p).items()}}
            for p in snapshot.parameters
        },
        "param_groups": [
            {**{name: plain(value) for name, value in group.options.items() if name != "params"},
             "params": list(group.keys)}
            for group in snapshot.groups
        ],
    }  # fmt: skip


def checked_state(
    snapshot: Snapshot,
    definition: Definition,
    state_dict: Mapping[str, Any],
    *,
    options: bool,
    source: str = "state_dict",
) -> Restored:
    """A copy of what ``state_dict`` holds, for the optimizer that ``snapshot`` is of.

    Args:
        options: whether to restore options; otherwise only those that the state depends on must be the same.
        source: what errors call it: a dict, or the path of the file that it was read from.

    Raises:
        TypeError, ValueError: it does not fit the optimizer.
    """
    if not isinstance(state_dict, Mapping) or set(state_dict) != set(_KEYS):
        raise ValueError(
            f"{source} has {_told(state_dict)}: expected the keys {', '.join(_KEYS)}, as state_dict() returns"
        )
    check_optimizer(state_dict["optimizer"], snapshot, source)
    steps = _count(state_dict["steps"], f"{source}['steps']")
    groups = state_dict["param_groups"]
    if not isinstance(groups, list | tuple) or len(groups) != len(snapshot.groups):
        raise ValueError(
            f"{source}['param_groups'] has {_told(groups)}: expected {len(snapshot.groups)} groups"
        )
    saved_options = [
        _options(definition, group, saved, f"{source}['param_groups'][{number}]", options)
        for number, (group, saved) in enumerate(zip(snapshot.groups, groups, strict=True))
    ]
    keys = [parameter.key for parameter in snapshot.parameters]
    state = state_dict["state"]
    if not isinstance(state, Mapping) or set(state) != set(keys):
        raise ValueError(
            f"{source}['state'] has {_told(state)}: expected one entry for each of the parameters "
            f"{_listed(keys)}{_difference(state, keys)}"
        )
    states = [
        _state(definition, saved_options[p.group.number], p, state[p.key], f"{source}['state'][{p.key!r}]")
        for p in snapshot.parameters
    ]
    for key, own in zip(keys, states, strict=True):
        _count(own.step, f"{source}['state'][{key!r}]['step']", steps)
    if options:
        names = [{NAME: saved[NAME]} if NAME in saved else {} for saved in groups]
        return Restored(steps, list(saved_options), names, states, [None] * len(states))
    for parameter, own in zip(snapshot.parameters, states, strict=True):
        saved = saved_options[parameter.group.number]
        if own.tracking is not None and {**saved, "lr": None} != {**parameter.group.checked, "lr": None}:
            raise ValueError(
                f"{source}['state'][{parameter.key!r}] has rows that are behind, which must take the steps "
                "missed under the saved options: load it with options=True, then change param_groups"
            )
    return Restored(steps, [None] * len(groups), [{}] * len(groups), states, [None] * len(states))


def check_optimizer(saved: Any, snapshot: Snapshot, source: str) -> None:
    """Refuse the state of another class of optimizers, before all else that would not fit."""
    if not isinstance(saved, str) or saved != snapshot.optimizer:
        raise ValueError(
            f"{source} is of the optimizer {short(saved)}: expected {snapshot.optimizer!r}, load it into the "
            "optimizer it came from"
        )


def _options(
    definition: Definition, group: ParameterGroup, saved: Any, label: str, restore: bool
) -> dict[str, Any]:
    """The saved options, checked; in place of a learning rate that is not to be restored the group's own."""
    expected = {*definition.defaults, "params"}
    if isinstance(saved, Mapping) and saved:  # of a version that lacked some of the options that all have
        saved = {**{name: SHARED[name] for name in SHARED if name in expected}, **saved}
    if not isinstance(saved, Mapping) or set(saved) - {NAME} != expected:
        raise ValueError(
            f"{label} has {_told(saved)}: expected the options {', '.join(sorted(expected))}"
            f"{_difference(saved, expected)}"
        )
    keys = group.keys
    names = saved["params"] if isinstance(saved["params"], list | tuple) else [None]
    if not all(isinstance(name, str | int) for name in names) or list(names) != keys:
        raise ValueError(
            f"{label}['params'] is {short(saved['params'])}: expected {short(keys)}, the optimizer's "
            f"parameters{_difference(saved['params'], keys)}"
        )
    lr = _restored_lr(saved["lr"], group, label) if restore else group.checked["lr"]
    options = checked_group({**saved, "params": None, "lr": lr}, label, definition)
    definition.check_options(options, label)
    for name in FIXED:
        if options[name] != group.checked[name]:
            raise ValueError(
                f"{label} has {name} {options[name]!r}: expected {group.checked[name]!r}, that of "
                f"{group.label}; build the optimizer with {name}={options[name]!r}"
            )
    rule = definition.rule(options)
    if rule != group.rule:
        own = (*group.rule.state_slots, *group.rule.row_slots)
        raise ValueError(
            f"{label} belongs to an optimizer with the state {(*rule.state_slots, *rule.row_slots)}: "
            f"expected {own}, build the optimizer with the same options"
        )
    return options


def _restored_lr(saved: Any, group: ParameterGroup, label: str) -> Any:
    """The learning rate to go on with: what was saved, unless that would lose a schedule without a word."""
    own = group.options["lr"]
    if isinstance(saved, SavedSchedule):
        if callable(own) and _name_of(repr(own)) == _name_of(saved.text):
            return own
        raise ValueError(
            f"{label} has as lr the schedule {saved.text}, of which a file holds the name alone, and "
            f"{group.label} has {own!r}: build the optimizer with that schedule, or pass options=False to "
            "keep your own options"
        )
    if callable(own) and not callable(saved):
        raise ValueError(
            f"{label} has lr {saved!r}, and {group.label} has the schedule {own!r}: build the optimizer with "
            "a number, or pass options=False to keep your own options"
        )
    return saved


def _name_of(text: str) -> str:
    """The repr of a function without its address, which differs from run to run."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _state(
    definition: Definition, options: Mapping[str, Any], parameter: Parameter, saved: Any, label: str
) -> ParameterState:
    if not isinstance(saved, Mapping) or "step" not in saved:
        names = ", ".join(parameter.slots()) or "nothing else"
        raise ValueError(f"{label} has {_told(saved)}: expected step and {names}")
    expected = parameter.slots(_is_by_row(saved))
    step = _count(saved["step"], f"{label}['step']")
    behind = {LAST_STEP, LR_HISTORY} & set(saved) if options["rows"] == "dense" else set()
    slots = set(saved) - {"step"} - behind
    in_its_files = parameter.in_files is not None and not slots
    if slots != set(expected) and (slots or step) and not in_its_files:
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
    tracking = _tracking(definition, options, parameter, saved, step, label) if behind else None
    return ParameterState(step, {k: _beside(parameter, array) for k, array in state.items()}, tracking)


def _beside(parameter: Parameter, array: np.ndarray) -> Array:
    """An array of the host's where the parameter lies, and placed as new state would be."""
    if parameter.device >= 0:
        return parameter.backend.from_host(array)
    beside = parameter.beside
    if beside is None or array.shape != beside.shape:
        return array
    [placed] = parameter.backend.zeros_beside(beside, [array.dtype])
    placed[...] = array
    return placed


def _is_by_row(saved: Mapping[str, Any]) -> bool:
    """Whether blocks of 8-bit codes end with the rows of a table."""
    scales = [value for name, value in saved.items() if str(name).endswith(SCALES)]
    return any(getattr(value, "ndim", 0) == 2 for value in scales)


def _tracking(
    definition: Definition,
    options: Mapping[str, Any],
    parameter: Parameter,
    saved: Mapping[str, Any],
    step: int,
    label: str,
) -> Tracking:
    """Which rows are behind, and the steps since none was."""
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
    decay = decay_type(definition, options)
    tracking = Tracking(parameter.group.rule, decay, options, base, _beside(parameter, last_step))
    for lr in lrs.tolist():
        if not 0 <= lr < np.inf:
            raise ValueError(f"{label}[{LR_HISTORY!r}] holds {lr!r}: expected finite numbers, at least 0")
        try:
            at_once(tracking.history.advance(lr))
        except ValueError as error:
            raise ValueError(f"{label}[{LR_HISTORY!r}] does not go with the options: {error}") from error
    return tracking


def _array(value: Any, label: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A copy of ``value``, which must have this shape and dtype, in the memory of the host."""
    array = arrays.array_view(value, label)
    if array.shape != shape:
        raise ValueError(f"{label} has shape {array.shape}: expected {shape}")
    if array.dtype != dtype:
        raise TypeError(f"{label} has dtype {array.dtype}: expected {dtype}")
    return copied(array)


def _count(value: Any, label: str, most: int = MOST_COUNTED) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value <= most:
        raise ValueError(f"{label} is {short(value)}: expected a whole number from 0 to {most}")
    return int(value)


def _told(value: Any) -> str:
    """What there is in place of the keys, or of the list, that were expected."""
    if isinstance(value, Mapping):
        return _listed(value) or "no keys"
    return f"{len(value)} entries" if isinstance(value, list | tuple) else f"type {type(value).__name__}"


def _listed(names: Iterable[Any]) -> str:
    """The names, of many the first."""
    names = [str(name) for name in names]
    more = f", and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more


def _difference(got: Any, expected: Iterable[Any]) -> str:
    """A name that is missing, and one that is not expected."""
    if not isinstance(got, Mapping | list | tuple):
        return ""
    names, wanted = (dict.fromkeys(x for x in all_ if isinstance(x, str | int)) for all_ in (got, expected))
    missing, other = (next((x for x in a if x not in b), None) for a, b in ((wanted, names), (names, wanted)))
    lacks = "" if missing is None else f"; it lacks {missing!r}"
    return lacks if other is None else f"{lacks}; it has {other!r}, which is not expected"
