"""Optimizers over tables in files: what is stored with a flush, and going on from there."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastopt.tables.table import Table

if TYPE_CHECKING:
    from fastopt.groups import Group, Parameter
    from fastopt.optimizer import Optimizer

Progress = Mapping[str, Any] | None


def _tables(optimizer: "Optimizer") -> "list[tuple[Group, Parameter, Table]]":
    return [
        (group, parameter, parameter.stored)
        for group in optimizer._groups
        for parameter in group.parameters
        if parameter.stored is not None
    ]


def progress(optimizer: "Optimizer", group: "Group", parameter: "Parameter") -> dict[str, Any]:
    """What a flush stores with a table; all that belongs to one state of the optimizer has its ``steps``."""
    return {
        "optimizer": type(optimizer).__name__,
        "key": parameter.key,
        "steps": optimizer.steps,
        "step": parameter.step,
        "slots": list(optimizer._slots(group, parameter)),
        "tables": [other.key for _, other, _ in _tables(optimizer)],
    }


def flush(optimizer: "Optimizer") -> None:
    """Bring all open tables in files to the disk, then make that what counts."""
    every = _tables(optimizer)
    stored = [one for one in every if not one[2].closed] or every  # which then says that it is closed
    for group, parameter, table in stored:
        table.prepare(progress(optimizer, group, parameter))
    for _, _, table in stored:
        table.commit()


def resume(optimizer: "Optimizer") -> None:
    """Go on where tables in files were flushed last, all at the same step of the optimizer."""
    stored = _tables(optimizer)
    back = _interrupted(stored)
    chosen: list[Progress] = [table.previous if table in back else table.progress for _, _, table in stored]
    for (group, parameter, table), own in zip(stored, chosen, strict=True):
        if table.changed and table.owner is not None:
            raise ValueError(
                f"{parameter.label}, {table.path}, was changed by another optimizer since its last flush: "
                "flush it first"
            )
        _check(optimizer, group, parameter, own)
    for table in back:
        table.roll_back()
    for (group, parameter, table), own in zip(stored, chosen, strict=True):
        table.owner = optimizer
        if own is not None:
            optimizer._steps = own["steps"]
            optimizer._clock[parameter.index] = own["step"]
            if parameter.step and own["slots"]:
                parameter.state = table.state(optimizer._slots(group, parameter))


def _interrupted(stored: "list[tuple[Group, Parameter, Table]]") -> list[Table]:
    """The tables whose last flush others have not made: a crash came between them."""
    begun = [(parameter, table) for _, parameter, table in stored if table.progress is not None]
    together = {key for _, table in begun for key in table.progress["tables"]}  # type: ignore[index]
    missed = [
        parameter for _, parameter, table in stored if table.progress is None and parameter.key in together
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


def _check(optimizer: "Optimizer", group: "Group", parameter: "Parameter", own: Progress) -> None:
    if own is None:
        return
    name = type(optimizer).__name__
    if own["optimizer"] != name:
        raise ValueError(
            f"{parameter.label} was updated by the optimizer {own['optimizer']!r}: expected {name!r}"
        )
    if own["key"] != parameter.key:
        raise ValueError(
            f"{parameter.label} was the parameter {own['key']!r} of its optimizer: "
            "expected it to be that again"
        )
    slots = list(optimizer._slots(group, parameter))
    if own["slots"] != slots:
        raise ValueError(
            f"{parameter.label} has the state {', '.join(own['slots']) or 'none'}, the options need "
            f"{', '.join(slots) or 'none'}: expected the options it was updated with"
        )
