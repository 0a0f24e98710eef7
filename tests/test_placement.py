"""Where state lies beside its parameter, which decides how many cache lines a step has to go to."""

import gc
import weakref

import ml_dtypes
import numpy as np
import pytest

import fastopt

LINE, PAGE = 64, 4096
SIZE = 70_001  # so many elements of each dtype are as large as arrays that are placed by pages


def place(array):
    return array.__array_interface__["data"][0]


def parameter(first, size=SIZE, dtype=np.float32):
    """Ones that begin ``first`` elements after a page's beginning."""
    dtype = np.dtype(dtype)
    memory = np.zeros((size + first) * dtype.itemsize + PAGE, np.uint8)
    begin = -place(memory) % PAGE + first * dtype.itemsize
    array = memory[begin : begin + size * dtype.itemsize].view(dtype)
    array[:] = 1
    return array


def stepped(p, **options):
    """Adam after two steps."""
    opt = fastopt.Adam(p, **options)
    for factor in (1, -0.3):
        opt.step((np.linspace(-1, 1, p.size) * factor).astype(p.dtype))
    return opt


@pytest.mark.parametrize("first", [0, 1, 4, 15, 500, 1023])
def test_large_state_has_the_places_of_its_parameter_in_pages(first):
    p = parameter(first)
    opt = stepped(p)
    for array in opt.state[0].values():
        assert (place(array) - place(p)) % PAGE == 0


@pytest.mark.parametrize("size", [100, SIZE])
@pytest.mark.parametrize("first", [0, 1, 4, 15, 24])
def test_lines_of_masters_and_state_begin_where_those_of_the_parameter_do(first, size):
    p = parameter(first, size, ml_dtypes.bfloat16)
    opt = stepped(p, master_weights=True)
    whole = -first % (LINE // 2)  # the first element that begins a line
    assert {array.dtype for array in opt.state[0].values()} == {np.dtype(np.float32)}
    assert {(place(array) + 4 * whole) % LINE for array in opt.state[0].values()} == {0}


def test_codes_in_blocks_begin_with_a_line():
    opt = stepped(parameter(1), state_dtype="8bit")
    assert {place(array) % LINE for array in opt.state[0].values()} == {0}


def test_places_do_not_change_bits():
    expected_p = parameter(0)
    expected = stepped(expected_p)
    for first in (1, 4, 15, 500):
        p = parameter(first)
        opt = stepped(p)
        assert p.tobytes() == expected_p.tobytes()
        for name, array in opt.state[0].items():
            assert array.tobytes() == expected.state[0][name].tobytes()


def test_state_that_is_loaded_is_placed_as_new_state():
    saved = stepped(parameter(0)).state_dict()
    p = parameter(7)
    opt = fastopt.Adam(p)
    opt.load_state_dict(saved)
    for name, array in opt.state[0].items():
        assert (place(array) - place(p)) % PAGE == 0
        assert array.tobytes() == saved["state"][0][name].tobytes()
        assert not np.shares_memory(array, saved["state"][0][name])


def test_state_that_was_put_elsewhere_is_let_go():
    """Rows have their state side by side; a dense gradient has each array for itself from then on."""
    table = np.zeros((1000, 64), np.float32)
    opt = fastopt.Adam(table)
    opt.step(fastopt.IndexedSlices(np.array([1]), np.ones((1, 64), np.float32)))
    before = [weakref.ref(array.base) for array in opt.state[0].values()]
    for _ in range(2):
        opt.step(np.ones_like(table))
    gc.collect()
    assert [ref() for ref in before] == [None, None]
