"""What is read from the headers of arrays in memory is what Python says of them."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastopt.kernels.cpu import headers
from fastopt.kernels.cpu.headers import UNKNOWN, Headers, Identities

torch = pytest.importorskip("torch")

SINGLE, DOUBLE, HALF = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# of what NumPy deprecates, and still allows
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")

SEEDS = st.integers(0, 2**32 - 1)


class Subclass(np.ndarray):
    pass


class Pretender:
    """Says that it is as expected, without being an array."""

    dtype, shape, ndim, flags = SINGLE, (2, 3), 2, np.zeros((2, 3), SINGLE).flags
    __array_interface__ = np.zeros((2, 3), SINGLE).__array_interface__


def read_only(array):
    array.flags.writeable = False
    return array


def misaligned(count, dtype=SINGLE):
    return np.zeros(count * dtype.itemsize + 1, np.uint8)[1:].view(dtype)


def odd_values(tmp_path):
    """(value, dtype, shape, taken as a parameter, taken as a gradient)."""
    base = np.arange(24, dtype=SINGLE)
    resized = np.zeros(4, SINGLE)
    resized.resize((2, 3), refcheck=False)
    reshaped = np.zeros(6, SINGLE)
    reshaped.shape = (2, 3)
    mapped = np.memmap(tmp_path / "mapped", SINGLE, "w+", shape=(2, 3))
    plain_map = np.asarray(np.memmap(tmp_path / "plain", SINGLE, "w+", shape=(2, 3)))
    swapped = np.zeros((2, 3), SINGLE.newbyteorder())
    yes, no, gradient_only = (True, True), (False, False), (False, True)
    return [
        (np.zeros((2, 3), SINGLE), SINGLE, (2, 3), *yes),
        (np.zeros((2, 3), HALF), HALF, (2, 3), *yes),
        (np.zeros((2, 3), BFLOAT16), BFLOAT16, (2, 3), *yes),
        (np.zeros((2, 3), np.uint16), BFLOAT16, (2, 3), *no),
        (np.zeros((), DOUBLE), DOUBLE, (), *yes),
        (np.zeros((1,), DOUBLE), DOUBLE, (), *no),
        (np.zeros((), DOUBLE), DOUBLE, (1,), *no),
        (np.float64(3.0), DOUBLE, (), *no),
        (np.zeros((0,), SINGLE), SINGLE, (0,), *yes),
        (np.zeros((0, 4), SINGLE), SINGLE, (0, 4), *yes),
        (np.zeros((4, 0), SINGLE), SINGLE, (0, 4), *no),
        (np.zeros((1, 2, 3, 4, 5), SINGLE), SINGLE, (1, 2, 3, 4, 5), *yes),
        (np.zeros((1, 2, 3, 4, 6), SINGLE), SINGLE, (1, 2, 3, 4, 5), *no),
        (np.zeros((1,) * 30, HALF), HALF, (1,) * 30, *yes),
        (np.zeros((3, 2), SINGLE), SINGLE, (2, 3), *no),
        (np.zeros(6, SINGLE), SINGLE, (2, 3), *no),
        (np.zeros((2, 3), SINGLE, order="F"), SINGLE, (2, 3), *no),
        (np.zeros((1, 3), SINGLE, order="F"), SINGLE, (1, 3), *yes),
        (np.zeros((3, 2), SINGLE).T, SINGLE, (2, 3), *no),
        (base[::2], SINGLE, (12,), *no),
        (base[::-1], SINGLE, (24,), *no),
        (base[5:11], SINGLE, (6,), *yes),
        (base[5:11].reshape(2, 3), SINGLE, (2, 3), *yes),
        (base[:1], SINGLE, (1,), *yes),
        (np.broadcast_to(np.float32(1), (2, 3)), SINGLE, (2, 3), *no),
        (np.lib.stride_tricks.as_strided(base, (1, 3), (999, 4)), SINGLE, (1, 3), *yes),
        (read_only(np.zeros((2, 3), SINGLE)), SINGLE, (2, 3), *gradient_only),
        (misaligned(5), SINGLE, (5,), *no),
        (np.zeros((2, 3), DOUBLE), SINGLE, (2, 3), *no),
        (np.zeros((2, 3), np.int32), SINGLE, (2, 3), *no),
        (swapped, SINGLE, (2, 3), *no),
        (np.zeros((2, 3), object), SINGLE, (2, 3), *no),
        (np.zeros((2, 3), "f4,f4")["f0"], SINGLE, (2, 3), *no),
        (np.zeros((2, 3), SINGLE).view(Subclass), SINGLE, (2, 3), *no),
        (np.matrix(np.zeros((2, 3), SINGLE)), SINGLE, (2, 3), *no),
        (np.rec.array(np.zeros(3, "f4,f4")), SINGLE, (3,), *no),
        (mapped, SINGLE, (2, 3), *no),
        (plain_map, SINGLE, (2, 3), *(yes if type(plain_map) is np.ndarray else no)),
        (np.ma.zeros((2, 3), SINGLE), SINGLE, (2, 3), *no),
        (torch.zeros((2, 3)), SINGLE, (2, 3), *no),
        (torch.nn.Parameter(torch.zeros(3)), SINGLE, (3,), *no),
        (torch.zeros((2, 3)).numpy(), SINGLE, (2, 3), *yes),
        (np.asarray(memoryview(np.zeros((2, 3), SINGLE))), SINGLE, (2, 3), *yes),
        (np.frombuffer(b"\0" * 24, SINGLE).reshape(2, 3), SINGLE, (2, 3), *gradient_only),
        (resized, SINGLE, (2, 3), *yes),
        (reshaped, SINGLE, (2, 3), *yes),
        (Pretender(), SINGLE, (2, 3), *no),
        (None, SINGLE, (2, 3), *no),
        (None, SINGLE, (), *no),
        ([0.0, 1.0, 2.0], SINGLE, (3,), *no),
        ((), SINGLE, (0,), *no),
        (7, DOUBLE, (), *no),
        ("ab", SINGLE, (2,), *no),
        (np.ndarray, SINGLE, (2, 3), *no),
        (memoryview(np.zeros((2, 3), SINGLE)), SINGLE, (2, 3), *no),
    ]


@pytest.fixture
def odd(tmp_path):
    return odd_values(tmp_path)


def addresses_of(values, taken):
    return [
        v.__array_interface__["data"][0] if yes else UNKNOWN for v, yes in zip(values, taken, strict=True)
    ]


def test_headers_are_readable_here():
    assert headers.readable()


@pytest.mark.parametrize("from_python", [False, True], ids=["memory", "python"])
@pytest.mark.parametrize("container", [list, tuple])
def test_what_is_as_expected_is_found_and_else_unknown(odd, container, from_python, monkeypatch):
    if from_python:
        monkeypatch.setattr(headers, "readable", lambda: False)
    values, dtypes, shapes, as_parameter, as_gradient = map(list, zip(*odd, strict=True))
    own = Headers(dtypes, shapes)
    (changed, unknown), (moved, odd_gradients) = own.read(container(values), container(values))
    assert changed
    assert unknown
    assert moved
    assert odd_gradients
    assert own.addresses[0].tolist() == addresses_of(values, as_parameter)
    assert own.addresses[1].tolist() == addresses_of(values, as_gradient)
    assert own.read(container(values), container(values)) == ((False, True), (False, True))


def test_each_kind_is_found_alone(odd):
    for value, dtype, shape, as_parameter, as_gradient in odd:
        own, looked = Headers([dtype], [shape]), Headers([dtype], [shape])
        found = own.read([value], (value,))
        assert found == (looked._look(0, [value]), looked._look(1, [value]))
        assert own.addresses.tolist() == looked.addresses.tolist()
        assert (found[0][1], found[1][1]) == (not as_parameter, not as_gradient)


def candidates(rng, shape):
    """An array of this shape and float32, or one that nearly is."""
    kind = rng.integers(12)
    array = np.zeros(shape, SINGLE)
    if kind == 1:
        array = np.zeros(shape, DOUBLE)
    elif kind == 2:
        array = np.zeros(shape, SINGLE, order="F")
    elif kind == 3:
        array = np.zeros((*shape, 2), SINGLE)[..., 0]
    elif kind == 4:
        array = read_only(array)
    elif kind == 5:
        array = None
    elif kind == 6:
        array = np.zeros((*shape, 1), SINGLE)
    elif kind == 7:
        array = torch.zeros(shape)
    elif kind == 8:
        array = array.view(Subclass)
    return array


@given(seed=SEEDS, count=st.sampled_from([0, 1, 2, 17, 300]))
def test_memory_and_python_agree_on_any_arrays_from_read_to_read(seed, count):
    rng = np.random.default_rng(seed)
    shapes = [tuple(rng.integers(0, 4, rng.integers(0, 4)).tolist()) for _ in range(count)]
    own, looked = Headers([SINGLE] * count, shapes), Headers([SINGLE] * count, shapes)
    parameters = [np.zeros(shape, SINGLE) for shape in shapes]
    gradients = [np.zeros(shape, SINGLE) for shape in shapes]
    for _ in range(6):
        for values in (parameters, gradients):
            for i in rng.integers(0, count, rng.integers(0, 3)) if count else ():
                values[i] = candidates(rng, shapes[i])
        containers = rng.permutation([0, 1])
        given_values = [(list, tuple)[k](v) for k, v in zip(containers, (parameters, gradients), strict=True)]
        found = own.read(*given_values)
        assert found == (looked._look(0, parameters), looked._look(1, gradients))
        assert own.addresses.tolist() == looked.addresses.tolist()


def test_changed_says_whether_an_address_is_another_than_at_the_last_read():
    parameters, gradients = ([np.zeros(3, SINGLE), np.zeros((2, 2), SINGLE)] for _ in range(2))
    own = Headers([SINGLE] * 2, [(3,), (2, 2)])
    assert own.read(parameters, gradients) == ((True, False), (True, False))
    assert own.read(parameters, gradients) == ((False, False), (False, False))
    assert own.read(list(parameters), tuple(gradients)) == ((False, False), (False, False))
    kept, gradients[1] = gradients[1], np.zeros((2, 2), SINGLE)
    assert own.read(parameters, gradients) == ((False, False), (True, False))
    gradients[1] = kept.view()  # another object with the same elements
    assert own.read(parameters, gradients) == ((False, False), (True, False))
    assert own.read(parameters, gradients) == ((False, False), (False, False))
    gradients[1] = kept
    assert own.read(parameters, gradients) == ((False, False), (False, False))
    gradients[0] = None
    assert own.read(parameters, gradients) == ((False, False), (True, True))
    assert own.read(parameters, gradients) == ((False, False), (False, True))
    parameters[0] = np.zeros(3, SINGLE)
    assert own.read(parameters, gradients) == ((True, False), (False, True))


@pytest.mark.parametrize("from_python", [False, True], ids=["memory", "python"])
def test_arrays_that_change_in_place_are_seen_as_they_are(from_python, monkeypatch):
    if from_python:
        monkeypatch.setattr(headers, "readable", lambda: False)
    array = np.zeros(6, SINGLE)
    own = Headers([SINGLE], [(6,)])
    own.read([array], [array])
    array.resize(1_000_000, refcheck=False)
    assert own.read([array], [array]) == ((True, True), (True, True))
    array.resize(6, refcheck=False)
    own.read([array], [array])
    assert own.addresses.tolist() == [[array.__array_interface__["data"][0]]] * 2
    array.shape = (2, 3)
    assert own.read([array], [array]) == ((True, True), (True, True))
    array.shape = (6,)
    assert own.read([array], [array]) == ((True, False), (True, False))
    array.dtype = np.int32
    assert own.read([array], [array]) == ((True, True), (True, True))
    array.dtype = SINGLE
    assert own.read([array], [array]) == ((True, False), (True, False))
    array.flags.writeable = False
    assert own.read([array], [array]) == ((True, True), (False, False))
    array.strides = (0,)
    assert own.read([array], [array]) == ((False, True), (True, True))


def test_gradients_may_be_expected_of_other_dtypes_or_none_of_them(monkeypatch):
    arrays = [np.zeros(2, HALF), np.zeros(2, SINGLE), np.zeros(2, DOUBLE)]
    for readable in (True, False):
        monkeypatch.setattr(headers, "readable", lambda r=readable: r)
        own = Headers([HALF, SINGLE, DOUBLE], [(2,)] * 3)
        assert own.read(arrays, arrays) == ((True, False), (True, False))
        own.expect([SINGLE, None, DOUBLE])
        gradients = [np.zeros(2, SINGLE), arrays[1], arrays[2]]
        assert own.read(arrays, gradients) == ((False, False), (True, True))
        first, _, last = gradients
        places = [first.__array_interface__["data"][0], UNKNOWN, last.__array_interface__["data"][0]]
        assert own.addresses[1].tolist() == places
        own.expect([HALF, SINGLE, DOUBLE])
        assert own.read(arrays, arrays) == ((False, False), (True, False))


def test_gradients_may_be_expected_to_be_writeable(monkeypatch):
    parameters, gradients = [np.zeros(2, SINGLE)] * 2, [read_only(np.zeros(2, SINGLE)), np.zeros(2, SINGLE)]
    places = [g.__array_interface__["data"][0] for g in gradients]
    for readable in (True, False):
        monkeypatch.setattr(headers, "readable", lambda r=readable: r)
        own = Headers([SINGLE] * 2, [(2,)] * 2)
        assert own.read(parameters, gradients) == ((True, False), (True, False))
        for _ in range(2):
            for _ in range(2):
                own.expect_writeable(True)
            assert own.read(parameters, gradients) == ((False, False), (True, True))
            assert own.addresses[1].tolist() == [UNKNOWN, places[1]]
            for _ in range(2):
                own.expect_writeable(False)
            assert own.read(parameters, gradients) == ((False, False), (True, False))
            assert own.addresses[1].tolist() == places


def test_other_numbers_of_arrays_are_refused():
    own = Headers([SINGLE] * 2, [(2,)] * 2)
    two = [np.zeros(2, SINGLE)] * 2
    for parameters, gradients in ((two, two[:1]), (two[:1], two), (two * 2, two), ([], [])):
        with pytest.raises(ValueError, match="expected 2"):
            own.read(parameters, gradients)


def test_subclasses_of_lists_are_read_as_lists():
    class Own(list):
        def __iter__(self):
            return iter([np.zeros(1)])

    array = np.zeros(2, SINGLE)
    own = Headers([SINGLE], [(2,)])
    own.read([array], Own([None]))  # by what it gives, as Python has it
    assert own.addresses[0, 0] == array.__array_interface__["data"][0]
    assert own.addresses[1, 0] == UNKNOWN


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("container", [list, tuple])
def test_identities_tell_other_objects_order_and_number(container, readable, monkeypatch):
    monkeypatch.setattr(headers, "readable", lambda: readable)
    values = [np.zeros(2), None, "a", torch.zeros(1), np.zeros(2)]
    own = Identities(values)
    assert own.are_those_of(container(values))
    assert own.are_those_of(list(values))
    for other in (
        values[:-1],
        [*values, None],
        values[::-1],
        [*values[:-1], values[0]],
        [values[0].copy(), *values[1:]],
        [values[0].view(), *values[1:]],
        [],
    ):
        assert not own.are_those_of(container(other))
    values.append(values.pop(1))
    assert not own.are_those_of(values)
    assert Identities([]).are_those_of(container([]))
    assert not Identities([]).are_those_of(container([None]))


def test_what_is_laid_out_otherwise_is_found_out(monkeypatch):
    headers.readable.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(headers.platform, "python_implementation", lambda: "PyPy")
            assert not headers.readable()
        headers.readable.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(headers.sys, "_is_gil_enabled", lambda: False, raising=False)
            assert not headers.readable()
        headers.readable.cache_clear()
        with monkeypatch.context() as patch:  # Python's view and memory's differ
            patch.setattr(Headers, "_look", lambda self, which, values: (True, False))
            assert not headers.readable()
    finally:
        headers.readable.cache_clear()
    assert headers.readable()
