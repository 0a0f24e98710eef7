"""Loops over elements that are stored in their formats (see formats.py): their source is generated, so that
one loop decodes, updates and encodes the elements of all arrays."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba.np.numpy_support import as_dtype

from fastopt.kernels.cpu.jit import restricted_helper
from fastopt.kernels.element import update_element
from fastopt.kernels.formats import BLOCK, NEAREST, Format, half_of_random, larger, random_draws, scale_from
from fastopt.kernels.intrinsics import random_bits, view
from fastopt.kernels.linked import overload
from fastopt.kernels.source import define

RUN = 8 * BLOCK  # elements that are updated at a time, so that what is done to them next finds them in cache
NO_SCALES = "view(np.int64(0), np.int64(0), np.float32(0))"

Formats = tuple[Format, ...]
Make = Callable[[Formats, np.dtype], Callable]


def made_by(make: Make) -> Callable[[Callable], Any]:
    """Decorate a function without a body that takes ``kinds``, formats, and ``like``, a number of the type
    that is computed with: for these, it becomes the one that ``make(members, dtype)`` returns, of the same
    arguments."""
    make = functools.cache(make)

    def decorate(function: Callable) -> Any:
        arguments = str(inspect.signature(function))[1:-1]
        names: dict[str, Any] = {"make": make, "np": np, "as_dtype": as_dtype}
        of_values = "kinds.members, np.dtype(type(like))"
        of_types = "kinds.instance_class.members, as_dtype(like)"
        plain = define(function.__name__, arguments, f"return make({of_values})({arguments})", **names)
        overload(plain)(define("typed", arguments, f"return make({of_types})", **names))
        return functools.update_wrapper(plain, function)

    return decorate


def new_array(shape, like):
    """An array of this shape, of the type of the number ``like``."""
    return np.empty(shape, type(like))


@overload(new_array)
def _new_array(shape, like):
    dtype = as_dtype(like)
    return lambda shape, like: np.empty(shape, dtype)


# Opening


class Opening(NamedTuple):
    """Source that opens the arrays of a run, and the parameters and arguments of a loop over its elements
    ``i``, which finds the numbers at ``loads``. All of it sees ``names``."""

    lines: list[str]
    parameters: list[str]
    arguments: list[str]
    loads: list[str]
    names: dict[str, Any]


def _place(members: Formats, k: int, like: np.dtype) -> str:
    """Source of the address of array ``k``'s numbers, or codes, from the element ``at`` on: ``places`` holds
    two addresses for each array, the second that of a master or of scales."""
    kind = members[k]
    size = like.itemsize if kind.master else kind.itemsize(like)
    return f"places[{2 * k + kind.master}] + at * {size}"


def opened(members: Formats, like: np.dtype) -> Opening:
    """The opening of arrays at ``places``, from the element ``at`` on."""
    names: dict[str, Any] = {"np": np, "view": view, "like": like.type(0), "members": _names(members)}
    opening = Opening([], [], [], [], names)
    for k, kind in enumerate(members):
        zero, load = "like", f"a{k}[i]"
        if kind.stored is not None and not kind.master:
            names |= {f"zero{k}": kind.zero(like), f"decode{k}": kind.decode}
            zero, load = f"zero{k}", f"decode{k}(a{k}[i])"
        opening.lines.append(f"a{k} = view({_place(members, k, like)}, size, {zero})")
        opening.parameters.append(f"a{k}")
        opening.arguments.append(f"a{k}")
        if kind.coded:
            names[f"factor{k}"] = kind.factor
            opening.lines.append(f"s{k} = view(places[{2 * k + 1}] + at // {BLOCK} * 4, 1, np.float32(0))")
            opening.parameters.append(f"f{k}")
            opening.arguments.append(f"factor{k}(s{k}[0])")
            load = f"decode{k}(a{k}[i], f{k})"
        opening.loads.append(load)
    return opening


def _names(members: Formats) -> tuple[str, ...]:
    """By which functions of different formats are told apart."""
    return tuple(member.name for member in members)


# Runs


_RUN = "h, c, like, kinds, places, at, size, key, position, buffers"


def run_update(members: Formats, like: np.dtype) -> Callable:
    """See :func:`update_run`; ``members`` are the formats of the parameter, the gradient and each slot."""
    slots = members[2:]
    coded = [s for s, kind in enumerate(slots) if kind.coded]
    opening, parameters, arguments, loads, names = opened(members, like)
    names |= {"random_bits": random_bits, "update_element": update_element}
    names |= {"larger": larger, "scale_from": scale_from}
    stores = []
    for k, kind in enumerate(members):
        if k == 1:
            continue
        new = f"new[{k - (k > 0)}]"
        if kind.stored is not None:
            names |= {f"encode{k}": kind.encode, f"inverse{k}": kind.inverse}
        if kind.coded:
            opening.append(f"b{k} = buffers[{coded.index(k - 2)}]")
            parameters.append(f"b{k}")
            arguments.append(f"b{k}")
            stores += [f"b{k}[i] = {new}", f"l{k} = larger(l{k}, {new})"]
            continue
        if kind.master:
            names[f"zero{k}"] = kind.zero(like)
            size = kind.itemsize(like)
            opening.append(f"o{k} = view(places[{2 * k}] + at * {size}, size, zero{k})")
            parameters.append(f"o{k}")
            arguments.append(f"o{k}")
        if kind.stored is None or kind.master:
            stores.append(f"a{k}[i] = {new}")
        if kind.stored is not None:
            target = f"o{k}" if kind.master else f"a{k}"
            random = half_of_random(k - 2) if kind.random else "np.uint32(0)"
            stores.append(f"{target}[i] = encode{k}({new}, {random})")
    draws = random_draws([s for s, kind in enumerate(slots) if kind.random and not kind.coded])
    loop = define(
        "loop",
        f"h, c, size, key, position, {', '.join(parameters)}",
        *(f"l{s + 2} = np.uint32(0)" for s in coded),
        "for k in range(size):",
        "    i = np.uint64(k)",
        *(f"    {line}" for line in draws),
        f"    new = update_element(h, c, {', '.join(loads)})",
        *(f"    {line}" for line in stores),
        f"return ({''.join(f'l{s + 2}, ' for s in coded)})",
        **names,
    )
    names["loop"] = restricted_helper(loop)
    closing = [f"largest = loop(h, c, size, key, position, {', '.join(arguments)})"]
    if coded:
        encode = define(
            "encode",
            "size, key, position, " + ", ".join(f"a{s + 2}, b{s + 2}, v{s + 2}" for s in coded),
            "for k in range(size):",
            "    i = np.uint64(k)",
            *(f"    {line}" for line in random_draws(coded)),
            *(f"    a{s + 2}[i] = encode{s + 2}(b{s + 2}[i], {half_of_random(s)}, v{s + 2})" for s in coded),
            **names,
        )
        names["encode"] = restricted_helper(encode)
        closing += [f"s{s + 2}[0] = scale_from(largest[{n}])" for n, s in enumerate(coded)]
        given = ", ".join(f"a{s + 2}, b{s + 2}, inverse{s + 2}(s{s + 2}[0])" for s in coded)
        closing.append(f"encode(size, key, position, {given})")
    return define("run", _RUN, *opening, *closing, "return None", **names)


@made_by(run_update)
def update_run(h, c, like, kinds, places, at, size, key, position, buffers):
    """Update a run of elements.

    h, c: the hyperparameters. places: two addresses for each array. at, size: the first element and how
    many, with codes in blocks those of one block. key: of the random bits. position: of the first element,
    that they are counted from. buffers: [slots with codes, BLOCK].
    """


def _constant(value: Callable[[Formats, np.dtype], Any]) -> Make:
    return lambda members, like: define("constant", "kinds, like", f"return {value(members, like)}")


@made_by(_constant(lambda members, like: BLOCK if any(kind.coded for kind in members) else RUN))
def run_length(kinds, like):
    """Elements of a run: those of a block where there are codes in blocks."""


@made_by(_constant(lambda members, like: sum(kind.coded for kind in members)))
def coded_slots(kinds, like):
    """How many arrays have codes in blocks."""


@made_by(_constant(lambda members, like: 0 if any(k.coded for k in members) else members[0].itemsize(like)))
def parameter_itemsize(kinds, like):
    """Bytes of a stored element of the parameter; 0 where there are codes in blocks."""


@made_by(_constant(lambda members, like: members[1].itemsize(like)))
def gradient_itemsize(kinds, like):
    """Bytes of a stored element of the gradient."""


# Rows


def reader(kind: Format) -> Callable:
    """``(stored, scales, out)``: decode a row; scales are those of its blocks."""
    names: dict[str, Any] = {"decode": kind.decode, "factor": kind.factor, "kind": kind.name}
    if kind.coded:
        lines: tuple[str, ...] = (
            f"for first in range(0, out.size, {BLOCK}):",
            f"    own = factor(scales[first // {BLOCK}])",
            f"    for i in range(first, min(first + {BLOCK}, out.size)):",
            "        out[i] = decode(stored[i], own)",
        )
    else:
        lines = ("for i in range(out.size):", "    out[i] = decode(stored[i])")
    return restricted_helper(define("read", "stored, scales, out", *lines, **names))


def writer(kind: Format, slot: int | None = None) -> Callable:
    """``(values, stored, scales, key, position)``: encode a row, with the random bits of the state's slot
    ``slot`` or, without one, rounded to the nearest."""
    names: dict[str, Any] = {"np": np, "random_bits": random_bits, "encode": kind.encode, "kind": kind.name}
    names |= {"inverse": kind.inverse, "larger": larger, "scale_from": scale_from, "NEAREST": NEAREST}
    draws, random = [], "NEAREST"
    if kind.random and slot is not None:
        draws, random = random_draws([slot]), half_of_random(slot)
    if kind.coded:
        lines = [
            f"for first in range(0, values.size, {BLOCK}):",
            f"    last = min(first + {BLOCK}, values.size)",
            "    largest = np.uint32(0)",
            "    for k in range(first, last):",
            "        largest = larger(largest, values[k])",
            "    scale = scale_from(largest)",
            f"    scales[first // {BLOCK}] = scale",
            "    own = inverse(scale)",
            "    for k in range(first, last):",
            *(f"        {line}" for line in draws),
            f"        stored[k] = encode(values[k], {random}, own)",
        ]
    else:
        lines = [
            "for k in range(values.size):",
            *(f"    {line}" for line in draws),
            f"    stored[k] = encode(values[k], {random})",
        ]
    return restricted_helper(define("write", "values, stored, scales, key, position", *lines, **names))


def _opener(k: int) -> Make:
    """A function that returns numbers of array ``k``: in place, or decoded into ``buffer``."""

    def make(members: Formats, like: np.dtype) -> Callable:
        kind, arguments, place = members[k], "kinds, like, places, at, size, buffer", _place(members, k, like)
        if kind.stored is None or kind.master:
            return define("open_numbers", arguments, f"return view({place}, size, like)", view=view)
        return define(
            "open_numbers",
            arguments,
            f"read(view({place}, size, zero), {NO_SCALES}, buffer[:size])",
            "return buffer[:size]",
            view=view,
            np=np,
            zero=kind.zero(like),
            read=reader(kind),
            kind=kind.name,
        )

    return make


@made_by(_opener(0))
def open_parameter(kinds, like, places, at, size, buffer):
    """The numbers of the parameter from the element ``at`` on, whose format has no blocks."""


@made_by(_opener(1))
def open_gradient(kinds, like, places, at, size, buffer):
    """The numbers of the gradient from the element ``at`` on, whose format has no blocks."""


def _closer(members: Formats, like: np.dtype) -> Callable:
    kind, arguments = members[0], "kinds, like, places, at, p"
    if kind.stored is None:
        return define("close_parameter", arguments, "return None")
    stored = f"view(places[0] + at * {kind.itemsize(like)}, p.size, zero)"
    return define(
        "close_parameter",
        arguments,
        f"write(p, {stored}, {NO_SCALES}, np.uint64(0), np.int64(0))",
        view=view,
        np=np,
        zero=kind.zero(like),
        write=writer(kind),
        kind=kind.name,
    )


@made_by(_closer)
def close_parameter(kinds, like, places, at, p):
    """Store the numbers of the parameter that were opened, or that its master holds."""


def _reblocker(members: Formats, like: np.dtype) -> Callable:
    [kind] = members
    return define(
        "reblock_row",
        "kinds, like, codes, scales, first, numbers, new, own_scales",
        "for d in range(numbers.size):",
        f"    numbers[d] = decode(codes[first + d], factor(scales[(first + d) // {BLOCK}]))",
        "write(numbers, new, own_scales, np.uint64(0), np.int64(0))",
        decode=kind.decode,
        factor=kind.factor,
        write=writer(kind),
        kind=kind.name,
        np=np,
    )


@made_by(_reblocker)
def reblock_row(kinds, like, codes, scales, first, numbers, new, own_scales):
    """Encode a row, which begins with the element ``first`` of ``codes``, in blocks of its own, rounded to
    the nearest; numbers: memory for as many."""
