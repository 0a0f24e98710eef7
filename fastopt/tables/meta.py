"""What meta.json holds, and checks of what goes into it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastopt._core import arrays
from fastopt._core.files import sync
from fastopt.kernels.formats import STATE_DTYPES

FORMAT = 1


def _state_dtypes() -> tuple[np.dtype, ...]:
    """The dtypes that state arrays may have beside those of tables: of counters and of storage formats."""
    stored = (kind.dtype for own in STATE_DTYPES.values() for kind in (own.signed, own.not_negative))
    return np.dtype(np.int64), *(dtype for dtype in stored if dtype is not None)


class Slot(NamedTuple):
    """Shape and dtype of the weights or of a state array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"


class Meta(NamedTuple):
    """A table as at one of its flushes, ``generation`` the number of that."""

    rows: int
    dim: int
    dtype: np.dtype
    slots: dict[str, Slot]
    generation: int
    progress: dict[str, Any] | None

    @property
    def weights(self) -> Slot:
        return Slot((self.rows, self.dim), self.dtype)

    def write(self, path: Path) -> None:
        slots = {name: {"shape": slot.shape, "dtype": _text(slot.dtype)} for name, slot in self.slots.items()}
        stored = {"format": FORMAT, **self._asdict(), "dtype": self.dtype.str, "slots": slots}
        path.write_text(json.dumps(stored), encoding="utf-8")
        sync(path)

    @classmethod
    def read(cls, path: Path) -> "Meta":
        text = path.read_text(encoding="utf-8")
        try:
            stored = json.loads(text)
            if stored["format"] != FORMAT:
                raise ValueError(f"it has format {stored['format']}, expected {FORMAT}")
            slots = {
                name: Slot(
                    tuple(slot["shape"]), checked_dtype(slot["dtype"], f"the state {name!r}", _state_dtypes())
                )
                for name, slot in stored["slots"].items()
            }
            dtype = checked_dtype(stored["dtype"], "it")
            return cls(stored["rows"], stored["dim"], dtype, slots, stored["generation"], stored["progress"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not as open_table wrote it: {error!r}") from error


def checked_slot(name: Any, entry: Any, rows: int) -> Slot:
    """A state array as a caller asks for it: its shape, dtype and first value."""
    label = f"slots[{name!r}]"
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"slots has the name {name!r}: expected an identifier")
    if not isinstance(entry, tuple) or len(entry) != 3:
        raise TypeError(f"{label} is {entry!r}: expected a tuple of shape, dtype and first value")
    shape, dtype, first = entry
    if not isinstance(shape, tuple) or not shape or shape[0] != rows:
        raise ValueError(f"{label} has shape {shape!r}: expected {rows} rows")
    for size in shape:
        check_size(size, f"a size of {label}")
    if not isinstance(first, int | float | np.integer | np.floating):
        raise TypeError(f"{label} has the first value {first!r}: expected a number")
    return Slot(tuple(map(int, shape)), checked_dtype(dtype, label, _state_dtypes()))


def check_size(value: Any, label: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{label} is {value!r}: expected a whole number, at least 1")


def checked_dtype(value: Any, label: str, others: tuple[np.dtype, ...] = ()) -> np.dtype:
    """One of the dtypes of tables, or of ``others``."""
    try:
        dtype = np.dtype(value)
    except TypeError as error:
        raise TypeError(f"{label} has dtype {value!r}: expected float32 or float64") from error
    if dtype not in arrays.DTYPES + others:
        raise TypeError(f"{label} has dtype {dtype}: expected float32 or float64")
    return dtype


def _text(dtype: np.dtype) -> str:
    """A dtype in words that NumPy knows; the letters of bfloat16 it does not."""
    return dtype.name if dtype in arrays.LOW_DTYPES else dtype.str


def listed(slots: Mapping[str, Slot]) -> str:
    """The slots in words, for an error."""
    return ", ".join(f"{name} {slot}" for name, slot in slots.items()) or "none"
