"""What meta.json holds, and checks of what goes into it and of what is read."""

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastopt._core import arrays
from fastopt.kernels.formats import STATE_DTYPES
from fastopt.tables.files import read_file, write_file

FORMAT = 2  # with a log from each flush on, of checked length, and checksums
FIRST_FORMAT = 1  # whose log is begun with the first row that is kept
MOST = 2**62  # bytes of a file, and of every number in meta.json
_MOST_AXES = 32


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
    """A table as at one of its flushes, ``generation`` the number of that.

    format: of meta.json and the undo log. sums: the CRC of the file of checksums, None if there is none.
    """

    rows: int
    dim: int
    dtype: np.dtype
    slots: dict[str, Slot]
    generation: int
    progress: dict[str, Any] | None
    sums: int | None = None
    format: int = FORMAT

    @property
    def weights(self) -> Slot:
        return Slot((self.rows, self.dim), self.dtype)

    @property
    def logged(self) -> bool:
        """Whether there is a log though no row was kept."""
        return self.format > FIRST_FORMAT

    def write(self, path: Path) -> None:
        slots = {name: {"shape": slot.shape, "dtype": _text(slot.dtype)} for name, slot in self.slots.items()}
        stored = {**self._asdict(), "dtype": self.dtype.str, "slots": slots}
        write_file(path, json.dumps({**stored, "crc32": _crc(stored)}).encode())

    @classmethod
    def read(cls, path: Path) -> "Meta":
        """Raises:
        ValueError: it is not as :meth:`write` wrote it; names the file and the field.
        OSError: it can't be read.
        """
        try:
            return cls._checked(json.loads(read_file(path).decode(), object_pairs_hook=_once))
        except RecursionError as error:
            raise ValueError(f"{path} is not as open_table wrote it: it nests too deep") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not as open_table wrote it: {error}") from error

    @classmethod
    def _checked(cls, stored: Any) -> "Meta":
        field = Fields(stored)
        version = field.whole("format", FIRST_FORMAT)
        if version > FORMAT:
            raise ValueError(f"it has format {version}, expected {FORMAT} at most: a later version wrote it")
        rows, dim = field.whole("rows", 1), field.whole("dim", 1)
        dtype = _of_text(field.get("dtype"), "dtype", arrays.DTYPES)
        slots = field.get("slots")
        if not isinstance(slots, dict):
            raise ValueError(f"slots is {_short(slots)}, expected an object")
        checked = {name: _stored_slot(name, slot, rows) for name, slot in slots.items()}
        progress = field.get("progress")
        if progress is not None and not isinstance(progress, dict):
            raise ValueError(f"progress is {_short(progress)}, expected an object or null")
        sums = None
        if version > FIRST_FORMAT and field.get("sums") is not None:
            sums = field.whole("sums", 0)
        found = cls(rows, dim, dtype, checked, field.whole("generation", 0), progress, sums, version)
        _check_bytes(found.weights, "rows and dim")
        if version > FIRST_FORMAT:
            got = field.whole("crc32", 0)
            expected = _crc({name: value for name, value in stored.items() if name != "crc32"})
            if got != expected:
                raise ValueError(f"crc32 is {got}, the rest has {expected}: it was changed since")
        return found

    def check_former(self, former: "Meta", path: Path) -> None:
        """Refuse the meta file of the flush before where it does not belong to this one."""
        for name in ("rows", "dim", "dtype"):
            if getattr(former, name) != getattr(self, name):
                raise ValueError(
                    f"{path} has {name} {getattr(former, name)}: expected {getattr(self, name)}, as meta.json"
                )
        if former.generation != self.generation - 1:
            raise ValueError(
                f"{path} has generation {former.generation}: expected {self.generation - 1}, as its name says"
            )
        if former.slots not in ({}, self.slots):
            raise ValueError(
                f"{path} has slots {listed(former.slots)}: expected {listed(self.slots)}, as meta.json"
            )


class Fields:
    """An object read from JSON, whose values are checked as they are asked for."""

    def __init__(self, stored: Any) -> None:
        if not isinstance(stored, dict):
            raise ValueError(f"it holds {_short(stored)}, expected an object")
        self._stored = stored

    def get(self, name: str) -> Any:
        if name not in self._stored:
            raise ValueError(f"{name} is missing")
        return self._stored[name]

    def whole(self, name: str, least: int, most: int = MOST) -> int:
        return _whole(self.get(name), name, least, most)

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise ValueError(f"{name} is {_short(value)}, expected a string")
        return value

    def key(self, name: str) -> str | int:
        return _key(self.get(name), name)

    def keys(self, name: str) -> list[str | int]:
        value = self.get(name)
        if not isinstance(value, list):
            raise ValueError(f"{name} is {_short(value)}, expected a list")
        return [_key(one, name) for one in value]


def _crc(stored: Mapping[str, Any]) -> int:
    """Of all that is stored beside it."""
    return zlib.crc32(json.dumps(stored).encode())


def _key(value: Any, name: str) -> str | int:
    return value if isinstance(value, str) else _whole(value, name, 0, MOST)


def _whole(value: Any, name: str, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} is {_short(value)}, expected a whole number from {least} to {most}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which a name that comes twice would hide a value."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return found


def _stored_slot(name: str, stored: Any, rows: int) -> Slot:
    label = f"slots[{_short(name)}]"
    if not name.isidentifier():
        raise ValueError(f"{label} has a name that is no identifier")
    if not isinstance(stored, dict) or set(stored) != {"shape", "dtype"}:
        raise ValueError(f"{label} is {_short(stored)}, expected an object of shape and dtype")
    shape = stored["shape"]
    if not isinstance(shape, list) or not 1 <= len(shape) <= _MOST_AXES:
        raise ValueError(f"{label} has shape {_short(shape)}, expected a list of sizes")
    sizes = tuple(_whole(size, f"shape of {label}", 1, MOST) for size in shape)
    if sizes[0] != rows:
        raise ValueError(f"{label} has shape {_short(shape)}, expected {rows} rows")
    slot = Slot(sizes, _of_text(stored["dtype"], f"dtype of {label}", arrays.DTYPES + _state_dtypes()))
    _check_bytes(slot, label)
    return slot


def _check_bytes(slot: Slot, label: str) -> None:
    if slot.nbytes > MOST:
        raise ValueError(f"{label} is {slot}: expected a size that a file can have")


def _of_text(value: Any, label: str, known: tuple[np.dtype, ...]) -> np.dtype:
    for dtype in known:
        if value == _text(dtype):
            return dtype
    raise ValueError(f"{label} is {_short(value)}, expected {' or '.join(map(_text, dict.fromkeys(known)))}")


def _short(value: Any) -> str:
    """A value in an error, where it may be long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def checked_progress(progress: Any) -> dict[str, Any]:
    """What a caller has a flush store, as it will be read."""
    if not isinstance(progress, Mapping):
        raise TypeError(f"progress is of type {type(progress).__name__}: expected a dict")
    try:
        return json.loads(json.dumps(dict(progress)))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"progress holds what JSON can't: {error}") from error


def checked_sizes(rows: int, dim: int, dtype: np.dtype) -> Slot:
    """The weights of a new table."""
    weights = Slot((rows, dim), dtype)
    _check_bytes(weights, "rows and dim")
    return weights


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
    if len(shape) > _MOST_AXES:
        raise ValueError(f"{label} has {len(shape)} axes: expected {_MOST_AXES} at most")
    slot = Slot(tuple(map(int, shape)), checked_dtype(dtype, label, _state_dtypes()))
    _check_bytes(slot, label)
    return slot


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
