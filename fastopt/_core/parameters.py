"""The caller's arrays in their groups, and what an optimizer keeps for each."""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fastopt._core import arrays
from fastopt._core.arrays import TableInFiles
from fastopt._core.backend import Backend, backend_at, backend_of, device_name
from fastopt._core.groups import Definition, ParameterGroup, checked_group
from fastopt._core.missed import ROW_STEPS, Tracking
from fastopt._core.state import (
    MASTER,
    SCALES,
    Slot,
    by_rows,
    computed_with,
    new_state,
    parameter_format,
    random_key,
    state_slots,
)
from fastopt._core.state import state_formats as chosen_formats
from fastopt._core.structure import Structure, as_container, is_groups, named_values
from fastopt.kernels import formats
from fastopt.kernels.work import Array, Segments, StoredState, StoredTable


@dataclass(eq=False)
class Parameter:
    """One of the caller's arrays, and what the optimizer keeps for it.

    Attributes:
        value: the caller's array, tensor or table in files.
        key: its name, the path to it in a tree, or its position among all.
        device: the number of the device that it lies on, -1 for the host.
        index: its position among all. first: the number of its first element among those of all.
        clock: the numbers of steps of all parameters, this one's being that at ``index``.
        state: its state arrays by name, empty before its first gradient.
        tracking: for ``rows="dense"``, how far its rows are, None while all are up to date.
        described: the state that was last used by rows, with where it lies; None before.
    """

    value: Any
    key: str | int
    label: str
    shape: tuple[int, ...]
    dtype: np.dtype
    device: int
    group: ParameterGroup
    index: int = 0
    first: int = 0
    clock: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    state: dict[str, Array] = field(default_factory=dict)
    tracking: Tracking | None = None
    described: tuple[Mapping[str, Array], StoredState] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "described": None}

    @property
    def step(self) -> int:
        """How many steps it has made."""
        return int(self.clock[self.index])

    @step.setter
    def step(self, step: int) -> None:
        self.clock[self.index] = step

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def backend(self) -> Backend:
        """What works where it lies."""
        return backend_at(self.device)

    @property
    def compute(self) -> np.dtype:
        """The dtype that its updates are computed with."""
        return computed_with(self.dtype)

    @property
    def codes_by_row(self) -> bool:
        """Whether the blocks of its 8-bit codes end with the rows of a table."""
        return any(name.endswith(SCALES) and a.ndim == 2 for name, a in self.state.items())

    @property
    def in_files(self) -> TableInFiles | None:
        """The table in files that the parameter is, if it is one."""
        return self.value if isinstance(self.value, TableInFiles) else None

    def before_writing(self, segments: Segments | None) -> None:
        """Tell of what is about to change, the rows of segments or all."""
        arrays.before_writing(self.value, segments)

    def view(self) -> Array:
        """The array as it is now; a torch parameter may have moved."""
        array = arrays.parameter_view(self.value, self.label)
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(
                f"{self.label} now has shape {array.shape} and dtype {array.dtype}, at first "
                f"{self.shape} and {self.dtype}: make a new optimizer for changed parameters"
            )
        if arrays.device_of(array) != self.device:
            raise ValueError(
                f"{self.label} now lies on {device_name(arrays.device_of(array))}, at first on "
                f"{device_name(self.device)}: make a new optimizer for parameters that were moved"
            )
        return array

    def rows_of(self, array: Array) -> Array:
        """``array``, of the parameter's shape, with one row for each index of its first axis."""
        if len(self.shape) == 2:
            return array
        return array.reshape(self.rows, array.size // max(self.rows, 1))

    def takes_rows(self, checked: Mapping[str, Any]) -> bool:
        """Whether a dense gradient is used row by row, under these options of its group."""
        if self.group.rule.row_slots or checked["clip_row_norm"] is not None:
            return True
        if self.in_files is not None and checked["state_dtype"] == "8bit":
            return True
        return len(self.shape) == 2 and (checked["step_per_row"] or self.codes_by_row)

    # State

    def slots(self, by_row: bool = False) -> dict[str, Slot]:
        """The state arrays that it is to have; ``by_row``: blocks of 8-bit codes end with its rows, as they
        do with those of a table in files."""
        by_row = by_row or self.in_files is not None
        group = self.group
        slots = state_slots(group.rule, self.shape, self.dtype, group.checked, group.first, by_row)
        if group.checked["step_per_row"] and len(self.shape) == 2:
            slots[ROW_STEPS] = Slot((self.rows,), np.dtype(np.int64))
        return slots

    def ready_state(self, by_row: bool) -> dict[str, Array]:
        """Its state as a step needs it, new at its first gradient.

        ``by_row``: whether the gradient is used row by row; if not, all arrays are C-contiguous.
        """
        rule = self.group.rule
        slots = {} if self.state else self.slots(by_row)
        if slots and self.in_files is not None:
            return self.in_files.state(slots)
        if slots:
            together = rule.state_slots if by_row and len(self.shape) == 2 else ()
            new = new_state(slots, self.backend, together, None if by_row else self.beside)
            if MASTER in slots:
                new[MASTER][...] = self.view()
            return new
        if not by_row:  # rows of several arrays may lie together
            apart = all(array.flags.c_contiguous for array in self.state.values())
            contiguous = self.backend.contiguous
            return self.state if apart else {k: contiguous(v) for k, v in self.state.items()}
        if self.described is not None and self.described[0] is self.state:
            return self.state
        if self.codes_by_row or not any(kind.coded for kind in self.state_formats):
            return self.state
        own = dict(self.state)
        for slot, kind in zip(rule.state_slots, self.state_formats, strict=True):
            if kind.coded:
                scales = slot + SCALES
                own[slot], own[scales] = by_rows(kind, own[slot], own[scales])
        return own

    @property
    def beside(self) -> Array | None:
        """The array that state of its shape is placed beside: itself, or None if state lies in files or is of
        codes, which are gone through in blocks."""
        if self.in_files is not None or any(kind.coded for kind in self.state_formats):
            return None
        return self.view()

    @property
    def state_formats(self) -> tuple[formats.Format, ...]:
        """Of each of the rule's state arrays that are shaped as the parameter."""
        return chosen_formats(self.group.rule, self.dtype, self.group.checked)

    @property
    def rounds_at_random(self) -> bool:
        """Whether storing its state takes random bits."""
        return any(kind.random for kind in self.state_formats)

    @property
    def own_format(self) -> formats.Format:
        return parameter_format(self.dtype, self.group.checked)

    def stored_table(self, table: Array, own: Mapping[str, Array], step: int) -> StoredTable:
        """``table``, the parameter, and ``own``, its state, by rows; ``step``: of the random bits."""
        if self.described is None or self.described[0] is not own:
            rule = self.group.rule
            slots = tuple((self.rows_of(own[slot]), own.get(slot + SCALES)) for slot in rule.state_slots)
            of_rows = tuple(own[slot] for slot in rule.row_slots)
            self.described = own, StoredState(slots, of_rows, own.get(MASTER))
        return StoredTable(self.rows_of(table), self.described[1], self.first, self.random_key(step))

    def random_key(self, step: int) -> int:
        """The key of the random bits of a step, 0 if there are none."""
        return random_key(self.group.checked["seed"], step) if self.rounds_at_random else 0


class Snapshot(NamedTuple):
    """An optimizer as files and tables see it: nothing is copied.

    optimizer: the name of its class. steps: how many it has finished.
    """

    optimizer: str
    steps: int
    groups: list[ParameterGroup]
    parameters: list[Parameter]


class Parameters:
    """All parameters of an optimizer in their groups.

    Args:
        params: what the caller gave: one container of arrays, or a list of groups.
        definition: of the optimizer.

    Attributes:
        groups; all: every parameter, in order.
        clock: int64, how many steps each parameter has finished, and last the optimizer.
        sizes, nbytes: int64, of each.
        devices: the numbers of those that parameters lie on, but for the host.
        in_files: those that are tables in files. dense_rows: whether rows of some may be behind. all_plain:
            whether there is neither.
        options: the caller's dicts of options, one for each group.
    """

    def __init__(self, params: Any, definition: Definition) -> None:
        self.groups: list[ParameterGroup] = []
        self.all: list[Parameter] = []
        params = as_container(params, "params")
        self.grouped = is_groups(params)
        if self.grouped:
            for number, group in enumerate(params):
                self._add(group, f"params[{number}]", f"params[{number}]['params']", definition)
        else:
            self._add({"params": params}, "params", "params", definition)
        if not self.all:
            raise ValueError("params holds no arrays: expected at least one to update")
        self.sizes = np.array([parameter.size for parameter in self.all])
        self.nbytes = self.sizes * [parameter.dtype.itemsize for parameter in self.all]
        self.clock = np.zeros(len(self.all) + 1, np.int64)
        for i, (parameter, last) in enumerate(zip(self.all, np.cumsum(self.sizes).tolist(), strict=True)):
            parameter.index, parameter.first, parameter.clock = i, last - parameter.size, self.clock
        self.devices = sorted({parameter.device for parameter in self.all} - {-1})
        self.in_files = [parameter for parameter in self.all if parameter.in_files is not None]
        self.dense_rows = any(group.checked["rows"] == "dense" for group in self.groups)
        self.all_plain = not self.dense_rows and not self.in_files
        self.options = [group.options for group in self.groups]
        arrays.check_apart([(parameter.view(), parameter.label) for parameter in self.all])

    def _add(self, given: dict[str, Any], label: str, params_label: str, definition: Definition) -> None:
        options = {**definition.defaults, **given}
        params = options["params"] = as_container(given["params"], params_label)
        group = ParameterGroup(options, params, label, len(self.groups))
        taken, parameters = {parameter.key for parameter in self.all}, []
        for key, value, suffix in named_values(params, params_label):
            own_label = params_label + suffix
            view = arrays.parameter_view(value, own_label)
            if not isinstance(key, str):
                key += len(taken)
            elif key in taken:
                raise ValueError(
                    f"{params_label} has the name {key!r} of an earlier group: expected each name once, put "
                    "them under other keys"
                )
            dtype = np.dtype(view.dtype.type)  # the one object that stands for it
            group.keys.append(key)
            device = arrays.device_of(view)
            parameters.append(Parameter(value, key, own_label, view.shape, dtype, device, group))
        checked = checked_group(options, group.label, definition)
        definition.check_options(checked, group.label)
        group.adopt(checked, definition)
        self.groups.append(group)
        self.all += parameters

    @property
    def steps(self) -> int:
        return int(self.clock[-1])

    @property
    def capturing(self) -> bool:
        """Whether work of some device is being put into a graph in place of being done."""
        return any(backend_at(device).capturing for device in self.devices)

    def of_group(self, group: ParameterGroup) -> list[Parameter]:
        return [parameter for parameter in self.all if parameter.group is group]

    def structure(self) -> Structure:
        """In which gradients come."""
        return Structure(
            [group.params for group in self.groups],
            [group.keys for group in self.groups],
            [[parameter.value for parameter in self.of_group(group)] for group in self.groups],
            self.grouped,
        )

    def check_unchanged(self, param_groups: Any, owner: Any) -> None:
        """Refuse changes of the list ``param_groups`` that can't be followed, and tables in files that
        another optimizer than ``owner`` has taken over."""
        if not isinstance(param_groups, list):
            raise TypeError(f"param_groups is {param_groups!r}: expected the list it was at first")
        own = self.options
        if len(param_groups) != len(own) or not all(map(operator.is_, param_groups, own)):
            raise ValueError("param_groups holds other dicts than at first: change the options in those")
        for parameter in self.in_files:
            if parameter.value.owner not in (owner, None):
                raise ValueError(
                    f"{parameter.label} now belongs to another optimizer: expected the last one made"
                )

    def of(self, table: Any) -> Parameter:
        """The parameter that is ``table``, or lies in the very same memory.

        Raises:
            ValueError: there is none.
        """
        for parameter in self.all:
            if parameter.value is table:
                return parameter
        here = _place(arrays.array_view(table, "table"))
        for parameter in self.all:
            if _place(parameter.view()) == here:
                return parameter
        raise ValueError("table is not a parameter of optimizer: expected the whole of one that it updates")


def _place(array: Array) -> tuple:
    """Where an array lies, and what it is."""
    return backend_of(array).address(array), array.shape, array.dtype
