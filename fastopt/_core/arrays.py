"""The caller's arrays as NumPy views of the same memory, checked."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fastopt._core.backend import backend_of
from fastopt._core.versions import written

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
LOW_DTYPES = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
ALL_DTYPES = DTYPES + LOW_DTYPES
NAMES = "float32, float64, float16 or bfloat16"


class TableInFiles(ABC):
    """A parameter that lies in files, with its state, and remembers what rows were before they change."""

    path: Any
    owner: Any  # what flushes it with the others of its optimizer, or None

    @property
    @abstractmethod
    def weights(self) -> np.ndarray:
        """[rows, dim], in the files."""

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether its files are released."""

    @abstractmethod
    def keep(self, rows: np.ndarray | None) -> None:
        """Log what rows, or all, hold before they are changed."""

    @abstractmethod
    def state(self, slots: Any) -> dict[str, np.ndarray]:
        """State arrays in files, made if there are none."""


def host_array(value: Any, label: str) -> np.ndarray:
    """A NumPy view of ``value``, a NumPy array or a torch CPU tensor, without a copy.

    Raises:
        TypeError: ``value`` is something else, sparse, or on another device.
    """
    if isinstance(value, np.ndarray):
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"{label} is a masked array, whose mask would be lost: pass {label}.filled(0)")
        return np.asarray(value)
    if isinstance(value, TableInFiles):
        return value.weights
    torch = sys.modules.get("torch")  # loaded, if a tensor is at hand
    if torch is not None and isinstance(value, torch.Tensor):
        return _torch_view(torch, value, label)
    backend_of(value, label)  # which refuses arrays of devices that there is no backend for
    raise TypeError(
        f"{label} is {article(type(value).__name__)}: expected a NumPy array or a torch CPU tensor, "
        "pass np.asarray(...)"
    )


def _torch_view(torch: Any, tensor: Any, label: str) -> np.ndarray:
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{label} is a sparse tensor: pass fastopt.IndexedSlices(t._indices()[0], t._values()) for it"
        )
    backend_of(tensor, label)
    try:
        if tensor.dtype == torch.bfloat16:
            return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.detach().numpy()
    except TypeError as error:  # NumPy has no such dtype
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{label} has dtype {dtype}: expected {NAMES}, convert it with .float()") from error
    except RuntimeError as error:
        raise TypeError(f"{label} can't be seen as a NumPy array: {error}") from error


def article(name: str) -> str:
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def check_float(array: np.ndarray, label: str) -> None:
    """Refuse dtypes other than those of parameters, in native byte order."""
    if array.dtype not in ALL_DTYPES:
        raise TypeError(f"{label} has dtype {array.dtype}: expected {NAMES}, pass {label}.astype(np.float32)")


def check_contiguous(array: np.ndarray, label: str) -> None:
    """Refuse arrays that are not C-contiguous and aligned."""
    if not array.flags.c_contiguous:
        raise ValueError(
            f"{label} has strides {array.strides} for shape {array.shape}: expected a C-contiguous array, "
            f"pass np.ascontiguousarray({label})"
        )
    if not array.flags.aligned:
        raise ValueError(f"{label} is not aligned to its {array.itemsize}-byte elements: pass a copy of it")


def parameter_view(value: Any, label: str) -> np.ndarray:
    """``value`` as a C-contiguous, writable array of one of the dtypes of parameters."""
    array = host_array(value, label)
    check_float(array, label)
    check_contiguous(array, label)
    if not array.flags.writeable:
        raise ValueError(f"{label} is read-only: expected an array to update in place, pass a copy of it")
    return array


def gradient_view(value: Any, label: str, parameter: np.ndarray, parameter_label: str) -> np.ndarray:
    """``value`` as a C-contiguous array of the parameter's shape and dtype, or float32 for one of 16 bits."""
    array = host_array(value, label)
    check_like(array, label, parameter, parameter_label)
    if array.shape != parameter.shape:
        raise ValueError(
            f"{label} has shape {array.shape} but {parameter_label} has {parameter.shape}: "
            "they must be the same"
        )
    check_contiguous(array, label)
    return array


def check_like(array: np.ndarray, label: str, parameter: np.ndarray, parameter_label: str) -> None:
    """Refuse a gradient of another dtype than its parameter's, but for float32 with one of 16 bits."""
    if array.dtype != parameter.dtype and not (parameter.dtype in LOW_DTYPES and array.dtype == DTYPES[0]):
        module = "ml_dtypes" if parameter.dtype == LOW_DTYPES[1] else "np"
        raise TypeError(
            f"{label} has dtype {array.dtype} but {parameter_label} has {parameter.dtype}: "
            f"pass {label}.astype({module}.{parameter.dtype})"
        )


def before_writing(value: Any, rows: np.ndarray) -> None:
    """Have a table in files keep rows that are about to change, and torch know of a tensor's change."""
    if isinstance(value, TableInFiles):
        value.keep(rows)
    written([value])


def overlapping(starts: np.ndarray, ends: np.ndarray, written: np.ndarray) -> tuple[int, int] | None:
    """Two of the spans that overlap, one of them written, the later one first; None if there are none."""
    order = np.argsort(starts, kind="stable")
    order = order[ends[order] > starts[order]]
    starts, ends, written = starts[order], ends[order], written[order]
    furthest = np.maximum.accumulate(ends)
    furthest_written = np.maximum.accumulate(np.where(written, ends, 0))
    met = (starts[1:] < furthest_written[:-1]) | (written[1:] & (starts[1:] < furthest[:-1]))
    if not met.any():
        return None
    later = int(np.argmax(met)) + 1
    others = (ends[:later] > starts[later]) & (written[later] | written[:later])
    return int(order[later]), int(order[int(np.argmax(others))])


def refuse_overlap(label: str, other: str) -> None:
    """Raise for two arrays that share memory."""
    raise ValueError(
        f"{label} shares memory with {other}: expected arrays that do not overlap, "
        "pass each parameter once and a copy of the gradient"
    )


def check_apart(written: Sequence[tuple[np.ndarray, str]]) -> None:
    """Refuse contiguous arrays that share memory with another."""
    starts = np.array([backend_of(array).address(array) for array, _ in written], np.int64)
    ends = starts + np.array([array.nbytes for array, _ in written], np.int64)
    found = overlapping(starts, ends, np.full(len(starts), True))
    if found is not None:
        refuse_overlap(written[found[0]][1], written[found[1]][1])
