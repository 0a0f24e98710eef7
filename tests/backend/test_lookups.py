"""Reading rows: alone, in bags, and what the gradients of bags need."""

from itertools import pairwise

import numpy as np
import pytest
from backend.launches import BFLOAT, HALF, SINGLE, assert_same, segments

from fastopt.kernels.work import PooledLookup


@pytest.mark.covers("widen")
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
def test_all_numbers_of_16_bits_are_widened(device, dtype):
    array = np.arange(2**16, dtype=np.uint16).view(dtype).reshape(256, 256)
    with np.errstate(invalid="ignore"):
        expected = array.astype(np.float32)
    got = device.get(device.backend.widen(device.put(array)))
    assert_same([got], [expected])
    numbers = ~np.isnan(expected)  # whose signs mean something
    np.testing.assert_array_equal(np.signbit(got[numbers]), np.signbit(expected[numbers]))
    assert device.get(device.backend.widen(device.put(array[:0]))).shape == (0, 256)


@pytest.mark.covers("widen")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_wider_numbers_stay_as_they_are(device, rng, dtype):
    array = rng.normal(size=(3, 4)).astype(dtype)
    assert_same([device.get(device.backend.widen(device.put(array)))], [array])


@pytest.mark.covers("gather")
@pytest.mark.parametrize(
    ("dtype", "integer"),
    [(SINGLE, np.int64), (SINGLE, np.int32), (HALF, np.int64), (BFLOAT, np.int64)],
    ids=str,
)
def test_rows_are_gathered(device, rng, dtype, integer):
    table = rng.normal(size=(50, 7)).astype(dtype)
    for size in (0, 1, 700):
        indices = rng.integers(0, 50, size).astype(integer)
        got = device.get(device.backend.gather(device.put(table), device.put(indices)))
        assert_same([got], [table[indices]])


class Bagged:
    """A table and bags of its rows, some of them empty, one of the padding alone; more than one chunk."""

    padding = 3

    def __init__(self, rng, dim):
        self.table = rng.normal(size=(30, dim)).astype(np.float32)
        sizes = [2, 0, 1, 1, 40, 0, *rng.integers(0, 6, 90)]
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        self.indices = rng.integers(0, 30, self.offsets[-1])
        self.indices[2], self.indices[3] = self.padding, 5
        self.weights = rng.normal(size=self.indices.size).astype(np.float32)

    def bags(self, padding):
        """The positions of each bag, but for the padding."""
        for begin, end in pairwise(self.offsets):
            yield [k for k in range(begin, end) if self.indices[k] != padding]

    def put(self, device):
        return device.put(self.table), device.put(self.indices), device.put(self.offsets)


@pytest.mark.covers("pool")
@pytest.mark.parametrize("dim", [1, 6, 77])
@pytest.mark.parametrize("padding", [-1, Bagged.padding])
def test_bags_are_pooled(device, rng, dim, padding):
    bagged = Bagged(rng, dim)
    given = bagged.put(device)
    for mean in (False, True):
        for weights in (None, bagged.weights):
            expected = np.zeros((bagged.offsets.size - 1, dim), np.float32)
            for total, positions in zip(expected, bagged.bags(padding), strict=True):
                for k in positions:  # in their order
                    row = bagged.table[bagged.indices[k]]
                    total += row if weights is None else weights[k] * row
                if mean:
                    total /= np.float32(max(len(positions), 1))
            on_device = None if weights is None else device.put(weights)
            out = device.backend.empty(expected.shape, np.float32)
            device.backend.pool([PooledLookup(*given, on_device, mean, padding, out)])
            assert_same([device.get(out)], [expected])


@pytest.mark.covers("pool_max")
@pytest.mark.parametrize("padding", [-1, Bagged.padding])
def test_maxima_of_bags_and_where_they_come_from(device, rng, padding):
    bagged = Bagged(rng, 6)
    bagged.table[7:20, 0] = 0.5  # the first of equal ones counts
    bagged.table[20, 1] = np.nan  # which is taken over
    bagged.table[:, 2] = -np.inf
    largest = np.zeros((bagged.offsets.size - 1, 6), np.float32)
    winners = np.full(largest.shape, -1, np.int32)
    for b, positions in enumerate(bagged.bags(padding)):
        if positions:
            values = bagged.table[bagged.indices[positions]]
            largest[b] = values.max(axis=0)
            winners[b] = np.array(positions)[values.argmax(axis=0)]  # NaN is the largest to it
    assert np.isnan(largest).any() and (winners == -1).any()
    got = device.backend.pool_max(*bagged.put(device), padding)
    assert_same([device.get(array) for array in got], [largest, winners])


@pytest.mark.covers("bags_of_positions")
@pytest.mark.parametrize("padding", [-1, Bagged.padding])
def test_positions_know_their_bags_and_scales(device, rng, padding):
    bagged = Bagged(rng, 1)
    _, indices, offsets = bagged.put(device)
    of = np.repeat(np.arange(bagged.offsets.size - 1), np.diff(bagged.offsets)).astype(np.int32)
    backend = device.backend
    assert_same([device.get(backend.bags_of_positions(offsets, indices, None, False, padding))], [of])
    scales = device.put(bagged.weights)
    assert_same([device.get(backend.bags_of_positions(offsets, indices, scales, False, padding))], [of])
    assert_same([device.get(scales)], [bagged.weights])
    assert_same([device.get(backend.bags_of_positions(offsets, indices, scales, True, padding))], [of])
    members = np.array([len(positions) for positions in bagged.bags(padding)], np.float32)
    assert_same([device.get(scales)], [bagged.weights / np.maximum(members, 1)[of]])


@pytest.mark.covers("take", "segments_of")
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_values_are_taken_in_the_order_of_segments(device, rng, dtype):
    parts = [rng.integers(0, 9, 500), rng.integers(0, 40, 300)]
    found = device.backend.segments_of(
        [(device.put(part), rows) for part, rows in zip(parts, (9, 40), strict=True)]
    )
    for part, own in zip(parts, found, strict=True):
        values = (1000 * rng.normal(size=part.size)).astype(dtype)
        got = device.get(device.backend.take(device.put(values), own))
        assert_same([got], [values[np.argsort(part, kind="stable")]])
    none = device.backend.take(device.put(np.empty(0, dtype)), segments(device, [], 9))
    assert device.get(none).shape == (0,)


@pytest.mark.covers("row_products")
@pytest.mark.parametrize("padding", [-1, Bagged.padding])
def test_rows_are_multiplied_by_gradients_of_their_bags(device, rng, padding):
    bagged = Bagged(rng, 11)
    of = np.repeat(np.arange(bagged.offsets.size - 1), np.diff(bagged.offsets)).astype(np.int32)
    gradient = rng.integers(-50, 50, (bagged.offsets.size - 1, 11)).astype(np.float32)
    bagged.table = rng.integers(-50, 50, bagged.table.shape).astype(np.float32)  # whose products are exact
    expected = (bagged.table[bagged.indices] * gradient[of]).sum(axis=1)
    expected[bagged.indices == padding] = 0
    table, indices, _ = bagged.put(device)
    for scales in (None, bagged.weights):
        on_device = None if scales is None else device.put(scales)
        got = device.backend.row_products(
            table, indices, device.put(of), on_device, padding, device.put(gradient)
        )
        assert_same([device.get(got)], [expected if scales is None else expected * scales])


@pytest.mark.covers("limit_norms")
def test_rows_of_a_large_norm_are_scaled_down(device):
    table = np.array([[3, 4], [6, 8], [0, 0], [30, 40], [np.nan, 100]], np.float32)
    placed = device.put(table)
    assert device.backend.limit_norms(placed, segments(device, [0, 1, 2, 4], 5), 5.0) is None
    expected = table.copy()  # row 0 is at the limit, row 3 is not named, row 4 has no norm
    expected[1] *= np.float32(5.0 / (10.0 + 1e-7))
    assert_same([device.get(placed)], [expected])
    device.backend.limit_norms(placed, segments(device, [3], 5), 0.0)
    assert not device.get(placed)[3].any()


@pytest.mark.covers("shift")
def test_numbers_are_shifted_in_place(device):
    for size in (0, 1, 700):
        numbers = np.arange(size, dtype=np.int32)
        placed = device.put(np.concatenate([numbers, numbers]))
        assert device.backend.shift(placed[size:], 12_345) is None
        assert_same([device.get(placed)], [np.concatenate([numbers, numbers + np.int32(12_345)])])


@pytest.mark.covers("without", "segments_of", "take")
@pytest.mark.parametrize("integer", [np.int32, np.int64])
def test_a_row_is_left_out_with_what_belongs_to_it(device, rng, integer):
    """Of all others the rows, their order and their values stay."""
    for size in (0, 1, 700):
        indices = rng.integers(0, 5, size).astype(integer)
        values = np.arange(size, dtype=np.float32)
        placed = device.put(indices)
        own, none, taken = device.backend.without(placed, 3, None, device.put(values))
        assert none is None
        assert_same([device.get(placed)], [indices])
        [found] = device.backend.segments_of([(own, 5)])
        expected, order = np.unique(indices[indices != 3]), np.argsort(indices, kind="stable")
        assert_same([device.get(device.backend.distinct_rows(found))], [expected.astype(np.int64)])
        in_order = device.get(device.backend.take(taken, found))
        in_order = in_order[np.isin(in_order, values[indices != 3])]
        assert_same([in_order], [values[order][indices[order] != 3]])


@pytest.mark.covers("won_rows")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_elements_go_to_the_positions_that_won_them(device, rng, dtype):
    for positions, bags, dim in ((0, 3, 4), (5, 1, 1), (700, 90, 7), (3, 2, 0)):
        values = rng.normal(size=(bags, dim)).astype(dtype)
        of = np.sort(rng.integers(0, bags, positions)).astype(np.int32)
        winners = np.full((bags, dim), -1, np.int32)
        for b in range(bags):
            own = np.flatnonzero(of == b)
            if own.size:
                winners[b] = rng.choice(own, dim)
        expected = np.where(winners[of] == np.arange(positions)[:, None], values[of], 0).astype(dtype)
        out = device.put(np.full((positions + 1, dim), 9, dtype))
        given = device.put(values), device.put(of), device.put(winners), out[1:]
        assert device.backend.won_rows(*given) is None
        assert_same([device.get(out)], [np.concatenate([np.full((1, dim), 9, dtype), expected])])
