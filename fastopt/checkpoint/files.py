"""Optimizers in safetensors files, written whole or not at all."""

import errno
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastopt._core.files import replacing
from fastopt._core.parameters import Definition, Parameter, Snapshot, checked_group
from fastopt.checkpoint.state_dict import Restored, checked_state, state_arrays

FORMAT = 1
HEADER = "fastopt"


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
    tensors = {f"state.{i}.{slot}": a for i, state in enumerate(states) for slot, a in state.items()}
    if params:
        tensors.update({f"param.{i}": p.view() for i, p in enumerate(own)})
    header = {
        "format": FORMAT,
        "optimizer": snapshot.optimizer,
        "steps": snapshot.steps,
        "parameters": [
            {"key": p.key, "step": p.step, "slots": list(state)} for p, state in zip(own, states, strict=True)
        ],
        "param_groups": [
            {**{k: _to_json(v) for k, v in checked_group(group.options, group.label, definition).items()},
             "params": list(group.keys)}
            for group in snapshot.groups
        ],
        "params": params,
        "metadata": dict(metadata or {}),
    }  # fmt: skip
    try:
        text = json.dumps(header)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata holds what JSON can't: {error}") from error
    write_tensors(path, tensors, {HEADER: text})


def write_tensors(path: Any, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a safetensors file beside ``path``, bring it to the disk, and rename it.

    Raises:
        OSError: it can't be written; the old file is as it was.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    with replacing(target) as temporary:
        temporary.touch()
        permissions = temporary.stat().st_mode  # those of a new file here; save_file makes it private
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{target} can't be written: {error}") from error
        temporary.chmod(stat.S_IMODE(permissions))


class _Saved(NamedTuple):
    """What a file holds: a state dict, the parameters if they were asked for, the metadata."""

    state_dict: dict[str, Any]
    params: list[np.ndarray]
    metadata: dict[str, Any]


class Loaded(NamedTuple):
    """A file's content, checked against an optimizer.

    params: the array of each parameter as it is now, and what the file holds of it; empty if the parameters
    were not asked for.
    """

    restored: Restored
    params: list[tuple[Parameter, np.ndarray, np.ndarray]]
    metadata: dict[str, Any]


def load(snapshot: Snapshot, definition: Definition, path: Any, *, params: bool) -> Loaded:
    """Read ``path`` for an optimizer, and change nothing."""
    from safetensors import SafetensorError

    path = os.fspath(path)
    try:
        saved = _read(snapshot, path, params)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not as Optimizer.save saved it: {error!r}") from error
    own = snapshot.parameters
    views = [parameter.view() for parameter in own]
    if params:
        _check_params(own, views, saved.params, path)
    restored = checked_state(snapshot, definition, saved.state_dict)
    written = list(zip(own, views, saved.params, strict=True)) if params else []
    return Loaded(restored, written, saved.metadata)


def _read(snapshot: Snapshot, path: Any, params: bool) -> _Saved:
    from safetensors import safe_open

    # open() tells a missing file from one that can't be read, which safe_open does not.
    with open(path, "rb"), safe_open(path, framework="numpy") as file:
        header = _header(file.metadata(), path)
        state = {}
        for number, entry in enumerate(header["parameters"]):
            slots = {slot: file.get_tensor(f"state.{number}.{slot}") for slot in entry["slots"]}
            state[entry["key"]] = {"step": entry["step"], **slots}
        count = len(state) if params and header["params"] else 0
        arrays = [file.get_tensor(f"param.{number}") for number in range(count)]
    state_dict = {
        "optimizer": header["optimizer"],
        "steps": header["steps"],
        "state": state,
        "param_groups": [
            _from_json(snapshot, number, saved) for number, saved in enumerate(header["param_groups"])
        ],
    }
    return _Saved(state_dict, arrays, header["metadata"])


def _header(metadata: dict[str, str] | None, path: Any) -> dict[str, Any]:
    if not metadata or HEADER not in metadata:
        raise ValueError(f"{path} holds no optimizer: expected a file that Optimizer.save wrote")
    header = json.loads(metadata[HEADER])
    if header["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {header['format']}: expected {FORMAT}, load it with a newer fastopt"
        )
    return header


def _check_params(own: list[Parameter], views: list[np.ndarray], saved: list[np.ndarray], path: Any) -> None:
    if len(saved) != len(views):
        raise ValueError(
            f"{path} holds {len(saved)} parameters: expected {len(views)}, saved with params=True"
        )
    for parameter, view, array in zip(own, views, saved, strict=True):
        if (array.shape, array.dtype) != (view.shape, view.dtype):
            raise ValueError(
                f"{path} holds {parameter.label} with shape {array.shape} and dtype {array.dtype}: "
                f"expected {view.shape} and {view.dtype}"
            )


def _to_json(value: Any) -> Any:
    if callable(value):
        return {"schedule": repr(value)}
    return value


def _from_json(snapshot: Snapshot, number: int, saved: dict[str, Any]) -> dict[str, Any]:
    """A group's options; a schedule is not stored, and must be the one the optimizer was built with."""
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()}
    if isinstance(options["lr"], dict):
        groups = snapshot.groups
        own = groups[number].options["lr"] if number < len(groups) else None
        stored = options["lr"]["schedule"]
        # The repr of a plain function names its address, which differs from run to run.
        if not callable(own) or (" at 0x" not in stored and repr(own) != stored):
            raise ValueError(
                f"the saved lr is the schedule {stored}: build the optimizer with it, not {own!r}"
            )
        options["lr"] = own
    return options
