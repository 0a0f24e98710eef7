"""One element of arrays that are stored in their formats (see formats.py): read, updated, and made into what
is written. The source is generated, so that any rule works on any formats, and calls what the CPU calls: it
gives the same bits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba.extending import register_jitable

from fastopt.kernels.element import direction, update_element
from fastopt.kernels.formats import Format, half_of_random, random_draws
from fastopt.kernels.intrinsics import random_bits
from fastopt.kernels.source import define
from fastopt.kernels.work import Spec

Formats = tuple[Format, ...]


class Code(NamedTuple):
    """What selects the machine code of an update.

    h, c: types of the hyperparameters. flags: which fields of ``h`` are flags. compute: the dtype that is
    computed with. formats: of the parameter, the gradient and the slots.
    """

    h: type
    flags: tuple[bool, ...]
    c: type
    compute: np.dtype
    formats: Formats

    @property
    def width(self) -> int:
        """How many hyperparameters there are."""
        return len(self.h._fields) + len(self.c._fields)  # type: ignore[attr-defined]


def code_of(spec: Spec) -> Code:
    """That of a launch."""
    flags = tuple(isinstance(x, bool) for x in spec.h)
    return Code(type(spec.h), flags, type(spec.c), spec.compute, spec.formats)


def prototypes(code: Code) -> tuple[Any, Any, Any]:
    """``h``, ``c`` and a number, of the types that kernels compute with: constants of a kernel's source, the
    types of which select what it calls."""
    like = code.compute.type(0)
    h = code.h(*(False if flag else like for flag in code.flags))
    return h, code.c(*(like for _ in code.c._fields)), like  # type: ignore[attr-defined]


class Place(NamedTuple):
    """Where a number of an element lies.

    array: 0 for the parameter, 1 for the gradient, from 2 on for the slots. second: whether it lies at the
    second of the array's two addresses, that of a master, and not at the first. zero: 0 of its machine type.
    """

    array: int
    second: bool
    zero: Any

    @property
    def itemsize(self) -> int:
        return self.zero.itemsize


class Elements(NamedTuple):
    """How elements of arrays are updated.

    inputs: where the numbers lie that an update reads, one for each array.
    outputs: where those lie that ``element`` returns; None for a number whose code is known only when its
        block's scale is.
    coded: the arrays with codes in blocks, in the order of their None in ``outputs``.
    element: ``(h, c, key, position, k, *inputs, *factors of coded, *row_values) -> outputs``; random bits are
        those of the position ``position + k``.
    encode: ``(key, position, k, *numbers of coded, *inverses of coded) -> their codes``.
    read: ``(*inputs, *factors of coded) -> numbers``.
    close: ``(key, position, k, *numbers of all but the gradient) -> outputs``, as ``element``.
    write: ``(p) -> outputs of the parameter``, which has no codes and is not rounded at random.
    direction: ``(h, c, *inputs, *factors of coded, *row_values) -> (p, direction)``, by a rule with a trust
        ratio.
    factors, inverses: functions of a scale, for each of ``coded``.
    """

    inputs: tuple[Place, ...]
    outputs: tuple[Place | None, ...]
    coded: tuple[int, ...]
    element: Callable
    encode: Callable
    read: Callable
    close: Callable
    write: Callable
    direction: Callable
    factors: tuple[Callable, ...]
    inverses: tuple[Callable, ...]


@functools.cache
def elements_of(members: Formats, like: np.dtype) -> Elements:
    """For the formats of the parameter, the gradient and each slot, computed with the dtype ``like``."""
    inputs = tuple(_input(k, kind, like) for k, kind in enumerate(members))
    coded = tuple(k for k, kind in enumerate(members) if kind.coded)
    names: dict[str, Any] = {"np": np, "random_bits": random_bits}
    names |= {"update_element": update_element, "direction": direction}
    loads = []
    for k, kind in enumerate(members):
        loads.append(f"q{k}")
        if kind.stored is not None:
            names |= {f"decode{k}": kind.decode, f"encode{k}": kind.encode}
            if not kind.master:
                loads[k] = f"decode{k}(q{k}, f{k})" if kind.coded else f"decode{k}(q{k})"
    given = ", ".join([*(f"q{k}" for k in range(len(members))), *(f"f{k}" for k in coded), "*more"])
    outputs, values = _outputs(members, like)
    draws = random_draws([k - 2 for k, kind in enumerate(members) if kind.random and not kind.coded])
    result = f"return ({', '.join(values)},)"
    element = define(
        "element",
        f"h, c, key, position, k, {given}",
        *draws,
        f"new = update_element(h, c, {', '.join(loads)}, *more)",
        result,
        **names,
    )
    close = define("close", "key, position, k, *new", *draws, result, **names)
    encoded = (f"encode{k}(x{k}, {_random(k, members[k])}, w{k}), " for k in coded)
    encode = define(
        "encode",
        ", ".join(["key, position, k", *(f"x{k}" for k in coded), *(f"w{k}" for k in coded)]),
        *random_draws([k - 2 for k in coded]),
        f"return ({''.join(encoded)})",
        **names,
    )
    find_direction = define(
        "find_direction",
        f"h, c, {given}",
        f"p = {loads[0]}",
        f"return p, direction(h, c, p, {', '.join(loads[1:])}, *more)",
        **names,
    )
    decoded = ", ".join([*(f"q{k}" for k in range(len(members))), *(f"f{k}" for k in coded)])
    read = define("read", decoded, f"return ({', '.join(loads)},)", **names)
    stored = ", ".join(_outputs(members[:1], like)[1])
    write = define("write", "p", "new = (p,)", f"return ({stored},)", **names)
    functions = element, encode, read, close, write, find_direction
    element, encode, read, close, write, find_direction = map(register_jitable, functions)
    factors, inverses = (tuple(getattr(members[k], name) for k in coded) for name in ("factor", "inverse"))
    return Elements(
        inputs, outputs, coded, element, encode, read, close, write, find_direction, factors, inverses
    )


def _input(k: int, kind: Format, like: np.dtype) -> Place:
    return Place(k, kind.master, like.type(0) if kind.master else kind.zero(like))


def _outputs(members: Formats, like: np.dtype) -> tuple[tuple[Place | None, ...], list[str]]:
    """Where the results of an element go, and their source, ``new`` being what the rule returns."""
    places: list[Place | None] = []
    values = []
    for k, kind in enumerate(members):
        if k == 1:
            continue
        new = f"new[{max(k - 1, 0)}]"
        if kind.coded:
            places.append(None)
            values.append(new)
            continue
        if kind.stored is None or kind.master:
            places.append(Place(k, kind.master, like.type(0)))
            values.append(new)
        if kind.stored is not None:
            places.append(Place(k, False, kind.zero(like)))
            values.append(f"encode{k}({new}, {_random(k, kind)})")
    return tuple(places), values


def _random(k: int, kind: Format) -> str:
    """Source of the random bits of an array."""
    return half_of_random(k - 2) if kind.random else "np.uint32(0)"
