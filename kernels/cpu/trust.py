"""Updates by rules with a trust ratio: the length of a step depends on norms of the whole array, or of a row.

Two passes: one sums up the squares of the parameter and of the direction, and writes nothing; then each
array has a factor of its learning rate and is updated as by any other rule. So the direction is computed
twice, from the state before it is rounded to its format, and needs no memory. An element of float32 LAMB
takes 16 bytes and 28, the second of which come from the cache where few elements are updated at a time.

Sums are in float64, over blocks that begin with their array and are added in order: they depend neither on
the number of threads nor on the other arrays.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from fastopt.kernels.cpu.chunks import chunk_count, chunk_ends
from fastopt.kernels.cpu.dense import array_at, update_arrays
from fastopt.kernels.cpu.for_each import for_each
from fastopt.kernels.cpu.jit import Kernel, helper, restricted_helper
from fastopt.kernels.cpu.norms import SUMMED, add_squares, total_of
from fastopt.kernels.cpu.runs import Formats, made_by, new_array, opened, run_length
from fastopt.kernels.cpu.threads import run
from fastopt.kernels.element import direction, load, part_of, rescaled, trust_ratio, unpack
from fastopt.kernels.formats import BLOCK
from fastopt.kernels.intrinsics import ON_STACK, on_stack
from fastopt.kernels.layout import ARRAY_NUMBERS, ARRAY_PLACES
from fastopt.kernels.linked import overload, register_jitable
from fastopt.kernels.magnitude import unit_of
from fastopt.kernels.rule import RULES
from fastopt.kernels.source import define

LANES = BLOCK  # sums of a block that grow side by side, so that the loop over them vectorises
GATHERED = 4 * LANES  # numbers that are added to the sums at a time


def update_whole_arrays(
    work: int,
    types: Hashable,
    h: Any,
    c: Any,
    like: Any,
    kinds: Any,
    table: np.ndarray,
    bases: np.ndarray,
    numbers: np.ndarray,
    zero_grads: bool,
    chunk: int,
) -> Sequence[Callable[[], object]]:
    """The call that does what :data:`~fastopt.kernels.cpu.dense.update_arrays` does, by a rule with a trust
    ratio, which is found here; ``types``: as for :meth:`~fastopt.kernels.cpu.jit.Kernel.ready`."""
    if not work:
        return ()
    sums = np.empty((bases[-1] // SUMMED + len(table), 2))
    units, needed = np.ones((2, len(table), 2))
    own_numbers = np.empty((len(table), numbers.shape[1]))
    given = h, c, like, kinds, table, bases, numbers, chunk, units, sums, needed, own_numbers
    run([find_trust_ratios.ready(work, given, types)])
    if isinstance(like, np.float64) and (needed != 1.0).any():  # squares of float32 are as they should be
        units[...] = needed
        run([find_trust_ratios.ready(work, given, types)])
    own_table = table.copy()
    own_table[:, ARRAY_NUMBERS] = np.arange(len(table))
    own = h, c, like, kinds, own_table, bases, own_numbers, zero_grads, chunk
    return (update_arrays.ready(work, own, types),)


@Kernel
def find_trust_ratios(
    team, h, c, like, kinds, table, bases, numbers, chunk, units, sums, needed, own_numbers
):
    """Set row t of ``own_numbers`` to the hyperparameters of array t, its trust ratio in the learning rate.

    The arguments are those of update_arrays; units: [array, 2], what the parameter and the direction are
    divided by before they are squared. sums: memory, [bases[-1] // SUMMED + arrays, 2]. needed: becomes the
    units that the sums ask for (see fastopt.kernels.magnitude).

    Bytes moved: the parameter, the gradient and the state read; for float32 LAMB 16 an element.
    """
    arguments = h, c, like, kinds, table, bases, numbers, chunk, units, sums
    for_each(team, sum_chunk, chunk_count(bases[-1], chunk), arguments)
    for t in range(table.shape[0]):
        numbers_of_array = numbers[table[t, ARRAY_NUMBERS]]
        find_trust_ratio(h, bases, t, numbers_of_array, units[t], sums, needed[t], own_numbers[t])


@helper
def first_sums(bases, t):
    """Where those of array ``t`` begin, with enough room after them for any array."""
    return bases[t] // SUMMED + t


@helper
def sum_chunk(k, h, c, like, kinds, table, bases, numbers, chunk, units, sums):
    """The blocks of arrays that begin in chunk ``k``."""
    first, last = chunk_ends(k, chunk, bases[-1])
    p_memory, u_memory = np.empty(LANES), np.empty(LANES)
    found = new_array((2, GATHERED), like)
    run = min(run_length(kinds, like), GATHERED)
    for t in range(array_at(bases, first), table.shape[0]):
        base = bases[t]
        if base >= last:
            break
        begin = max(first - base + SUMMED - 1, 0) // SUMMED
        size = bases[t + 1] - base
        end = min(last - base, size)
        row = table[t]
        own_h = unpack(h, numbers[row[ARRAY_NUMBERS]], like)
        own_c = unpack(c, numbers[row[ARRAY_NUMBERS], len(h) :], like)
        places = row[ARRAY_PLACES:]
        for block in range(begin, chunk_count(end, SUMMED)):
            block_end = min((block + 1) * SUMMED, size)
            used = min(LANES, block_end - block * SUMMED)
            p_lanes, u_lanes = p_memory[:used], u_memory[:used]
            p_lanes[:] = 0.0
            u_lanes[:] = 0.0
            for gathered in range(block * SUMMED, block_end, GATHERED):
                count = min(GATHERED, block_end - gathered)
                for at in range(0, count, run):
                    end_of_run = min(at + run, count)
                    ps, us = found[0, at:end_of_run], found[1, at:end_of_run]
                    find_directions(own_h, own_c, like, kinds, places, gathered + at, end_of_run - at, ps, us)
                    divide(ps, units[t, 0])
                    divide(us, units[t, 1])
                add_gathered(found[0, :count], p_lanes)
                add_gathered(found[1, :count], u_lanes)
            block_sums = sums[first_sums(bases, t) + block]
            block_sums[0] = total_of(p_lanes)
            block_sums[1] = total_of(u_lanes)


@helper
def divide(numbers, unit):
    if unit != 1.0:
        for k in range(numbers.size):
            numbers[k] /= unit


@helper
def add_gathered(found, lanes):
    """Add the squares of ``found``, GATHERED numbers or the fewer at an array's end."""
    if found.size == GATHERED:
        add_four(
            found[:LANES], found[LANES : 2 * LANES], found[2 * LANES : 3 * LANES], found[3 * LANES :], lanes
        )
    else:
        for first in range(0, found.size, LANES):
            add_squares(found[first : min(first + LANES, found.size)], 1.0, lanes)


@restricted_helper
def add_four(a, b, c, d, lanes):
    for i in range(LANES):
        w, x, y, z = np.float64(a[i]), np.float64(b[i]), np.float64(c[i]), np.float64(d[i])
        lanes[i] += (w * w + x * x) + (y * y + z * z)


@helper
def find_trust_ratio(h, bases, t, numbers, units, sums, needed, own_numbers):
    size = bases[t + 1] - bases[t]
    first = first_sums(bases, t)
    p_sq = u_sq = 0.0
    for k in range(first, first + chunk_count(size, SUMMED)):
        p_sq += sums[k, 0]
        u_sq += sums[k, 1]
    needed[0], needed[1] = unit_of(p_sq), unit_of(u_sq)
    own_numbers[:] = numbers
    own_numbers[0] *= trust_ratio(unpack(h, numbers, np.float64(0)), p_sq, u_sq, units[0], units[1], size)


@register_jitable
def _row_rated(h, c, p, g, state, row_values):
    """``h`` with its learning rate times the trust ratio of the row ``p``; all arrays are 1-D."""
    p_sq, u_sq = row_squares(h, c, p, g, state, row_values, 1.0, 1.0)
    p_unit, u_unit = unit_of(p_sq), unit_of(u_sq)
    if p_unit != 1.0 or u_unit != 1.0:
        p_sq, u_sq = row_squares(h, c, p, g, state, row_values, p_unit, u_unit)
    return rescaled(h, p.dtype.type(trust_ratio(h, p_sq, u_sq, p_unit, u_unit, g.size)))


@register_jitable
def row_squares(h, c, p, g, state, row_values, p_unit, u_unit):
    """The sums of squares of the row ``p`` and of its direction, over their units.

    Four interleaved sums each: a fixed order, in which the additions need not wait for each other.
    """
    us = on_stack(p.dtype.type(0))
    p_sq = u_sq = 0.0
    for first in range(0, g.size, ON_STACK):
        last = min(first + ON_STACK, g.size)
        find_row_directions(h, c, p[first:last], g[first:last], part_of(state, first, last), row_values, us)
        p_sq += sum_of_squares(p[first:last], 1.0 / p_unit)
        u_sq += sum_of_squares(us[: last - first], 1.0 / u_unit)
    return p_sq, u_sq


def rated(h, c, p, g, state, row_values):
    """``h`` as the elements of the row ``p`` are to see it: with its trust ratio, if the rule has one."""
    return _row_rated(h, c, p, g, state, row_values) if RULES[type(h)].trust_ratio else h


@overload(rated)
def _rated(h, c, p, g, state, row_values):
    if RULES[h.instance_class].trust_ratio is None:
        return lambda h, c, p, g, state, row_values: h
    return _row_rated


@restricted_helper
def find_row_directions(h, c, p, g, state, row_values, us):
    for d in range(p.size):
        us[d] = direction(h, c, p[d], g[d], *load(state, d), *row_values)


@restricted_helper
def sum_of_squares(x, scale):
    a = b = c = d = 0.0
    whole = x.size - x.size % 4
    for k in range(0, whole, 4):
        x0, x1 = np.float64(x[k]) * scale, np.float64(x[k + 1]) * scale
        x2, x3 = np.float64(x[k + 2]) * scale, np.float64(x[k + 3]) * scale
        a += x0 * x0
        b += x1 * x1
        c += x2 * x2
        d += x3 * x3
    for k in range(whole, x.size):
        x0 = np.float64(x[k]) * scale
        a += x0 * x0
    return (a + b) + (c + d)


def run_directions(members: Formats, like: np.dtype) -> Callable:
    """See :func:`find_directions`."""
    opening, parameters, arguments, loads, names = opened(members, like)
    loop = define(
        "loop",
        f"h, c, size, ps, us, {', '.join(parameters)}",
        "for k in range(size):",
        "    i = np.uint64(k)",
        f"    p = {loads[0]}",
        "    ps[i] = p",
        f"    us[i] = direction(h, c, p, {', '.join(loads[1:])})",
        "return None",
        direction=direction,
        **names,
    )
    return define(
        "run",
        "h, c, like, kinds, places, at, size, ps, us",
        *opening,
        f"loop(h, c, size, ps, us, {', '.join(arguments)})",
        "return None",
        loop=restricted_helper(loop),
        **names,
    )


@made_by(run_directions)
def find_directions(h, c, like, kinds, places, at, size, ps, us):
    """Set ``ps`` and ``us`` to a run's elements and their directions; the other arguments are as those of
    :func:`~fastopt.kernels.cpu.runs.update_run`.

    They are squared apart: a loop with float64 in it would have as few lanes for all that it does.
    """
