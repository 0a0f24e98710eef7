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

from fastopt.kernels.cpu.jit import Direct
from fastopt.kernels.intrinsics import view, view_2d

WORD = 8
OBJECT = object.__basicsize__ // WORD  # words before what a type adds
TYPE = OBJECT - 1
ITEMS = OBJECT + 1  # of a list: the address of its items; of a tuple: the items themselves
DATA, NDIM, SHAPE, DTYPE, FLAGS = (OBJECT + k for k in (0, 1, 2, 5, 6))
C_CONTIGUOUS, ALIGNED, WRITEABLE = 0x1, 0x100, 0x400

UNKNOWN = np.int64(-1)  # in place of the address of what is no array as expected


@Direct
def _read(
    parameters,
    parameters_are_list,
    gradients,
    gradients_are_list,
    array_type,
    count,
    expected,
    extents,
    addresses,
):
    """See :class:`Headers`. All arguments are numbers, which cost least to pass: the last three are addresses
    of [parameters or gradients, array, (dtype, dimensions, the first of its extents, flags)], of the extents,
    and of [parameters or gradients, array]. Returns the number of an entry of FOUND."""
    expected = view_2d(expected, 2 * count, np.int64(4), np.int64(0))
    addresses = view(addresses, 2 * count, np.int64(0))
    found = 0
    for which in range(2):
        items = gradients if which else parameters
        items += ITEMS * WORD
        if gradients_are_list if which else parameters_are_list:
            items = view(items, 1, np.int64(0))[0]
        objects = view(items, count, np.int64(0))
        for i in range(count):
            k = which * count + i
            words = view(objects[i], FLAGS + 1, np.int64(0))
            address = UNKNOWN
            if words[TYPE] == array_type:
                ndim = expected[k, 1]
                flags = expected[k, 3]
                fits = words[DTYPE] == expected[k, 0] and np.int32(words[NDIM]) == ndim
                if fits and np.int32(words[FLAGS]) & flags == flags:
                    shape = view(words[SHAPE], ndim, np.int64(0))
                    wanted = view(extents + expected[k, 2] * WORD, ndim, np.int64(0))
                    for d in range(ndim):
                        fits = fits and shape[d] == wanted[d]
                    if fits:
                        address = words[DATA]
            if address != addresses[k]:
                found |= 1 << (2 * which)
            if address == UNKNOWN:
                found |= 2 << (2 * which)
            addresses[k] = address
    return found


@Direct
def _same_objects(values, identities):
    objects = view(view(values + ITEMS * WORD, 1, np.int64(0))[0], identities.size, np.int64(0))
    same = True
    for i in range(identities.size):
        same = same and objects[i] == identities[i]
    return same


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


Found = tuple[tuple[bool, bool], tuple[bool, bool]]
# What :meth:`Headers.read` returns: the number's bits, the lowest first.
FOUND = [((bool(n & 1), bool(n & 2)), (bool(n & 4), bool(n & 8))) for n in range(16)]


class Headers:
    """What parameters and gradients must be to be taken as they are: C-contiguous, aligned, of these dtypes
    and shapes, parameters writeable.

    ``addresses``, [parameters or gradients, array], holds, after :meth:`read`, where each one's elements
    are, or UNKNOWN for what is something else, or of another dtype or shape, and has to be looked at.
    """

    def __init__(self, dtypes: Sequence[np.dtype], shapes: Sequence[tuple[int, ...]]) -> None:
        self.addresses = np.zeros((2, len(shapes)), np.int64)
        self._shapes = shapes
        firsts = np.cumsum([0, *map(len, shapes)])[:-1]
        flags = C_CONTIGUOUS | ALIGNED
        rows = [(id(d), len(s), n, flags) for d, s, n in zip(dtypes, shapes, firsts, strict=True)]
        self._expected = np.array([rows, rows], np.int64).reshape(2, -1, 4)
        self._expected[0, :, 3] |= WRITEABLE
        self._extents = np.array([extent for shape in shapes for extent in shape], np.int64)
        self.dtypes: tuple[Sequence[np.dtype | None], ...] = dtypes, dtypes
        self._writeable = False
        places = (a.ctypes.data for a in (self._expected, self._extents, self.addresses))
        self._fixed = id(np.ndarray), len(shapes), *places

    def expect(self, dtypes: Sequence[np.dtype | None]) -> None:
        """Take gradients of these dtypes, and none for None."""
        self.dtypes = self.dtypes[0], dtypes
        self._expected[1, :, 0] = [id(dtype) for dtype in dtypes]

    def expect_writeable(self, writeable: bool) -> None:
        """Whether gradients, too, must be writeable."""
        if writeable != self._writeable:
            self._writeable = writeable
            self._expected[1, :, 3] ^= WRITEABLE

    def read(self, parameters: list | tuple, gradients: list | tuple) -> Found:
        """Set ``addresses``; returns, of parameters and of gradients, whether any has changed, and whether
        any is UNKNOWN."""
        kinds = type(parameters), type(gradients)
        if len(parameters) != len(self._shapes) or len(gradients) != len(self._shapes):
            raise ValueError(f"{len(parameters)} and {len(gradients)}: expected {len(self._shapes)}")
        if readable() and kinds[0] in _READ and kinds[1] in _READ:
            given = id(parameters), kinds[0] is list, id(gradients), kinds[1] is list
            return FOUND[_read.call(*given, *self._fixed)]
        return self._look(0, parameters), self._look(1, gradients)

    def _look(self, which: int, values: list | tuple) -> tuple[bool, bool]:
        """The same, from Python."""
        addresses, before = self.addresses[which], self.addresses[which].copy()
        for i, (value, dtype, shape) in enumerate(zip(values, self.dtypes[which], self._shapes, strict=True)):
            fits = (
                type(value) is np.ndarray
                and value.dtype is dtype
                and value.shape == shape
                and value.flags.c_contiguous
                and value.flags.aligned
                and (value.flags.writeable or not (which == 0 or self._writeable))
            )
            addresses[i] = value.__array_interface__["data"][0] if fits else UNKNOWN
        return bool((addresses != before).any()), bool((addresses == UNKNOWN).any())


_READ = list, tuple


@functools.cache
def readable() -> bool:
    """Whether headers are laid out as is said here."""
    locked = getattr(sys, "_is_gil_enabled", lambda: True)()
    compiled = not numba.config.DISABLE_JIT  # type: ignore[attr-defined]
    if not compiled or platform.python_implementation() != "CPython" or not locked:
        return False
    single, double = np.dtype(np.float32), np.dtype(np.float64)
    read_only = np.zeros(3, single)
    read_only.flags.writeable = False
    values: list[object] = [
        np.zeros((2, 3), single),
        np.ones(5),
        np.zeros(()),
        np.zeros((0, 4), single),
        np.zeros(8)[::2],
    ]
    values += [None, np.zeros((3, 2), single), np.zeros((4, 2), single, order="F"), read_only]
    values += [np.zeros(12, single)[3:9], 7]
    shapes = [(2, 3), (5,), (), (0, 4), (4,), (1,), (2, 3), (4, 2), (3,), (6,), ()]
    dtypes: list[np.dtype] = [single, double, double, single, double, *(5 * [single]), double]
    headers = Headers(dtypes, shapes)
    looked = headers._look(0, values), headers._look(1, values)
    expected = headers.addresses.copy()
    for container in (values, tuple(values)):
        headers.addresses[:] = 0
        where, is_list = id(container), type(container) is list
        found = FOUND[_read.call(where, is_list, where, is_list, *headers._fixed)]
        if found != looked or (headers.addresses != expected).any():
            return False
    return True
