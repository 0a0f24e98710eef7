"""What many NumPy arrays are, read from their headers in memory: a look at each from Python costs a
hundred times as much, for a thousand small arrays more than their update.

The layouts of lists, tuples and arrays in memory are those of CPython and of NumPy's C API ("PyArrayObject"
in its reference); :func:`readable` compares what is read with what Python says of some arrays, once a
process, and where they disagree nothing is read. The global interpreter lock is held while it is, as is
needed for lists.
"""

import functools
import platform
import sys
from collections.abc import Sequence

import numba
import numpy as np

from fastopt.kernels.cpu.memory import view
from fastopt.kernels.jit import Direct

WORD = 8
OBJECT = object.__basicsize__ // WORD  # words before what a type adds
TYPE = OBJECT - 1
ITEMS = OBJECT + 1  # of a list: the address of its items; of a tuple: the items themselves
DATA, NDIM, SHAPE, DTYPE, FLAGS = (OBJECT + k for k in (0, 1, 2, 5, 6))
C_CONTIGUOUS, ALIGNED, WRITEABLE = 0x1, 0x100, 0x400

UNKNOWN = np.int64(-1)  # in place of the address of what is no array as expected


@Direct
def _read(items, is_list, array_type, expected, extents, addresses):
    """See :class:`Headers`; expected: [array, (dtype, dimensions, the first of its extents, flags)]."""
    count = addresses.size
    if is_list:
        items = view(items + ITEMS * WORD, 1, np.int64(0))[0]
    else:
        items = items + ITEMS * WORD
    objects = view(items, count, np.int64(0))
    changed = unknown = 0
    for i in range(count):
        words = view(objects[i], FLAGS + 1, np.int64(0))
        address = UNKNOWN
        if words[TYPE] == array_type:
            ndim = expected[i, 1]
            flags = expected[i, 3]
            fits = words[DTYPE] == expected[i, 0] and np.int32(words[NDIM]) == ndim
            if fits and np.int32(words[FLAGS]) & flags == flags:
                shape = view(words[SHAPE], ndim, np.int64(0))
                for k in range(ndim):
                    fits = fits and shape[k] == extents[expected[i, 2] + k]
                if fits:
                    address = words[DATA]
        changed += address != addresses[i]
        unknown += address == UNKNOWN
        addresses[i] = address
    return changed, unknown


@Direct
def _same_objects(values, identities):
    objects = view(view(values + ITEMS * WORD, 1, np.int64(0))[0], identities.size, np.int64(0))
    for i in range(identities.size):
        if objects[i] != identities[i]:
            return False
    return True


class Identities:
    """Which objects a list held, which must live on."""

    def __init__(self, values: list) -> None:
        self._identities = np.array([id(value) for value in values], np.int64)

    def are_those_of(self, values: list) -> bool:
        """Whether it holds the same, in the same order."""
        if len(values) != self._identities.size:
            return False
        if type(values) is list and readable():
            return _same_objects.call(id(values), self._identities)
        return [id(value) for value in values] == self._identities.tolist()


class Headers:
    """What arrays must be to be taken as they are: C-contiguous, aligned, of these dtypes and shapes.

    ``addresses`` holds, after :meth:`read`, where each array's elements are, or UNKNOWN for what is something
    else, or of another dtype or shape, and has to be looked at.
    """

    def __init__(self, dtypes: Sequence[np.dtype | None], shapes: list[tuple[int, ...]], writeable: bool) -> None:
        self.count = len(shapes)
        self.addresses = np.zeros(self.count, np.int64)
        self._dtypes, self._shapes = dtypes, shapes
        flags = C_CONTIGUOUS | ALIGNED | (WRITEABLE if writeable else 0)
        firsts = np.cumsum([0, *map(len, shapes)])[:-1]
        rows = [(id(d), len(s), first, flags) for d, s, first in zip(dtypes, shapes, firsts, strict=True)]
        self._expected = np.array(rows, np.int64).reshape(-1, 4)
        self._extents = np.array([extent for shape in shapes for extent in shape], np.int64)
        self._writeable = writeable

    def read(self, values: list | tuple) -> tuple[int, int]:
        """Set ``addresses`` to those of ``values``; returns how many changed and how many are UNKNOWN."""
        if len(values) != self.count:
            raise ValueError(f"{len(values)} values for {self.count}")
        if type(values) in (list, tuple) and readable():
            arguments = id(np.ndarray), self._expected, self._extents, self.addresses
            return _read.call(id(values), type(values) is list, *arguments)
        return self._look(values)

    def _look(self, values: list | tuple) -> tuple[int, int]:
        """The same, from Python."""
        before = self.addresses.copy()
        for i, value in enumerate(values):
            fits = (
                type(value) is np.ndarray
                and value.dtype is self._dtypes[i]
                and value.shape == self._shapes[i]
                and value.flags.c_contiguous
                and value.flags.aligned
                and (value.flags.writeable or not self._writeable)
            )
            self.addresses[i] = value.__array_interface__["data"][0] if fits else UNKNOWN
        return int((self.addresses != before).sum()), int((self.addresses == UNKNOWN).sum())


@functools.cache
def readable() -> bool:
    """Whether headers are laid out as is said here."""
    locked = getattr(sys, "_is_gil_enabled", lambda: True)()
    if numba.config.DISABLE_JIT or platform.python_implementation() != "CPython" or not locked:  # type: ignore[attr-defined]
        return False
    single, double = np.dtype(np.float32), np.dtype(np.float64)
    read_only = np.zeros(3, single)
    read_only.flags.writeable = False
    values = [np.zeros((2, 3), single), np.ones(5), np.zeros(()), np.zeros((0, 4), single), np.zeros(8)[::2]]
    values += [None, np.zeros((3, 2), single), np.zeros((4, 2), single, order="F"), read_only]
    values += [np.zeros(12, single)[3:9], 7]
    shapes = [(2, 3), (5,), (), (0, 4), (4,), (1,), (2, 3), (4, 2), (3,), (6,), ()]
    dtypes = [single, double, double, single, double, single, single, single, single, single, double]
    for writeable in (True, False):
        headers = Headers(dtypes, shapes, writeable)
        looked = headers._look(values), headers.addresses.copy()
        for container in (values, tuple(values)):
            headers.addresses[:] = 0
            arguments = id(np.ndarray), headers._expected, headers._extents, headers.addresses
            found = _read.call(id(container), type(container) is list, *arguments)
            if found != looked[0] or (headers.addresses != looked[1]).any():
                return False
    return True
