"""Several sparse gradients of one table in a step: added up before the one update."""

import ml_dtypes
import numpy as np
import pytest
from devices import ALL
from exercises.gradient import RowRange

import fastopt
from fastopt import BagGradient, IndexedSlices

ROWS, DIM = 24, 5
PADDING = 3


@pytest.fixture(params=ALL)
def device(request):
    return request.param()


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def table_of(rng, dtype=np.float32):
    return rng.standard_normal((ROWS, DIM)).astype(dtype)


def slices(rng, count, dtype=np.float32, integer=np.int64, put=np.asarray):
    values = rng.standard_normal((count, DIM)).astype(dtype)
    return IndexedSlices(put(rng.integers(0, ROWS, count).astype(integer)), put(values))


def bags(rng, mode, padding=None, weights=False, dtype=np.float32, put=np.asarray):
    """Gradients of four bags, the second of which is empty and the third of one row."""
    indices, offsets = rng.integers(0, ROWS, 17), np.array([0, 6, 6, 7])
    if padding is not None:
        indices[[2, 6, 9]] = padding
    factors = put(rng.standard_normal(17).astype(dtype)) if weights else None
    output = put(rng.standard_normal((4, DIM)).astype(dtype))
    return BagGradient(put(indices), put(offsets), output, mode, factors, padding_idx=padding)


def concatenated(*gradients):
    """One gradient of all these slices of NumPy."""
    flat = [(np.reshape(own.indices, -1), np.reshape(own.values, (-1, DIM))) for own in gradients]
    return IndexedSlices(*(np.concatenate(arrays) for arrays in zip(*flat, strict=True)))


def by_position(gradient, table, get):
    """Each row that a gradient names, with what it gets, in float64: from the definitions."""
    indices = get(gradient.indices)
    if isinstance(gradient, IndexedSlices):
        return list(zip(indices, get(gradient.values).astype(np.float64), strict=True))
    offsets, output = get(gradient.offsets), get(gradient.grad_output).astype(np.float64)
    found = []
    for b, (first, last) in enumerate(zip(offsets, [*offsets[1:], indices.size], strict=True)):
        members = [k for k in range(first, last) if indices[k] != gradient.padding_idx]
        for k in members:
            own = output[b].copy()
            if gradient.mode == "max":
                winners = np.array(members)[table[indices[members]].argmax(axis=0)]
                own[winners != k] = 0
            if gradient.mode == "mean":
                own /= len(members)
            if gradient.per_sample_weights is not None:
                own *= get(gradient.per_sample_weights)[k]
            found.append((indices[k], own))
    return found


def row_sums(gradients, table, get=np.asarray):
    """The rows that gradients name and the sum that each gets."""
    sums = {}
    for gradient in gradients:
        for row, own in by_position(gradient, table, get):
            sums[row] = sums.get(row, 0) + own
    return np.array(sorted(sums)), np.array([sums[row] for row in sorted(sums)])


OPTIONS = {
    "plain": {},
    "dense rows": {"rows": "dense"},
    "own steps": {"step_per_row": True},
    "clipped rows": {"clip_row_norm": 0.5},
    "8bit": {"state_dtype": "8bit"},
}
STEPS = {
    "plain": {},
    "clipped": {"clip_norm": 0.3, "grad_scale": 0.5, "clip_value": 0.02},
    "finite": {"skip_nonfinite": True, "zero_grads": True},
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("options", OPTIONS)
def test_slices_are_those_of_one_gradient_to_the_bit(rng, options, step):
    table = table_of(rng)
    other = table.copy()
    listed, single = (fastopt.Adam([own], lr=0.1, **OPTIONS[options]) for own in (table, other))
    for _ in range(3):
        own = [slices(rng, 40), slices(rng, 1, integer=np.int32), slices(rng, 0), slices(rng, 90)]
        expected = single.step([concatenated(*own)], **STEPS[step])
        assert listed.step([own], **STEPS[step]) == expected
        assert all((gradient.values == 0).all() == ("zero_grads" in STEPS[step]) for gradient in own[::3])
    listed.flush()
    single.flush()
    np.testing.assert_array_equal(table, other)


KINDS = {
    "slices and bags": lambda rng, put: [slices(rng, 20, put=put), bags(rng, "sum", put=put)],
    "weights": lambda rng, put: [bags(rng, "mean", weights=True, put=put), slices(rng, 9, put=put)],
    "mean and sum": lambda rng, put: [bags(rng, "mean", put=put), bags(rng, "sum", put=put)],
    "maxima": lambda rng, put: [bags(rng, "max", put=put), bags(rng, "max", PADDING, put=put)],
    "maxima and others": lambda rng, put: [
        slices(rng, 9, put=put),
        bags(rng, "max", PADDING, put=put),
        bags(rng, "sum", 4, True, put=put),
    ],
    "indices of both widths": lambda rng, put: [
        slices(rng, 20, integer=np.int32, put=put),
        bags(rng, "sum", 2, put=put),
        slices(rng, 20, put=put),
    ],
    "paddings": lambda rng, put: [bags(rng, "sum", PADDING, put=put), bags(rng, "mean", 5, put=put)],
    "a row that is padding of one": lambda rng, put: [
        bags(rng, "sum", PADDING, put=put),
        IndexedSlices(put(np.array([PADDING, 1])), put(np.ones((2, DIM), np.float32))),
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_gradients_are_added_up(device, rng, kind):
    """Rows that none names, and those that only paddings do, stay as they are."""
    values = table_of(rng)
    table = device.put(values)
    own = KINDS[kind](rng, device.put)
    rows, sums = row_sums(own, values, device.get)
    expected = values.copy()
    fastopt.AdamW(expected, lr=0.1).step(IndexedSlices(rows, sums.astype(np.float32)), clip_norm=1.0)
    info = fastopt.AdamW(table, lr=0.1).step(own, clip_norm=1.0)
    assert info.norm == pytest.approx(np.linalg.norm(sums), rel=1e-6)
    found = device.get(table)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    changed = (found != values).any(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(changed), rows)


def test_padding_of_all_gets_no_update(rng):
    values = table_of(rng)
    table = values.copy()
    own = [bags(rng, "sum", PADDING), bags(rng, "max", PADDING)]
    fastopt.AdamW(table, lr=0.1).step(own)
    np.testing.assert_array_equal(table[PADDING], values[PADDING])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_gradients_of_16_bits_beside_those_of_float32(rng, dtype):
    table = table_of(rng, dtype)
    other = table.copy()
    own = [slices(rng, 40, dtype), slices(rng, 30)]
    wide = IndexedSlices(own[0].indices, own[0].values.astype(np.float32))
    fastopt.Adam(other, lr=0.1).step(concatenated(wide, own[1]))
    fastopt.Adam(table, lr=0.1).step(own, zero_grads=True)
    np.testing.assert_array_equal(table, other)
    for one in own:
        assert not one.values.astype(np.float32).any()


def test_plans_serve_as_indices(rng):
    table = table_of(rng)
    other = table.copy()
    own = [slices(rng, 40), slices(rng, 30, integer=np.int32)]
    planned = [IndexedSlices(fastopt.IndexPlan(one.indices, ROWS), one.values) for one in own]
    fastopt.Adam(table).step(planned)
    fastopt.Adam(other).step(concatenated(*own))
    np.testing.assert_array_equal(table, other)


def test_tables_in_files(rng, tmp_path):
    values = table_of(rng)
    own = [slices(rng, 40), slices(rng, 30)]
    expected = values.copy()
    fastopt.Adam(expected, lr=0.1).step(concatenated(*own))
    with fastopt.open_table(tmp_path / "t", ROWS, DIM, init=lambda first, last: values[first:last]) as table:
        opt = fastopt.Adam(table, lr=0.1)
        opt.step(own)
        opt.flush()
    with fastopt.open_table(tmp_path / "t", ROWS, DIM) as table:
        np.testing.assert_array_equal(fastopt.embedding(table, np.arange(ROWS)), expected)


def test_missed_steps_come_before_maxima(rng):
    """A maximum goes to the row that is the largest when it is up to date."""
    values = table_of(rng)
    tables = [values.copy(), values.copy()]
    listed, single = (fastopt.SGD(table, lr=0.1, momentum=0.9, rows="dense") for table in tables)
    for opt in (listed, single):
        for _ in range(4):
            opt.step(IndexedSlices(np.array([0]), np.full((1, DIM), -9, np.float32)))
            opt.step(IndexedSlices(np.array([1]), np.zeros((1, DIM), np.float32)))
    own = BagGradient(np.array([0, 1, 2]), np.array([0]), np.ones((1, DIM), np.float32), "max")
    listed.step([own, IndexedSlices(np.array([2]), np.zeros((1, DIM), np.float32))])
    single.step(own)
    for opt in (listed, single):
        opt.flush()
    np.testing.assert_array_equal(*tables)


def test_lists_of_gradients_without_rows_change_nothing(rng):
    table = table_of(rng)
    before, opt = table.copy(), fastopt.Adam(table)
    empty = BagGradient(
        np.zeros(0, int), np.zeros(0, int), np.zeros((0, DIM), np.float32), "max", padding_idx=1
    )
    info = opt.step([slices(rng, 0), empty, slices(rng, 0, integer=np.int32)], norm=True)
    assert info.norm == 0 and opt.steps == 1
    np.testing.assert_array_equal(table, before)


def test_indices_of_any_shape_and_kinds_of_users(rng):
    table = table_of(rng)
    other = table.copy()
    values = rng.standard_normal((2, 3, DIM)).astype(np.float32)
    several = IndexedSlices(rng.integers(0, ROWS, (2, 3)), values)
    following = RowRange(4, rng.standard_normal((6, DIM)).astype(np.float32))
    fastopt.Adam(table).step(several + following)
    fastopt.Adam(other).step(concatenated(several, IndexedSlices(np.arange(4, 10), following.values)))
    np.testing.assert_array_equal(table, other)


def test_torch_is_told_of_all_that_is_written(rng):
    torch = pytest.importorskip("torch")
    table = torch.zeros(ROWS, DIM)
    own = [IndexedSlices(torch.tensor([1, 1]), torch.ones(2, DIM)) for _ in range(2)]
    tensors = [table, *(one.values for one in own)]
    versions = [tensor._version for tensor in tensors]
    fastopt.SGD(table, lr=1.0).step(own)
    assert [tensor._version for tensor in tensors] == [versions[0] + 1, *versions[1:]]
    fastopt.SGD(table, lr=1.0).step(own, zero_grads=True)
    assert [tensor._version for tensor in tensors] == [versions[0] + 2, versions[1] + 1, versions[2] + 1]
    assert table[1].tolist() == [-8.0] * DIM and not tensors[1].any() and not tensors[2].any()


# Structures


def pair(rng):
    return slices(rng, 9), slices(rng, 12)


def test_a_list_stands_where_the_gradient_of_a_parameter_does(rng):
    a, b = pair(rng)
    values, zeros = table_of(rng), np.zeros(4, np.float32)
    expected = values.copy()
    fastopt.Adam(expected).step(concatenated(a, b))

    def groups(*containers):
        return [{"params": container} for container in containers]

    for params, grads in (
        (lambda t, z: t, [a, b]),
        (lambda t, z: t, (a, b)),
        (lambda t, z: t, a + b),
        (lambda t, z: [z, t], [None, (a, b)]),
        (lambda t, z: {"z": z, "t": t}, {"t": [a, b], "z": zeros}),
        (lambda t, z: groups(t, z), [[a, b], None]),
        (lambda t, z: groups([t], [z]), [[[a, b]], [None]]),
        (lambda t, z: groups(t, z), [{"params": [a, b]}, zeros]),
        (lambda t, z: groups({"t": t}, {"z": z}), {"z": None, "t": [a, b]}),
        (lambda t, z: groups([z, t]), [None, [a, b]]),
    ):
        table = values.copy()
        fastopt.Adam(params(table, zeros.copy())).step(grads)
        np.testing.assert_array_equal(table, expected)


def test_what_the_caller_passed_stays_as_it_is(rng):
    a, b = pair(rng)
    grads = [[a, b], None]
    fastopt.Adam([table_of(rng), table_of(rng)]).step(grads)
    assert grads == [[a, b], None]


def test_one_gradient_in_a_list_is_that_gradient(rng):
    for own in (slices(rng, 9), bags(rng, "max", PADDING)):
        values = table_of(rng)
        tables = [values.copy(), values.copy()]
        fastopt.Adam(tables[0]).step([own])
        fastopt.Adam(tables[1]).step(own)
        np.testing.assert_array_equal(*tables)


def test_sums_of_sums_are_flat(rng):
    a, b, c = slices(rng, 4), slices(rng, 5), slices(rng, 6)
    for total in ((a + b) + c, a + (b + c)):
        assert isinstance(total, fastopt.SumOfGradients) and isinstance(total, fastopt.SparseGradient)
        assert list(total.gradients) == [a, b, c] and total[2] is c and len(total) == 3
    tables = [np.zeros((ROWS, DIM), np.float32) for _ in range(2)]
    fastopt.SGD(tables[0]).step([a + b, c])
    fastopt.SGD(tables[1]).step(concatenated(a, b, c))
    np.testing.assert_array_equal(*tables)


def test_a_sum_takes_nothing_else(rng):
    own = slices(rng, 3)
    with pytest.raises(TypeError, match="unsupported operand"):
        own + np.zeros(3)
    with pytest.raises(TypeError, match=r"gradients\[1\] is a ndarray: expected a sparse gradient"):
        fastopt.SumOfGradients([own, np.zeros(3)])
    with pytest.raises(ValueError, match="gradients is empty: expected at least one sparse gradient"):
        fastopt.SumOfGradients([])


def test_steps_name_what_does_not_fit_and_change_nothing(rng):
    a, _ = pair(rng)
    params = [table_of(rng), np.zeros(4, np.float32)]
    before = [array.copy() for array in params]
    opt = fastopt.Adam(params)
    dense = np.ones((ROWS, DIM), np.float32)
    far, other = IndexedSlices(np.array([ROWS]), np.ones((1, DIM), np.float32)), slices(rng, 3, np.float64)
    for grads, error, message in (
        ([[a, dense], None], TypeError, r"grads\[0\]\[1\] is a ndarray: expected a sparse gradient"),
        ([[a, None], None], TypeError, r"grads\[0\]\[1\] is a NoneType: expected a sparse gradient"),
        ([[a, [a]], None], TypeError, r"grads\[0\]\[1\] is a list: expected a sparse gradient"),
        ([[], None], ValueError, r"grads\[0\] is empty: expected at least one sparse gradient, or None"),
        ([[a, far], None], ValueError, rf"grads\[0\]\[1\].indices holds {ROWS}"),
        ([[a, other], None], TypeError, r"grads\[0\]\[1\].values has dtype float64"),
        ([a + far, None], ValueError, rf"grads\[0\]\[1\].indices holds {ROWS}"),
        ([[a + far, a], None], ValueError, rf"grads\[0\]\[0\]\[1\].indices holds {ROWS}"),
        ([a, [a, a]], ValueError, r"grads\[1\]\[0\] is IndexedSlices but .* expected a 2-D parameter"),
        ([a, a, a], ValueError, "grads is a list of 3: expected a list of 2"),
    ):
        with pytest.raises(error, match=message):
            opt.step(grads)
    with pytest.raises(ValueError, match="grads is a list of 2: expected one array, as params is one"):
        fastopt.Adam(table_of(rng)).step([a, dense])
    with pytest.raises(ValueError, match="grads is a list of 0: expected one array, as params is one"):
        fastopt.Adam(table_of(rng)).step([])
    with pytest.raises(TypeError, match="SumOfGradients: Adafactor has means over columns"):
        fastopt.Adafactor(table_of(rng)).step(a + a)
    assert opt.steps == 0
    for array, old in zip(params, before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_values_that_are_cleared_are_apart_and_writeable(rng):
    a, b = pair(rng)
    opt = fastopt.Adam([table_of(rng)])
    with pytest.raises(ValueError, match=r"grads\[0\]\[1\].values shares memory with grads\[0\]\[0\].values"):
        opt.step([[a, IndexedSlices(a.indices, a.values)]], zero_grads=True)
    opt.step([[a, IndexedSlices(a.indices, a.values)]])  # read alone they may
    b.values.flags.writeable = False
    with pytest.raises(ValueError, match=r"grads\[0\]\[1\].values is read-only: .* set to zero"):
        opt.step([[a, b]], zero_grads=True)
    assert opt.steps == 1


def test_a_gradient_that_is_not_finite_is_found_in_any_of_them(rng):
    table = {"t": table_of(rng), "u": table_of(rng)}
    opt = fastopt.Adam(table)
    a, b, c = slices(rng, 4), slices(rng, 5), bags(rng, "sum")
    c.grad_output[1] = np.nan  # of an empty bag
    assert not opt.step({"t": a, "u": [b, c]}, skip_nonfinite=True).skipped
    c.grad_output[3, 2] = np.inf
    info = opt.step({"t": a, "u": [b, c]}, skip_nonfinite=True)
    assert info.skipped and info.nonfinite == "u" and opt.steps == 1


# Norms


def test_norms_count_rows_of_several_gradients_as_their_sum(device, rng):
    put = device.put
    own = [slices(rng, 30, put=put), bags(rng, "mean", PADDING, True, put=put), slices(rng, 4, put=put)]
    table = table_of(rng)
    _, sums = row_sums(own, table, device.get)
    total = own[0] + own[1] + own[2]
    assert fastopt.grad_norm({"t": total, "none": None}) == pytest.approx(np.linalg.norm(sums), rel=1e-6)
    before = device.get(own[0].values), device.get(own[1].grad_output)
    norm = fastopt.clip_grad_norm([total], 0.5)
    assert norm == pytest.approx(np.linalg.norm(sums), rel=1e-6)
    assert fastopt.grad_norm(total) == pytest.approx(0.5, rel=1e-5)
    factor = np.float32(0.5 / (norm + 1e-6))
    for array, old in zip((own[0].values, own[1].grad_output), before, strict=True):
        np.testing.assert_array_equal(device.get(array), old * factor)


def test_lists_are_those_of_as_many_parameters_for_norms(rng):
    a, b = pair(rng)
    norms = [fastopt.grad_norm(own) for own in (a, b)]
    assert fastopt.grad_norm([a, b]) == pytest.approx(np.hypot(*norms), rel=1e-12)
    assert fastopt.grad_norm(a + b) != pytest.approx(np.hypot(*norms), rel=1e-4)


def test_sums_that_can_not_be_clipped_are_refused(rng):
    a, b = pair(rng)
    before = a.values.copy()
    with pytest.raises(ValueError, match=r"grads\[0\].values belongs to a sum of gradients, .* step\(clip_"):
        fastopt.clip_grad_value(a + b, 0.1)
    with pytest.raises(ValueError, match=r"grads\[1\].mode is 'max'"):
        fastopt.grad_norm(a + bags(rng, "max"))
    for other, error, message in (
        (slices(rng, 3, np.float64), TypeError, r"grads\[1\].values has dtype float64 but grads\[0\].values"),
        (
            IndexedSlices(np.array([1]), np.ones((1, DIM + 1), np.float32)),
            ValueError,
            r"grads\[1\].values has rows of 6 but grads\[0\].values of 5",
        ),
    ):
        with pytest.raises(error, match=message):
            fastopt.clip_grad_norm(a + other, 0.1)
    np.testing.assert_array_equal(a.values, before)
