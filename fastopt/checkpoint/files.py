"""Optimizers in safetensors files, written whole or not at all."""

import json
from collections.abc import Mapping
from reprlib import repr as short
from typing import Any

import numpy as np

from fastopt._core.groups import Definition, checked_group
from fastopt._core.parameters import Parameter, Snapshot
from fastopt.checkpoint import tensors
from fastopt.checkpoint.state_dict import (
    Restored,
    SavedSchedule,
    check_optimizer,
    checked_state,
    state_arrays,
)

FORMAT = 2  # 1 was the same without checksums
HEADER = "fastopt"
_SCHEDULE = "schedule"  # the key under which a file has the name of a schedule in place of lr


def save(
    snapshot: Snapshot,
    definition: Definition,
    path: Any,
    *,
    params: bool,
    metadata: Mapping[str, Any] | None,
) -> None:
    """Write an optimizer's state to ``path``."""
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(f"metadata is of type {type(metadata).__name__}: expected a dict")
    own = snapshot.parameters
    states = [state_arrays(p) for p in own]
    arrays = {f"state.{i}.{slot}": a for i, state in enumerate(states) for slot, a in state.items()}
    if params:
        arrays.update({f"param.{i}": p.view() for i, p in enumerate(own)})
    header = {
        "format": FORMAT,
        "optimizer": snapshot.optimizer,
        "steps": snapshot.steps,
        "parameters": [
            {"key": p.key, "step": p.step, "slots": list(state)} for p, state in zip(own, states, strict=True)
        ],
        "param_groups": [
            {**{k: _to_json(v) for k, v in checked_group(group.options, group.label, definition).items()},
             **group.named, "params": list(group.keys)}
            for group in snapshot.groups
        ],
        "params": params,
        "metadata": dict(metadata or {}),
    }  # fmt: skip
    try:
        text = json.dumps(header)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"metadata holds what JSON can't: {error}") from error
    tensors.write(path, arrays, {HEADER: text})


def load(
    snapshot: Snapshot, definition: Definition, path: Any, *, params: bool | None, options: bool
) -> tuple[Restored, dict[str, Any]]:
    """What ``path`` holds for an optimizer, checked against it, and the metadata; nothing changes."""
    with tensors.opened(path) as file:
        header = _header(file)
        check_optimizer(header["optimizer"], snapshot, file.path)
        if params and not header["params"]:
            raise ValueError(
                f"{file.path} holds no parameters, and params=True asks for them: save it with params=True, "
                "or load it without"
            )
        state = _state(file, header)
        count = len(state) if header["params"] and params is not False else 0
        values = [file.read(f"param.{number}") for number in range(count)]
    saved = {
        "optimizer": header["optimizer"],
        "steps": header["steps"],
        "state": state,
        "param_groups": [_from_json(group) for group in header["param_groups"]],
    }
    restored = checked_state(snapshot, definition, saved, options=options, source=file.path)
    if values:
        _check_values(snapshot.parameters, values, file.path)
        restored = restored._replace(values=values)
    return restored, header["metadata"]


def load_metadata(path: Any) -> dict[str, Any]:
    """The metadata of a file, without the rest."""
    with tensors.opened(path) as file:
        return _header(file)["metadata"]


def _header(file: tensors.TensorFile) -> dict[str, Any]:
    """What a file says of its optimizer; its lists and dicts are what they should be."""
    path = file.path
    if HEADER not in file.metadata:
        raise ValueError(f"{path} holds no optimizer: expected a file that Optimizer.save wrote")
    try:
        header = json.loads(file.metadata[HEADER])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not as Optimizer.save saved it: {error}") from error
    version = _field(header, "format", int, path)
    if not 1 <= version <= FORMAT:
        raise ValueError(f"{path} has format {version}: expected 1 to {FORMAT}, load it with a newer fastopt")
    if version > 1 and not file.checked:
        raise ValueError(f"{path} has no checksums: expected those that Optimizer.save wrote")
    for name, kind in (("optimizer", str), ("params", bool), ("metadata", dict), ("steps", int)):
        _field(header, name, kind, path)
    for name in ("parameters", "param_groups"):
        for number, entry in enumerate(_field(header, name, list, path)):
            if not isinstance(entry, dict):
                raise ValueError(f"{path}[{name!r}][{number}] is {short(entry)}: expected a dict")
    expected: set[str] = set()
    for number, entry in enumerate(header["parameters"]):
        where = f"{path}['parameters'][{number}]"
        _field(entry, "key", (str, int), where)
        _field(entry, "step", int, where)
        slots = _field(entry, "slots", list, where)
        if not all(isinstance(slot, str) for slot in slots):
            raise ValueError(f"{where}['slots'] is {short(slots)}: expected names")
        expected.update(f"state.{number}.{slot}" for slot in slots)
        if header["params"]:
            expected.add(f"param.{number}")
    if expected != file.names:
        name = min(expected ^ file.names)
        raise ValueError(
            f"{path} is not a whole safetensors file: it {'lacks' if name in expected else 'has'} the tensor "
            f"{name!r}, expected those that its metadata names"
        )
    return header


def _field(entry: Any, name: str, kind: Any, where: str) -> Any:
    if not isinstance(entry, dict) or name not in entry:
        raise ValueError(f"{where} is not as Optimizer.save saved it: it lacks {name!r}")
    if not isinstance(entry[name], kind) or (isinstance(entry[name], bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(one.__name__ for one in kinds)
        raise ValueError(f"{where}[{name!r}] is {short(entry[name])}: expected {expected}")
    return entry[name]


def _state(file: tensors.TensorFile, header: dict[str, Any]) -> dict[Any, dict[str, Any]]:
    """The state of each parameter by its key."""
    state = {}
    for number, entry in enumerate(header["parameters"]):
        if entry["key"] in state:
            raise ValueError(
                f"{file.path}['parameters'][{number}]['key'] is {entry['key']!r}, that of another one"
            )
        slots = {slot: file.read(f"state.{number}.{slot}") for slot in entry["slots"]}
        state[entry["key"]] = {"step": entry["step"], **slots}
    return state


def _check_values(own: list[Parameter], values: list[np.ndarray], path: Any) -> None:
    for parameter, value in zip(own, values, strict=True):
        view = parameter.view()
        if (value.shape, value.dtype) != (view.shape, view.dtype):
            raise ValueError(
                f"{path} holds {parameter.label} with shape {value.shape} and dtype {value.dtype}: "
                f"expected {view.shape} and {view.dtype}, or pass params=False to keep your own"
            )


def _to_json(value: Any) -> Any:
    return {_SCHEDULE: repr(value)} if callable(value) else value


def _from_json(group: dict[str, Any]) -> dict[str, Any]:
    """A group's options; of a schedule a file has the name alone."""
    options = {name: tuple(v) if isinstance(v, list) and name != "params" else v for name, v in group.items()}
    match options.get("lr"):
        case {"schedule": str(text)}:
            options["lr"] = SavedSchedule(text)
    return options
