"""Parameters and their groups: the caller's arrays, in the structures they came in, and their options."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastopt import arrays, precision
from fastopt.kernels.cpu.headers import Identities
from fastopt.kernels.rule import Rule
from fastopt.plan import Indices
from fastopt.storage import Table
from fastopt.tables import Counts, Tracking

_IMMUTABLE = int, float, str, tuple, np.generic, np.dtype


@dataclass(eq=False)
class Parameter:
    """One of the caller's arrays, and what the optimizer keeps for it.

    steps: the numbers of steps of all parameters, this one's being that at ``index``; position: the number
    of its first element among those of all parameters.
    """

    value: Any
    key: str | int
    label: str
    suffix: str
    shape: tuple[int, ...]
    dtype: np.dtype
    index: int = 0
    position: int = 0
    steps: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    state: dict[str, np.ndarray] = field(default_factory=dict)
    tracking: Tracking | None = None
    counts: Counts = field(default_factory=Counts)

    @property
    def step(self) -> int:
        """How many steps it has made."""
        return int(self.steps[self.index])

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def by_row(self) -> bool:
        """Whether blocks of its state end with the rows of a table."""
        return any(name.endswith(precision.SCALES) and a.ndim == 2 for name, a in self.state.items())

    @property
    def stored(self) -> Table | None:
        """The table in files that the parameter is, if it is one."""
        return self.value if isinstance(self.value, Table) else None

    def before_writing(self, rows: np.ndarray | None) -> None:
        """Have a table in files keep what is about to change: rows, or all."""
        if self.stored is not None:
            self.stored.keep(rows)

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def view(self) -> np.ndarray:
        """The array as it is now; a torch parameter may have moved."""
        array = arrays.parameter_view(self.value, self.label)
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(
                f"{self.label} now has shape {array.shape} and dtype {array.dtype}, at first "
                f"{self.shape} and {self.dtype}: make a new optimizer for changed parameters"
            )
        return array

    def rows_of(self, array: np.ndarray) -> np.ndarray:
        """``array``, of the parameter's shape, with one row for each index of its first axis."""
        if len(self.shape) == 2:
            return array
        return array.reshape(self.rows, array.size // max(self.rows, 1))

    def every_row(self) -> Indices:
        """Each row once, which needs no sorting."""
        return Indices.of_all(self.rows)


@dataclass(eq=False)
class Group:
    """Parameters that share options; ``options`` is the dict the caller sees."""

    options: dict[str, Any]
    params: Any
    parameters: list[Parameter]
    label: str
    rule: Rule
    checked: dict[str, Any]
    number: int
    seen: dict[str, Any] | None = None  # the options that were checked, if they can only change by assignment

    def identify(self) -> None:
        """Remember which objects its container holds."""
        self.identities = Identities([parameter.value for parameter in self.parameters])

    def take_over(self, checked: dict[str, Any]) -> None:
        """Go on with these options."""
        self.checked = checked
        fixed = all(
            name == "params" or value is None or callable(value) or isinstance(value, _IMMUTABLE)
            for name, value in self.options.items()
        )
        self.seen = dict(self.options) if fixed else None

    def as_seen(self) -> bool:
        """Whether its options are known to be those that were checked."""
        try:
            return self.seen == self.options
        except ValueError:  # an array among them, which compares element by element
            return False

    def changed(self) -> bool:
        """Whether its options may have changed."""
        try:
            return not self.as_seen() and {**self.options, "params": None} != {**self.checked, "params": None}
        except ValueError:
            return True

    @property
    def is_steady(self) -> bool:
        """Whether its options are the same in the next step unless they are assigned to."""
        return self.seen is not None and not callable(self.checked["lr"]) and self.checked["rows"] != "dense"

    def holds_the_same(self) -> bool:
        """Whether its container still holds the arrays it held at first."""
        if isinstance(self.params, list):
            return self.identities.are_those_of(self.params)
        return not isinstance(self.params, dict) or self.identities.are_those_of(list(self.params.values()))


def is_groups(params: Any) -> bool:
    return (
        isinstance(params, list | tuple)
        and len(params) > 0
        and all(isinstance(entry, dict) and "params" in entry for entry in params)
    )


def is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def as_container(params: Any, label: str) -> Any:
    """``params`` with any other iterable than a dict made a list."""
    if isinstance(params, dict) or is_array(params):
        return params
    if isinstance(params, str | bytes) or not hasattr(params, "__iter__"):
        arrays.host_array(params, label)  # raises
    return list(params)


def entries_of(params: Any, label: str) -> Iterator[tuple[str | int, Any, str]]:
    """Key, array and label of each parameter of a group."""
    if isinstance(params, dict):
        for key, value in params.items():
            if not isinstance(key, str):
                raise TypeError(f"{label} has the key {key!r}: expected names, of type str")
            yield key, value, f"{label}[{key!r}]"
    elif isinstance(params, list):
        for position, value in enumerate(params):
            yield position, value, f"{label}[{position}]"
    else:
        yield 0, params, label


def paired(group: Group, grads: Any, label: str) -> list[Any]:
    """The gradients of a group, in the order of its parameters."""
    params = group.params
    if isinstance(params, dict):
        names = [p.key for p in group.parameters]
        if not isinstance(grads, Mapping) or set(grads) != set(names):
            missing = [name for name in names if not isinstance(grads, Mapping) or name not in grads]
            raise ValueError(
                f"{label} is {describe(grads)}: expected a dict with the keys of the parameters, "
                + (
                    f"{missing[0]!r} is missing, pass None to skip it"
                    if missing
                    else f"{', '.join(map(repr, names))}"
                )
            )
        return [grads[name] for name in names]
    if isinstance(params, list):
        count = len(group.parameters)
        if not isinstance(grads, list | tuple) or len(grads) != count:
            raise ValueError(
                f"{label} is {describe(grads)}: expected a list of {count}, one entry a parameter"
            )
        return list(grads)
    if isinstance(grads, list | tuple | dict):
        raise ValueError(f"{label} is {describe(grads)}: expected one array, as params is one")
    return [grads]


def describe(grads: Any) -> str:
    if isinstance(grads, Mapping):
        return f"a dict with the keys {', '.join(map(repr, grads)) or '(none)'}"
    if isinstance(grads, list | tuple):
        return f"a {type(grads).__name__} of {len(grads)}"
    return f"of type {type(grads).__name__}"
