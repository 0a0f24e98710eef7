"""Optimizers over tables in files: what is stored with a flush, and going on from there."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastopt._core.parameters import Parameter, Snapshot
from fastopt.tables.table import Table

Progress = Mapping[str, Any] | None


class Resumed(NamedTuple):
    """Where tables in files go on: after ``steps`` of the optimizer, None if it is new, with these steps of
    each of their parameters."""

    steps: int | None
    steps_of: list[tuple[Parameter, int]]


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
    for _, table in stored:
        table.commit()


def resume(snapshot: Snapshot, owner: Any) -> Resumed:
    """Go on where tables in files were flushed last, all at the same step of the optimizer ``owner``."""
    stored = _tables(snapshot)
    back = _interrupted(stored)
    chosen: list[Progress] = [table.previous if table in back else table.progress for _, table in stored]
    for (parameter, table), own in zip(stored, chosen, strict=True):
        if table.changed and table.owner is not None:
            raise ValueError(
                f"{parameter.label}, {table.path}, was changed by another optimizer since its last flush: "
                "flush it first"
            )
        _check(snapshot, parameter, own)
    for table in back:
        table.roll_back()
    steps, steps_of = None, []
    for (parameter, table), own in zip(stored, chosen, strict=True):
        table.owner = owner
        if own is not None:
            steps = own["steps"]
            steps_of.append((parameter, own["step"]))
            if own["step"] and own["slots"]:
                parameter.state = table.state(parameter.slots())
    return Resumed(steps, steps_of)


def _interrupted(stored: list[tuple[Parameter, Table]]) -> list[Table]:
    """The tables whose last flush others have not made: a crash came between them."""
    begun = [(parameter, table) for parameter, table in stored if table.progress is not None]
    together = {key for _, table in begun for key in table.progress["tables"]}  # type: ignore[index]
    missed = [
        parameter for parameter, table in stored if table.progress is None and parameter.key in together
    ]
    steps = [table.progress["steps"] for _, table in begun]  # type: ignore[index]
    goal = None if missed else min(steps, default=None)
    back = [table for (_, table), own in zip(begun, steps, strict=True) if own != goal]
    for (parameter, table), last in zip(begun, steps, strict=True):
        before = None if table.previous is None else table.previous["steps"]
        if table in back and not (table.has_previous and before == goal):
            raise ValueError(
                f"{parameter.label}, {table.path}, was flushed at step {last} "
                f"of its optimizer but another table at {'none' if goal is None else goal}: expected tables "
                "that were flushed together"
            )
    return back


def _check(snapshot: Snapshot, parameter: Parameter, own: Progress) -> None:
    if own is None:
        return
    name = snapshot.optimizer
    if own["optimizer"] != name:
        raise ValueError(
            f"{parameter.label} was updated by the optimizer {own['optimizer']!r}: expected {name!r}"
        )
    if own["key"] != parameter.key:
        raise ValueError(
            f"{parameter.label} was the parameter {own['key']!r} of its optimizer: "
            "expected it to be that again"
        )
    slots = list(parameter.slots())
    if own["slots"] != slots:
        raise ValueError(
            f"{parameter.label} has the state {', '.join(own['slots']) or 'none'}, the options need "
            f"{', '.join(slots) or 'none'}: expected the options it was updated with"
        )
