"""Pooled lookups: bags of rows summed, averaged or their maximum taken, and what their gradients need."""

import numpy as np

from fastopt.kernels.cpu.chunks import chunk_count, chunk_ends
from fastopt.kernels.cpu.for_each import for_each
from fastopt.kernels.cpu.index import bounds_of
from fastopt.kernels.cpu.jit import Kernel, helper, restricted_helper
from fastopt.kernels.cpu.segments import add_row, add_weighted_row, sum_bags
from fastopt.kernels.intrinsics import AHEAD, prefetch, prefetch_rows, view
from fastopt.kernels.layout import (
    POOL_BAGS,
    POOL_DIM,
    POOL_INDICES,
    POOL_MEAN,
    POOL_OFFSETS,
    POOL_OUT,
    POOL_OUT_STRIDE,
    POOL_PADDING,
    POOL_POSITIONS,
    POOL_ROWS,
    POOL_TABLE,
    POOL_WEIGHTS,
)
from fastopt.kernels.magnitude import magnitude

BAGS_PER_CHUNK = 64
WIDE, BYTES_AT_ONCE = 128, 16_384  # rows of so many bytes are fetched at once, so many bytes of them
LOOKUPS_AHEAD = 32  # rows that are fetched while others are summed: that takes less time than an update
BAGS_PER_SUM = 32  # whose rows, if they are wide, are summed a block of columns after the other
POSITIONS_PER_CHUNK = 8_192
ROWS_PER_CHUNK = 256


@Kernel
def pool(team, like, index, lookups, parts, bounds):
    """Of each lookup, a row of ``lookups`` (see layout.py), ``out[b]``: the sum of the rows
    ``indices[offsets[b]:offsets[b + 1]]``, each times its weight if there are weights, without the row of
    padding; divided by how many they are for a mean.

    like, index: numbers of the types of tables and of indices. parts: int64 [any number, 3], a lookup, a
    part, and how many parts that lookup has. bounds: int64 [parts + lookups, 2], set to the smallest and
    the largest index of each part, and then of each lookup, 0 and -1 of none: nothing is done in a part where
    these are not rows of its table.

    Bytes moved: one row read for each index, one written for each bag.
    """
    for_each(team, pool_part, parts.shape[0], (like, index, lookups, parts, bounds))
    found = bounds[parts.shape[0] :]
    found[:, 0] = 0
    found[:, 1] = -1
    for k in range(parts.shape[0]):
        own = found[parts[k, 0]]
        own[0], own[1] = min(own[0], bounds[k, 0]), max(own[1], bounds[k, 1])


@helper
def pool_part(k, like, index, lookups, all_parts, bounds):
    """The share of part ``k`` in :func:`pool`."""
    lookup, part, parts = lookups[all_parts[k, 0]], all_parts[k, 1], all_parts[k, 2]
    dim, positions, padding = lookup[POOL_DIM], lookup[POOL_POSITIONS], lookup[POOL_PADDING]
    indices = view(lookup[POOL_INDICES], positions, index)
    weights = view(lookup[POOL_WEIGHTS], positions if lookup[POOL_WEIGHTS] else np.int64(0), like)
    start, stride = lookup[POOL_TABLE], dim * weights.itemsize
    offsets = view(lookup[POOL_OFFSETS], lookup[POOL_BAGS] + 1, np.int64(0))
    out, out_stride = lookup[POOL_OUT], lookup[POOL_OUT_STRIDE]
    zero, start_bag, end = np.int64(0), first_bag(offsets, part, parts), first_bag(offsets, part + 1, parts)
    low, high = zero, np.int64(-1)  # of no indices
    if offsets[end] > offsets[start_bag]:
        low, high = bounds_of(indices, offsets[start_bag], offsets[end])
    bounds[k, 0], bounds[k, 1] = low, high
    if low < 0 or high >= lookup[POOL_ROWS]:
        return
    # Wide rows are fetched before others are summed (see rows.update_part); narrow ones meanwhile, which
    # takes fewer instructions, and so are those of a long bag and the widest.
    at_once = BYTES_AT_ONCE // stride if stride >= WIDE else np.int64(0)
    until, fetched = start_bag, offsets[start_bag]
    while until < end:
        begin, until = until, bags_at_once(offsets, until, end, at_once)
        if padding < 0:
            last = offsets[until]
            ahead = np.int64(LOOKUPS_AHEAD if last - offsets[begin] > at_once else 0)
            if at_once:
                first, fetched = max(fetched, last) if ahead else fetched, min(last + at_once, offsets[end])
                prefetch_rows(start, stride, indices, zero, first, fetched)
            own, place = offsets[begin : until + 1], out + begin * out_stride
            sum_bags(start, stride, indices, zero, weights, own, positions, ahead, place, out_stride, dim)
            if not lookup[POOL_MEAN]:
                continue
        for bag in range(begin, until):
            total = view(out + bag * out_stride, dim, like)
            first, last = offsets[bag], offsets[bag + 1]
            count = last - first
            if padding >= 0:
                count = pool_without(padding, start, stride, indices, weights, first, last, total)
            if lookup[POOL_MEAN] and count > 1:
                divide_row(total, total.dtype.type(count))


@helper
def bags_at_once(offsets, begin, end, most):
    """Where the bags end that are summed together with bag ``begin``: if ``most`` is not 0, they have at most
    so many rows, or it is one."""
    until, end = begin + 1, min(end, begin + BAGS_PER_SUM)
    if most == 0:
        return end
    while until < end and offsets[until + 1] - offsets[begin] <= most:
        until += 1
    return until


@helper
def first_bag(offsets, part, parts):
    """Where part ``part`` of ``parts`` equal shares of the work begins: a bag costs about as much as one of
    its rows."""
    low, high = np.int64(0), np.int64(offsets.size - 1)
    wanted = part * (offsets[high] + high) // parts
    while low < high:
        middle = (low + high) // 2
        if offsets[middle] + middle < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@helper
def pool_without(padding, start, stride, indices, weights, first, last, total):
    """Sum the rows but for the row ``padding``; returns how many they are."""
    total[:] = 0
    count = 0
    for k in range(first, last):
        row = indices[k]
        if row != padding:
            count += 1
            values = view(start + row * stride, total.size, total.dtype.type(0))
            if weights.size:
                add_weighted_row(total, weights[k], values)
            else:
                add_row(total, values)
    return count


@restricted_helper
def divide_row(total, count):
    for d in range(total.size):
        total[d] /= count


@Kernel
def pool_max(team, table, indices, offsets, padding, out, winners):
    """``out[b]``: maximum of each element over the rows of bag ``b``, NaN if one is NaN, 0 for none;
    ``winners``: the position that it comes from, the first of equal ones, -1 for none."""
    chunks = chunk_count(out.shape[0], BAGS_PER_CHUNK)
    for_each(team, pool_max_bags, chunks, (table, indices, offsets, padding, out, winners))


@helper
def pool_max_bags(chunk, table, indices, offsets, padding, out, winners):
    first, last = chunk_ends(chunk, BAGS_PER_CHUNK, out.shape[0])
    for bag in range(first, last):
        pool_max_bag(table, indices, offsets[bag], offsets[bag + 1], padding, out[bag], winners[bag])


@helper
def pool_max_bag(table, indices, first, last, padding, best, winners):
    best[:] = 0
    winners[:] = -1
    for k in range(first, last):
        row = indices[k]
        if row == padding:
            continue
        for d in range(best.size):
            x = table[row, d]
            if winners[d] < 0 or x > best[d] or (x != x and best[d] == best[d]):
                best[d] = x
                winners[d] = k


@Kernel
def bags_of_positions(team, offsets, indices, padding, mean, bags, scales):
    """``bags[k]``: the bag of position ``k``; for ``mean``, ``scales[k]`` is times 1 / how many rows the
    bag has, the row ``padding`` not counted."""
    chunks = chunk_count(offsets.size - 1, BAGS_PER_CHUNK)
    for_each(team, fill_bags, chunks, (offsets, indices, padding, mean, bags, scales))


@helper
def fill_bags(chunk, offsets, indices, padding, mean, bags, scales):
    first, last = chunk_ends(chunk, BAGS_PER_CHUNK, offsets.size - 1)
    for bag in range(first, last):
        fill_bag(offsets[bag], offsets[bag + 1], bag, indices, padding, mean, bags, scales)


@helper
def fill_bag(first, last, bag, indices, padding, mean, bags, scales):
    for k in range(first, last):
        bags[k] = bag
    if mean:
        members = 0
        for k in range(first, last):
            members += indices[k] != padding
        if members > 1:
            for k in range(first, last):
                scales[k] /= scales.dtype.type(members)


@Kernel
def take(team, values, order, first_position, out):
    """``out[j] = values[order[j] - first_position]``, for 1-D arrays."""
    chunks = chunk_count(out.size, POSITIONS_PER_CHUNK)
    for_each(team, take_chunk, chunks, (values, order, first_position, out))


@helper
def take_chunk(chunk, values, order, first_position, out):
    first, last = chunk_ends(chunk, POSITIONS_PER_CHUNK, out.size)
    for j in range(first, last):
        out[np.uint64(j)] = values[np.uint64(order[j] - first_position)]  # none counts from the end


@Kernel
def won_rows(team, values, bags, winners, out):
    """``out[k]``: those elements of ``values[bags[k]]`` whose ``winners[bags[k]]`` are ``k``, and zeros
    elsewhere."""
    chunks = chunk_count(bags.size, ROWS_PER_CHUNK)
    for_each(team, won_chunk, chunks, (values, bags, winners, out))


@helper
def won_chunk(chunk, values, bags, winners, out):
    first, last = chunk_ends(chunk, ROWS_PER_CHUNK, bags.size)
    for k in range(first, last):
        won_row(values[bags[k]], winners[bags[k]], k, out[k])


@restricted_helper
def won_row(values, winners, position, out):
    for d in range(out.size):
        out[d] = values[d] if winners[d] == position else values.dtype.type(0)


@Kernel
def dots(team, table, indices, bags, scales, padding, grad_output, out):
    """``out[k]``: ``scales[k]`` (1 if it is empty) times the product of row ``indices[k]`` with
    ``grad_output[bags[k]]``; 0 for the row ``padding``."""
    chunks = chunk_count(out.size, ROWS_PER_CHUNK)
    for_each(team, dots_chunk, chunks, (table, indices, bags, scales, padding, grad_output, out))


@helper
def dots_chunk(chunk, table, indices, bags, scales, padding, grad_output, out):
    first, last = chunk_ends(chunk, ROWS_PER_CHUNK, out.size)
    stride = table.shape[1] * table.itemsize
    start = table.ctypes.data
    for k in range(first, last):
        if k + AHEAD < last:
            prefetch(start + np.int64(indices[k + AHEAD]) * stride, stride)
        product = out.dtype.type(0)
        if indices[k] != padding:
            product = dot(table[indices[k]], grad_output[bags[k]])
            if scales.size:
                product *= scales[k]
        out[k] = product


@helper
def dot(a, b):
    """Product of two rows, in four interleaved sums, a fixed order."""
    zero = a.dtype.type(0)
    sums = zero, zero, zero, zero
    whole = a.size - a.size % 4
    for d in range(0, whole, 4):
        sums = (
            sums[0] + a[d] * b[d],
            sums[1] + a[d + 1] * b[d + 1],
            sums[2] + a[d + 2] * b[d + 2],
            sums[3] + a[d + 3] * b[d + 3],
        )
    total = (sums[0] + sums[1]) + (sums[2] + sums[3])
    for d in range(whole, a.size):
        total += a[d] * b[d]
    return total


@Kernel
def limit_norms(team, table, rows, max_norm):
    """Scale those of the different ``rows`` whose norm is above ``max_norm``
    to that norm: by ``max_norm / (norm + 1e-7)``, as torch's ``embedding_renorm_``."""
    chunks = chunk_count(rows.size, ROWS_PER_CHUNK)
    for_each(team, limit_chunk, chunks, (table, rows, max_norm))


@helper
def limit_chunk(chunk, table, rows, max_norm):
    first, last = chunk_ends(chunk, ROWS_PER_CHUNK, rows.size)
    for k in range(first, last):
        limit_norm(table[rows[k]], max_norm)


@helper
def limit_norm(row, max_norm):
    norm, unit = magnitude(row)
    if norm * unit > max_norm:
        scale = row.dtype.type(max_norm / unit / (norm + 1e-7 / unit))
        for d in range(row.size):
            row[d] *= scale
