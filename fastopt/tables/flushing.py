"""Optimizers over tables in files: what is stored with a flush, and going on from there."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from fastopt._core.missed import MOST_COUNTED
from fastopt._core.parameters import Parameter, Snapshot
from fastopt.kernels.at_once import at_once
from fastopt.tables.folder import META
from fastopt.tables.meta import Fields
from fastopt.tables.table import Table, commit

Progress = Mapping[str, Any] | None


class Resumed(NamedTuple):
    """Where tables in files go on: after ``steps`` of the optimizer, None if it is new, with these steps of
    each of their parameters."""

    steps: int | None
    steps_of: list[tuple[Parameter, int]]


class _Stored(NamedTuple):
    """What :func:`progress` made, read from a table."""

    optimizer: str
    key: str | int
    steps: int
    step: int
    slots: list[str]
    tables: list[str | int]


def _tables(snapshot: Snapshot) -> list[tuple[Parameter, Table]]:
    return [(p, p.value) for p in snapshot.parameters if isinstance(p.value, Table)]


def progress(snapshot: Snapshot, parameter: Parameter) -> dict[str, Any]:
    """What a flush stores with a table; all that belongs to one state of the optimizer has its ``steps``."""
    return {
        "optimizer": snapshot.optimizer,
        "key": parameter.key,
        "steps": snapshot.steps,
        "step": parameter.step,
        "slots": list(parameter.slots()),
        "tables": [other.key for other, _ in _tables(snapshot)],
    }


def flush(snapshot: Snapshot) -> None:
    """Bring all open tables in files to the disk, then make that what counts."""
    every = _tables(snapshot)
    stored = [one for one in every if not one[1].closed] or every  # which then says that it is closed
    for parameter, table in stored:
        table.prepare(progress(snapshot, parameter))
    commit([table for _, table in stored])


def resume(snapshot: Snapshot, owner: Any) -> Resumed:
    """Go on where tables in files were flushed last, all at the same step of the optimizer ``owner``."""
    stored = _tables(snapshot)
    last = [_read(parameter, table, table.progress, "progress") for parameter, table in stored]
    before = [_read(parameter, table, table.previous, "the previous progress") for parameter, table in stored]
    back = _interrupted(stored, last, before)
    chosen = [b if table in back else own for (_, table), own, b in zip(stored, last, before, strict=True)]
    for (parameter, table), own in zip(stored, chosen, strict=True):
        if table.changed and table.owner is not None and table.owner is not owner:
            raise ValueError(
                f"{parameter.label}, {table.path}, was changed by another optimizer since its last flush: "
                "flush it first"
            )
        _check(snapshot, parameter, table, own)
    for table in back:
        table.roll_back()
    steps, steps_of = None, []
    for (parameter, table), own in zip(stored, chosen, strict=True):
        if own is not None:
            steps = own.steps
            steps_of.append((parameter, own.step))
            if own.step and own.slots:
                parameter.state = table.state(parameter.slots())
    at_once(partial(setattr, table, "owner", owner) for _, table in stored)
    return Resumed(steps, steps_of)


def _read(parameter: Parameter, table: Table, stored: Progress, name: str) -> _Stored | None:
    """What :func:`progress` stored, checked."""
    if stored is None:
        return None
    field = Fields(stored)
    try:
        return _Stored(
            field.text("optimizer"),
            field.key("key"),
            field.whole("steps", 0, MOST_COUNTED),
            field.whole("step", 0, field.whole("steps", 0, MOST_COUNTED)),
            [str(slot) for slot in field.keys("slots")],
            field.keys("tables"),
        )
    except ValueError as error:
        raise ValueError(
            f"{name} of {parameter.label}, in {table.path / META}, is not what an optimizer's flush stores: "
            f"{error}; pass a table that an optimizer flushed, or a new one, which init= may fill from this"
        ) from error


def _interrupted(
    stored: list[tuple[Parameter, Table]], last: list[_Stored | None], before: list[_Stored | None]
) -> list[Table]:
    """The tables whose last flush others have not made: a crash came between them."""
    together = {key for own in last if own is not None for key in own.tables}
    missed = any(
        own is None and parameter.key in together for (parameter, _), own in zip(stored, last, strict=True)
    )
    goal = None if missed else min((own.steps for own in last if own is not None), default=None)
    back = []
    for (parameter, table), own, former in zip(stored, last, before, strict=True):
        if own is None or own.steps == goal:
            continue
        if not table.has_previous or (None if former is None else former.steps) != goal:
            raise ValueError(
                f"{parameter.label}, {table.path}, was flushed at step {own.steps} of its optimizer but "
                f"another table at {'none' if goal is None else goal}: expected tables that were flushed "
                "together; give each to an optimizer of its own, as it was when they were flushed"
            )
        back.append(table)
    return back


def _check(snapshot: Snapshot, parameter: Parameter, table: Table, own: _Stored | None) -> None:
    if own is None:
        return
    name, label = snapshot.optimizer, f"{parameter.label}, {table.path},"
    if own.optimizer != name:
        raise ValueError(
            f"{label} was updated by the optimizer {own.optimizer!r}: expected {name!r}; make an "
            f"{own.optimizer}"
        )
    if own.key != parameter.key:
        raise ValueError(
            f"{label} was the parameter {own.key!r} of its optimizer, here it is "
            f"{parameter.key!r}: pass {_as_before(own)}"
        )
    slots = list(parameter.slots())
    if own.slots != slots:
        raise ValueError(
            f"{label} has the state {', '.join(own.slots) or 'none'}, the options need "
            f"{', '.join(slots) or 'none'}: expected the options it was updated with"
        )


def _as_before(own: _Stored) -> str:
    """How parameters are passed so that one has the key it had."""
    if isinstance(own.key, str):
        return f"it by that name, as {{{own.key!r}: table}}"
    if own.key:
        return f"the {own.key} parameters before it first, as then"
    return "it first, as [table]"
