"""The caller's arrays as views of the same memory, checked: NumPy's, or those of a device."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ml_dtypes
import numpy as np

from fastopt._core.backend import backend_of, device_array, device_name, host, moved
from fastopt._core.versions import written
from fastopt.kernels.loaded import is_jax_array, is_tensor, loaded
from fastopt.kernels.work import Array, Segments

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


class Sparse:
    """A gradient that names the rows it belongs to (see ``fastopt.gradients``)."""


def is_sparse_tensor(value: Any) -> bool:
    """Whether it is a tensor of torch that holds whole rows, each with its index (``sparse_coo``)."""
    return (
        is_tensor(value)
        and value.layout == loaded("torch").sparse_coo
        and value.sparse_dim() == value.dense_dim() == 1
    )


class Remedy:
    """What to do about an array that does not fit, as messages say it: for one that is only read, whose copy
    serves as well."""

    def changed(self, value: Any, label: str, numpy: str, torch: str) -> str:
        """To pass a changed copy, which these expressions make of an ``{}`` of NumPy or of torch."""
        return f"pass {_expression(value, numpy, torch).format(label)}"

    def unmasked(self, label: str) -> str:
        return f"pass {label}.filled(0)"


class _OfGradient(Remedy):
    def changed(self, value: Any, label: str, numpy: str, torch: str) -> str:
        return (
            super().changed(value, label, numpy, torch) + " (zero_grads clears what is passed, a copy then)"
        )


class _OfOwn(Remedy):
    """For an array that is written: a copy would be trained in place of what the model reads."""

    def changed(self, value: Any, label: str, numpy: str, torch: str) -> str:
        if _library_of(value) != "torch":
            copy = _expression(value, numpy, torch).format("array")
            return (
                f"have the model itself use {copy} in its place before the optimizer is built, and pass that"
            )
        own = f"{label}.data"
        return f"before the optimizer is built, change the model's own: {own} = {torch.format(own)}"

    def unmasked(self, label: str) -> str:
        return f"pass {label}.data, the same memory without the mask"


class _OfClipped(Remedy):
    """For a gradient that is changed in place: the step must be given the same array."""

    def changed(self, value: Any, label: str, numpy: str, torch: str) -> str:
        return super().changed(value, label, numpy, torch) + ", and the same array to step"


READ, GRADIENT, OWN, CLIPPED = Remedy(), _OfGradient(), _OfOwn(), _OfClipped()


def _expression(value: Any, numpy: str, torch: str) -> str:
    """That of the two which suits the library that ``value`` is of; CuPy's functions have NumPy's names."""
    library = _library_of(value)
    if library == "jax":  # whose copies can't be written either
        return numpy.replace("{}.copy()", "np.array({})")
    return torch if library == "torch" else numpy.replace("np.", f"{library}.")


def _library_of(value: Any) -> str:
    """The library that an array is of: np, torch, jax or cupy."""
    if is_tensor(value):
        return "torch"
    if is_jax_array(value):
        return "jax"
    return "np" if isinstance(value, np.ndarray) else "cupy"


def array_view(value: Any, label: str, remedy: Remedy = READ) -> Array:
    """``value``, an array of NumPy, JAX or a device or a torch tensor, as an array of NumPy or of its device
    over the same memory; it can't be written where it is JAX's.

    Raises:
        TypeError: ``value`` is something else, sparse, or on a device that there is no backend for.
        RuntimeError: what it takes to use its device is missing.
    """
    if isinstance(value, np.ndarray):
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"{label} is a masked array, whose mask would be lost: {remedy.unmasked(label)}")
        return np.asarray(value)
    if is_tensor(value):
        return _torch_view(loaded("torch"), value, label, remedy)
    if isinstance(value, TableInFiles):
        return value.weights
    if is_jax_array(value) and _is_host_alone(value, label):
        return _jax_view(value, label)
    found = device_array(value, label)
    if found is not None:
        return found
    kind = article(type(value).__name__)
    raise TypeError(f"{label} is {kind}: expected a NumPy array, a torch tensor or a CUDA array")


def host_array(value: Any, label: str) -> np.ndarray:
    """The same of what has to be in the memory of the host.

    Raises:
        TypeError: as :func:`array_view`, or it is on another device.
    """
    array = array_view(value, label)
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{label} is on {device_name(array.device)}: pass {moved(value, label, -1)}")
    return array


def _torch_view(torch: Any, tensor: Any, label: str, remedy: Remedy) -> np.ndarray:
    if tensor.layout != torch.strided:
        advice = f"pass {label}.to_dense()"
        if remedy is OWN:
            advice = "have the model itself use a dense one, such as .to_dense(), and pass that"
        raise TypeError(f"{label} is a sparse tensor: {advice}")
    found = None if tensor.is_cpu else device_array(tensor, label)
    if not tensor.data_ptr() and tensor.numel():
        raise TypeError(f"{label} has no memory for its elements: expected a tensor that holds numbers")
    if found is not None:
        return found
    try:
        if tensor.dtype == torch.bfloat16:
            return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.detach().numpy()
    except TypeError as error:  # NumPy has no such dtype
        dtype = str(tensor.dtype).removeprefix("torch.")
        advice = remedy.changed(tensor, label, "", "{}.float()")
        raise TypeError(f"{label} has dtype {dtype}: expected {NAMES}; {advice}") from error
    except RuntimeError as error:
        raise TypeError(f"{label} can't be seen as a NumPy array: {error}") from error


def _is_host_alone(value: Any, label: str) -> bool:
    """Whether an array of JAX lies in the memory of the host.

    Raises:
        TypeError: it has no numbers, or lies in parts on several devices.
    """
    if isinstance(value, loaded("jax").core.Tracer):
        raise TypeError(
            f"{label} has no numbers while JAX traces a function: expected an array, pass what the function "
            "returns, outside of jax.jit and jax.grad"
        )
    on_host = all(device.platform == "cpu" for device in value.sharding.device_set)
    if not on_host and len(value.sharding.device_set) > 1:
        raise TypeError(f"{label} lies in parts on several devices: expected an array of one device")
    return on_host


def _jax_view(value: Any, label: str) -> np.ndarray:
    """An array of JAX in the memory of the host, once it is computed; one of several parts is copied."""
    try:
        return np.asarray(value)
    except (RuntimeError, TypeError) as error:  # it was deleted or donated, or holds random keys
        raise TypeError(f"{label} can't be seen as a NumPy array: {error}") from error


def numpy_views(values: list | tuple) -> list | tuple:
    """``values`` with views in the place of those arrays of JAX that lie in the memory of the host; the very
    same if there are none. Those that can't be seen as NumPy arrays stay as they are."""
    jax = loaded("jax")
    if jax is None or not any(issubclass(kind, jax.Array) for kind in set(map(type, values))):
        return values
    found = list(values)
    for position, value in enumerate(values):
        with suppress(TypeError):
            if is_jax_array(value) and _is_host_alone(value, ""):
                found[position] = _jax_view(value, "")
    return found


def in_kind(array: Array, given: Any) -> Any:
    """A new array of ours as what the caller gave is: as a tensor over the same memory for one of torch."""
    return tensor_over(array) if is_tensor(given) else array


def tensor_over(array: Array) -> Any:
    """A tensor over the memory of an array; torch is loaded."""
    torch = loaded("torch")
    if array.dtype == LOW_DTYPES[1]:  # which neither NumPy nor the CUDA array interface has a word for
        return tensor_over(array.view(np.int16)).view(torch.bfloat16)
    if isinstance(array, np.ndarray):
        return torch.from_numpy(array)
    return torch.as_tensor(array, device=device_name(array.device))


def article(name: str) -> str:
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def check_float(array: Array, label: str, value: Any, remedy: Remedy = READ) -> None:
    """Refuse dtypes other than those of parameters, in native byte order. ``array``: a view of ``value``."""
    if array.dtype not in ALL_DTYPES:
        advice = remedy.changed(value, label, "{}.astype(np.float32)", "{}.float()")
        raise TypeError(f"{label} has dtype {array.dtype}: expected {NAMES}; {advice}")


def check_contiguous(array: Array, label: str, value: Any, remedy: Remedy = READ) -> None:
    """Refuse arrays that are not C-contiguous and aligned. ``array``: a view of ``value``."""
    if not array.flags.c_contiguous:
        advice = remedy.changed(value, label, "np.ascontiguousarray({})", "{}.contiguous()")
        raise ValueError(
            f"{label} has strides {array.strides} for shape {array.shape}: expected a C-contiguous array; "
            f"{advice}"
        )
    if not array.flags.aligned:
        advice = remedy.changed(value, label, "{}.copy()", "{}.clone()")
        raise ValueError(f"{label} is not aligned to its {array.itemsize}-byte elements: {advice}")


def check_writeable(array: Array, label: str, value: Any, expected: str, remedy: Remedy) -> None:
    """Refuse arrays that can't be written. ``array``: a view of ``value``."""
    if not array.flags.writeable:
        advice = remedy.changed(value, label, "{}.copy()", "{}.clone()")
        raise ValueError(f"{label} is read-only: expected {expected}; {advice}")


def parameter_view(value: Any, label: str) -> Array:
    """``value`` as a C-contiguous, writable array of one of the dtypes of parameters."""
    if is_jax_array(value):
        raise TypeError(
            f"{label} is an array of JAX, which can't be written: expected one to update in place; keep "
            "NumPy arrays, which JAX's functions take as they are: params = jax.tree.map(np.array, params)"
        )
    array = array_view(value, label, OWN)
    check_float(array, label, value, OWN)
    check_contiguous(array, label, value, OWN)
    check_writeable(array, label, value, "an array to update in place", OWN)
    return array


def gradient_view(value: Any, label: str, parameter: Array, parameter_label: str) -> Array:
    """``value`` as a C-contiguous array of the parameter's shape and dtype, or float32 for one of 16 bits."""
    array = array_view(value, label, GRADIENT)
    check_like(array, label, value, parameter, parameter_label)
    if array.shape != parameter.shape:
        raise ValueError(
            f"{label} has shape {array.shape} but {parameter_label} has {parameter.shape}: "
            "they must be the same"
        )
    check_contiguous(array, label, value, GRADIENT)
    return array


def device_of(array: Array) -> int:
    """The number of the device that an array lies on, -1 for the host."""
    return -1 if isinstance(array, np.ndarray) else array.device


def check_beside(array: Array, label: str, value: Any, other: Array, other_label: str) -> None:
    """Refuse an array on another device than another one. ``array``: a view of ``value``."""
    own, wanted = device_of(array), device_of(other)
    if own != wanted:
        raise ValueError(
            f"{label} is on {device_name(own)} but {other_label} on {device_name(wanted)}: pass "
            f"{moved(value, label, wanted)}"
        )


def check_like(array: Array, label: str, value: Any, parameter: Array, parameter_label: str) -> None:
    """Refuse a gradient on another device than its parameter, or of another dtype, but for float32 with one
    of 16 bits. ``array``: a view of ``value``."""
    check_beside(array, label, value, parameter, parameter_label)
    if array.dtype != parameter.dtype and not (parameter.dtype in LOW_DTYPES and array.dtype == DTYPES[0]):
        module = "ml_dtypes" if parameter.dtype == LOW_DTYPES[1] else "np"
        numpy, torch = f"{{}}.astype({module}.{parameter.dtype})", f"{{}}.to(torch.{parameter.dtype})"
        raise TypeError(
            f"{label} has dtype {array.dtype} but {parameter_label} has {parameter.dtype}: "
            f"{GRADIENT.changed(value, label, numpy, torch)}"
        )


def before_writing(value: Any, segments: Segments | None) -> None:
    """Have a table in files keep rows, those of segments or all, that are about to change, and torch know of
    a tensor."""
    if isinstance(value, TableInFiles):
        value.keep(None if segments is None else host().distinct_rows(segments))
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
        "pass each array once, and a copy of the gradient where one is"
    )


def check_apart(written: Sequence[tuple[Array, str]]) -> None:
    """Refuse contiguous arrays that share memory with another."""
    starts = np.array([backend_of(array).address(array) for array, _ in written], np.int64)
    ends = starts + np.array([array.nbytes for array, _ in written], np.int64)
    found = overlapping(starts, ends, np.full(len(starts), True))
    if found is not None:
        refuse_overlap(written[found[0]][1], written[found[1]][1])
