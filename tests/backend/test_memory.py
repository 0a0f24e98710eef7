"""Memory: arrays of a device, where they lie, and the scan that finds many at once."""

from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest
from backend.launches import BFLOAT, DOUBLE, HALF, SINGLE, formats

import fastopt
from fastopt.kernels.cpu.backend import tensors

DTYPES = [SINGLE, DOUBLE, HALF, BFLOAT, np.dtype(np.uint8)]
SHAPES = [(), (0, 4), (3,), (5, 7), (300, 100), (2, 3, 4)]


@pytest.mark.covers("zeros", "address")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_are_aligned_zeros(device, dtype):
    for shape in SHAPES:
        array = device.backend.zeros(shape, dtype)
        assert array.shape == shape and array.dtype == dtype
        assert not any(device.get(array).tobytes())
        if array.size:
            assert device.backend.address(array) % 64 == 0


@pytest.mark.covers("zeros")
def test_zeros_are_zeros_in_memory_that_was_used(device):
    ones, indices = device.put(np.ones((9, 100), np.float32)), device.put(np.arange(300) % 9)
    for _ in range(3):
        used = device.backend.gather(ones, indices)
        del used
        assert not device.get(device.backend.zeros((300, 100), SINGLE)).any()


@pytest.mark.covers("zeros_beside")
def test_zeros_beside_an_array_have_its_shape(device):
    for shape in SHAPES:
        found = device.backend.zeros_beside(device.put(np.ones(shape, np.float32)), DTYPES)
        assert [(array.shape, array.dtype) for array in found] == [(shape, dtype) for dtype in DTYPES]
        assert not any(any(device.get(array).tobytes()) for array in found)


@pytest.mark.covers("empty", "address")
@pytest.mark.parametrize("shape", [7, 50_000, (3, 5), (0, 4), (300, 100)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.int32, BFLOAT], ids=str)
def test_empty_arrays_are_apart(device, shape, dtype):
    arrays = [device.backend.empty(shape, dtype) for _ in range(4)]
    spans = []
    for array in arrays:
        assert array.shape == ((shape,) if isinstance(shape, int) else shape)
        assert array.dtype == np.dtype(dtype)
        start = device.backend.address(array)
        spans.append((start, start + array.size * array.dtype.itemsize))
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


@pytest.mark.covers("address")
def test_address_is_that_of_the_first_element(device):
    array = device.put(np.arange(24, dtype=np.float32).reshape(4, 6))
    start = device.backend.address(array)
    assert isinstance(start, int)
    assert device.backend.address(array[2:]) == start + 2 * 6 * 4
    assert device.backend.address(array[1:, 3:]) == start + (6 + 3) * 4  # of rows that lie apart
    other = device.put(np.arange(24, dtype=np.float32).reshape(4, 6))
    assert device.backend.address(other) != start
    if device.has_read_only:
        assert device.backend.address(device.read_only(array)) == start


@pytest.mark.host
@pytest.mark.covers("Identities")
def test_identities_are_of_objects_in_order(device):
    values = [device.put(np.zeros(3)) for _ in range(3)]
    identities = device.backend.Identities(values)
    assert identities.are_those_of(values)
    assert identities.are_those_of(list(values))
    assert not identities.are_those_of(values[::-1])
    assert not identities.are_those_of(values[:2])
    assert not identities.are_those_of([*values, values[0]])
    assert not identities.are_those_of([*values[:2], device.put(np.zeros(3))])
    before = list(values)
    values[1] = device.put(np.zeros(3))
    assert not identities.are_those_of(values)
    assert identities.are_those_of(before)
    assert device.backend.Identities([]).are_those_of([])


class Located:
    """A locator of three parameters, and arrays as it expects."""

    shapes = ((4, 6), (5,), ())
    dtypes = (SINGLE, DOUBLE, SINGLE)

    def __init__(self, device):
        self.device = device
        self.locator = device.backend.Locator(self.dtypes, self.shapes, [-1] * len(self.shapes))
        self.parameters, self.gradients = self.arrays(), self.arrays()

    def arrays(self):
        return [self.device.put(np.zeros(s, d)) for s, d in zip(self.shapes, self.dtypes, strict=True)]

    def unchanged(self, writeable=False):
        return self.locator.unchanged(self.parameters, self.gradients, writeable)

    def check(self, unknown=(), unknown_gradients=()):
        """Addresses are those of all arrays but the unknown ones."""
        for values, found, left in (
            (self.parameters, self.locator.parameters(), unknown),
            (self.gradients, self.locator.gradients(), unknown_gradients),
        ):
            addresses, positions = found
            assert list(positions) == list(left)
            for k, value in enumerate(values):
                if k not in left:
                    assert addresses[k] == self.device.backend.address(value)


@pytest.mark.host
@pytest.mark.covers("Locator")
@pytest.mark.parametrize("container", [list, tuple])
def test_locator_recognises_arrays(device, container):
    located = Located(device)
    located.parameters, located.gradients = container(located.parameters), container(located.gradients)
    assert not located.unchanged()  # nothing was read before
    located.check()
    assert located.unchanged()
    located.check()


@pytest.mark.host
@pytest.mark.covers("Locator")
@pytest.mark.parametrize("which", ["parameters", "gradients"])
def test_locator_sees_that_an_array_moved(device, which):
    located = Located(device)
    located.unchanged()
    getattr(located, which)[1] = located.arrays()[1]
    assert not located.unchanged()
    located.check()
    assert located.unchanged()


STRANGE = {
    "another dtype": lambda device: device.put(np.zeros(5, np.float32)),
    "another shape": lambda device: device.put(np.zeros(6)),
    "another number of dimensions": lambda device: device.put(np.zeros((5, 1))),
    "strided": lambda device: device.put(np.zeros((5, 2)))[:, 0],
    "none": lambda device: None,
    "a list": lambda device: [0.0] * 5,
}


@pytest.mark.host
@pytest.mark.covers("Locator")
@pytest.mark.parametrize("strange", STRANGE)
def test_locator_leaves_what_it_does_not_recognise(device, strange):
    located = Located(device)
    located.unchanged()
    known = located.gradients[1]
    located.gradients[1] = STRANGE[strange](device)
    for again in (False, True):  # it stays unknown, though it does not move
        assert located.unchanged() == (again and strange == "none")
        located.check(unknown_gradients=[1])
    located.gradients[1] = known
    located.parameters[1] = STRANGE[strange](device)
    assert not located.unchanged()
    located.check(unknown=[1])


@pytest.mark.host
@pytest.mark.covers("Locator")
def test_locator_expects_gradients_of_other_dtypes(device):
    located = Located(device)
    located.locator.expect([BFLOAT, None, SINGLE])
    located.gradients[0] = device.put(np.zeros((4, 6), BFLOAT))
    located.unchanged()
    located.check(unknown_gradients=[1])  # none is expected there
    located.locator.expect([SINGLE, DOUBLE, SINGLE])
    assert not located.unchanged()
    located.check(unknown_gradients=[0])


@pytest.mark.host
@pytest.mark.covers("Locator")
def test_locator_wants_arrays_that_can_be_written(device):
    if not device.has_read_only:
        pytest.skip("this device has no read-only arrays")
    located = Located(device)
    located.gradients[0] = device.read_only(located.gradients[0])
    for writeable in (False, True, False):
        located.unchanged(writeable)
        assert located.unchanged(writeable) is not writeable
        located.check(unknown_gradients=[0] if writeable else [])
    located.parameters[2] = device.read_only(located.parameters[2])
    assert not located.unchanged()
    located.check(unknown=[2])


@pytest.mark.host
@pytest.mark.covers("Locator")
@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not there")
def test_locator_finds_torch_tensors(device):
    located = Located(device)
    located.parameters[0] = device.tensor(np.zeros((4, 6), np.float32))
    located.gradients[0] = device.tensor(np.zeros((4, 6), np.float32))
    located.gradients[1] = device.tensor(np.zeros((5, 2)))[:, 0]  # not contiguous
    located.unchanged()
    addresses, unknown = located.locator.parameters()
    assert unknown == []
    assert addresses[0] == located.parameters[0].data_ptr()
    addresses, unknown = located.locator.gradients()
    assert unknown == [1]
    assert addresses[0] == located.gradients[0].data_ptr()
    assert addresses[2] == device.backend.address(located.gradients[2])
    located.locator.expect([DOUBLE, DOUBLE, SINGLE])
    located.unchanged()
    assert located.locator.gradients()[1] == [0, 1]


CHANGES = {
    "another tensor": lambda tensors: tensors.__setitem__(0, tensors[0].clone()),
    "an array": lambda tensors: tensors.__setitem__(0, np.zeros((4, 6), np.float32)),
    "none": lambda tensors: tensors.__setitem__(0, None),
    "other memory": lambda tensors: setattr(tensors[0], "data", tensors[0].clone()),
    "another dtype": lambda tensors: setattr(tensors[0], "data", tensors[0].view(integers())),
    "fewer elements": lambda tensors: tensors[0].resize_(3, 6),
    "strides": lambda tensors: tensors[0].as_strided_((4, 6), (1, 4)),
    "a sign": lambda tensors: tensors.__setitem__(0, tensors[0]._neg_view()),
}


def integers():
    import torch

    return torch.int32


@pytest.mark.host
@pytest.mark.covers("Locator")
@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not there")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["parameters", "gradients"])
def test_locator_sees_that_a_tensor_changed(device, change, which):
    located = Located(device)
    for values in (located.parameters, located.gradients):
        values[:] = [device.tensor(device.get(array)) for array in values]
    assert not located.unchanged()
    assert located.unchanged()
    tensors = getattr(located, which)
    kept = list(tensors)
    CHANGES[change](tensors)
    assert located.unchanged() == (change == "a sign" and which == "parameters")  # whose objects stay
    tensors[:] = kept


@pytest.mark.host
@pytest.mark.covers("Locator")
@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not there")
def test_locator_sees_another_shape_of_a_gradient(device):
    located = Located(device)
    located.gradients[0] = device.tensor(np.zeros((4, 6), np.float32))
    assert not located.unchanged()
    assert located.unchanged()
    located.gradients[0].resize_(3, 8)
    assert not located.unchanged()
    located.check(unknown_gradients=[0])


@pytest.mark.host
@pytest.mark.covers("Locator")
@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not there")
def test_locator_refuses_tensors_without_memory(device):
    import torch

    released = torch.zeros(4, 6)
    released.untyped_storage().resize_(0)
    for strange in (released, torch._efficientzerotensor((4, 6))):
        located = Located(device)
        located.gradients = [device.tensor(device.get(array)) for array in located.gradients]
        for own in (located.gradients[0], strange):
            located.gradients[0] = own
            located.unchanged()
        assert located.locator.gradients()[1] == [0]
        with pytest.raises(TypeError):
            fastopt.SGD(np.zeros((4, 6), np.float32)).step(strange)


@pytest.mark.host
@pytest.mark.covers("Locator")
def test_locator_reads_all_again_after_an_interrupt(device, monkeypatch):
    """One between its looks at headers and at the rest."""
    if not device.has_read_only:
        pytest.skip("this device has no read-only arrays")
    located = Located(device)
    for _ in range(2):
        located.unchanged()
    located.parameters[0] = device.read_only(located.parameters[0])

    def interrupted(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tensors.Others, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            located.unchanged()
    assert not located.unchanged()
    located.check(unknown=[0])


@pytest.mark.host
@pytest.mark.covers("Locator")
def test_locator_tells_none_from_what_was_there_before(device):
    located = Located(device)
    for strange in ([0.0], None, None, [0.0], [0.0], None):
        located.gradients[1] = strange
        located.unchanged()
    assert located.unchanged()
    for strange, unchanged in (([0.0], False), (None, False), (None, True)):
        located.gradients[1] = strange
        assert located.unchanged() is unchanged


@pytest.mark.covers("reblock")
@pytest.mark.parametrize("kind", [formats.SIGNED8, formats.ROOT8], ids=lambda kind: kind.name)
def test_codes_in_blocks_over_all_rows_become_codes_in_blocks_of_rows(device, rng, kind):
    rows, dim = 3, 300
    codes = rng.integers(0, 256, (rows, dim)).astype(np.uint8)
    scales = rng.uniform(0.5, 2.0, -(-rows * dim // formats.BLOCK)).astype(np.float32)
    blocks = -(-dim // formats.BLOCK)
    new, new_scales = device.put(np.zeros_like(codes)), device.put(np.zeros((rows, blocks), np.float32))
    device.backend.reblock(kind, device.put(codes), device.put(scales), new, new_scales)
    new, new_scales = device.get(new), device.get(new_scales)

    def numbers(codes, scales):  # see formats.py: floats whose exponent and first bits are the code
        signed = kind is formats.SIGNED8
        shift, span = (20, formats.SIGNED_SPAN) if signed else (19, formats.ROOT_SPAN)
        magnitude = (codes & 127 if signed else codes).astype(np.uint32)
        z = ((magnitude << shift) + formats.LOWEST_BITS).astype(np.uint32).view(np.float32) - formats.LOWEST
        return np.where(codes & 128, -z, z) / span * scales if signed else (z / span) ** 2 * scales

    want = numbers(codes.reshape(-1), scales[np.arange(rows * dim) // formats.BLOCK]).reshape(rows, dim)
    of_columns = np.arange(dim) // formats.BLOCK
    for row in range(rows):
        for block in range(blocks):
            largest = np.abs(want[row, of_columns == block]).max()
            np.testing.assert_allclose(new_scales[row, block], largest, rtol=1e-6)
        found = numbers(new[row], new_scales[row, of_columns])
        # half of a code's width: 1/16 of a number, and of small ones 2^-19 of the scale
        np.testing.assert_allclose(found, want[row], rtol=1 / 15, atol=2.0**-18)


@pytest.mark.covers("from_host", "to_host", "contiguous")
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_go_to_a_device_and_come_back(device, dtype):
    for shape in SHAPES:
        array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
        there = device.backend.from_host(array)
        assert (there.shape, there.dtype) == (array.shape, array.dtype)
        back = device.backend.to_host(there)
        assert type(back) is np.ndarray and back.flags.c_contiguous
        np.testing.assert_array_equal(back, array)
        assert device.backend.contiguous(there) is there or there.flags.c_contiguous
    pairs = device.backend.from_host(np.arange(24).reshape(4, 2, 3).astype(dtype))
    apart = device.backend.contiguous(pairs[:, 1])
    assert apart.flags.c_contiguous
    np.testing.assert_array_equal(device.get(apart), np.arange(24).reshape(4, 2, 3)[:, 1].astype(dtype))
