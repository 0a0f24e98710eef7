"""The caller's arrays as NumPy views of the same memory, checked."""

import ctypes
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


class InFiles:
    """A table in files, which keeps what is about to change (see storage.py)."""

    @property
    def weights(self) -> np.ndarray:
        raise NotImplementedError

    def keep(self, rows: np.ndarray | None) -> None:
        raise NotImplementedError


def host_array(value: Any, label: str) -> np.ndarray:
    """A NumPy view of ``value``, a NumPy array or a torch CPU tensor, without a copy.

    Raises:
        TypeError: ``value`` is something else, sparse, or on another device.
    """
    if isinstance(value, np.ndarray):
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"{label} is a masked array, whose mask would be lost: pass {label}.filled(0)")
        return np.asarray(value)
    if isinstance(value, InFiles):
        return value.weights
    torch = sys.modules.get("torch")  # loaded, if a tensor is at hand
    if torch is not None and isinstance(value, torch.Tensor):
        return _torch_view(torch, value, label)
    if hasattr(value, "__cuda_array_interface__"):
        raise TypeError(
            f"{label} is a CUDA array: expected an array in the CPU's memory, copy it there first"
        )
    raise TypeError(
        f"{label} is {_article(type(value).__name__)}: expected a NumPy array or a torch CPU tensor, "
        "pass np.asarray(...)"
    )


def _torch_view(torch: Any, tensor: Any, label: str) -> np.ndarray:
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{label} is a sparse tensor: pass fastopt.IndexedSlices(t._indices()[0], t._values()) for it"
        )
    if tensor.device.type != "cpu":
        raise TypeError(f"{label} is on {tensor.device}: expected a tensor on the CPU, pass {label}.cpu()")
    try:
        return tensor.detach().numpy()
    except TypeError as error:  # NumPy has no such dtype
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(
            f"{label} has dtype {dtype}: expected float32 or float64, convert it with .float()"
        ) from error
    except RuntimeError as error:
        raise TypeError(f"{label} can't be seen as a NumPy array: {error}") from error


def _article(name: str) -> str:
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def check_float(array: np.ndarray, label: str) -> None:
    """Refuse dtypes other than native float32 and float64."""
    if array.dtype not in DTYPES:
        raise TypeError(
            f"{label} has dtype {array.dtype}: expected float32 or float64, pass {label}.astype(np.float32)"
        )


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
    """``value`` as a C-contiguous, writable float32 or float64 array."""
    array = host_array(value, label)
    check_float(array, label)
    check_contiguous(array, label)
    if not array.flags.writeable:
        raise ValueError(f"{label} is read-only: expected an array to update in place, pass a copy of it")
    return array


def gradient_view(value: Any, label: str, parameter: np.ndarray, parameter_label: str) -> np.ndarray:
    """``value`` as a C-contiguous array of the parameter's shape and dtype."""
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
    """Refuse a gradient of another dtype than its parameter's."""
    if array.dtype != parameter.dtype:
        raise TypeError(
            f"{label} has dtype {array.dtype} but {parameter_label} has {parameter.dtype}: "
            f"pass {label}.astype(np.{parameter.dtype})"
        )


def before_writing(value: Any, rows: np.ndarray) -> None:
    """Have a table in files keep rows that are about to change."""
    if isinstance(value, InFiles):
        value.keep(rows)


def address(array: np.ndarray) -> int:
    """Address of the first element."""
    try:
        # the fastest way, for arrays that allow it
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # read-only, strided or empty
        return array.__array_interface__["data"][0]


def check_apart(written: Iterable[tuple[np.ndarray, str]], read: Iterable[tuple[np.ndarray, str]]) -> None:
    """Refuse contiguous arrays to be written that share memory with another array of either list."""
    spans = [(address(a), address(a) + a.nbytes, True, label) for a, label in written if a.nbytes]
    spans += [(address(a), address(a) + a.nbytes, False, label) for a, label in read if a.nbytes]
    spans.sort(key=lambda span: span[:2])
    # furthest end so far of any span and of a written one, each with its label
    end, end_label, written_end, written_label = 0, "", 0, ""
    for start, stop, is_written, label in spans:
        other = written_label if start < written_end else end_label if is_written and start < end else None
        if other is not None:
            raise ValueError(
                f"{label} shares memory with {other}: expected arrays that do not overlap, "
                "pass each parameter once and a copy of the gradient"
            )
        if stop > end:
            end, end_label = stop, label
        if is_written and stop > written_end:
            written_end, written_label = stop, label
