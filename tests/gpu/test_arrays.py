"""Arrays of a device: views, what is refused, copies, and those of other libraries that are taken as such."""

import copy
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
from devices import InterpretedCuda

import fastopt
from fastopt.kernels.cuda import driver
from fastopt.kernels.cuda.array import DeviceArray, Memory, upload, zeros
from fastopt.kernels.cuda.producers import device_array
from fastopt.kernels.cuda.streams import current_stream
from gpu.interpreted import Interpreted, Lent

pytestmark = pytest.mark.interpreted


@pytest.fixture(autouse=True)
def two():
    """A driver of two devices."""
    before = InterpretedCuda().driver
    made = Interpreted(devices=2)
    driver.use(made)
    yield made
    driver.use(before)


@pytest.fixture
def capturing(two, monkeypatch):
    monkeypatch.setattr(two, "capturing", lambda device: True)


# Views

KEYS = [
    2,
    -1,
    np.int64(1),
    slice(1, 3),
    slice(None, None, 2),
    slice(3, 1),
    (1, 2),
    (slice(1, None), 3),
    (slice(0, 4, 3), slice(1, 6, 2), -2),
    ...,
    (..., 1),
    (2, ...),
    (1, ..., 0),
    (slice(None), slice(9, 20)),
]


@pytest.mark.parametrize("key", KEYS, ids=repr)
def test_views_are_those_of_numpy(key):
    array = np.arange(4 * 6 * 5, dtype=np.float32).reshape(4, 6, 5)
    np.testing.assert_array_equal(upload(0, array)[key].copy_to_host(), array[key])


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (4, IndexError, "index 4 is out of range for an axis of length 4"),
        (-5, IndexError, "index -5 is out of range for an axis of length 4"),
        ((0, 0, 0), IndexError, "too many indices for an array with 2 axes"),
        ((..., ...), IndexError, "too many indices"),
        (slice(None, None, -1), ValueError, "a slice has step -1: expected a positive one"),
        (None, TypeError, "None is no index of a DeviceArray: expected whole numbers and slices"),
        (True, TypeError, "True is no index"),
        (1.0, TypeError, "1.0 is no index"),
    ],
)
def test_other_indices_are_refused(key, error, message):
    with pytest.raises(error, match=message):
        zeros(0, (4, 6), np.float32)[key]


def test_an_array_without_axes_has_no_length():
    assert len(zeros(0, (3, 2), np.float32)) == 3
    with pytest.raises(TypeError, match="no length"):
        len(zeros(0, (), np.float32))


# Contents


@pytest.mark.parametrize("write", [lambda a: a.fill(7), lambda a: a.__setitem__(0, 7)])
def test_an_array_that_is_not_to_be_written_is_not(write):
    array = upload(0, np.arange(3))
    with pytest.raises(ValueError, match="read-only"):
        write(array.read_only())
    np.testing.assert_array_equal(array.copy_to_host(), np.arange(3))


@pytest.mark.parametrize("value", [[1, 2], None, "7", np.array([[1.0]]), object()])
def test_what_is_no_number_is_refused(value):
    array = zeros(0, (2, 2), np.float32)
    with pytest.raises((TypeError, ValueError)):
        array[...] = value
    with pytest.raises(TypeError, match="expected a number"):
        array.fill(value)
    assert not array.copy_to_host().any()


def test_a_number_out_of_range_is_refused():
    with pytest.raises(OverflowError):
        zeros(0, 2, np.int32).fill(2**40)


@pytest.mark.parametrize(
    "keys", [(slice(1, None), slice(None, -1)), ((..., slice(1, None)), (..., slice(0, -1)))]
)
def test_an_array_is_moved_within_itself(keys):
    array = np.arange(20, dtype=np.float32).reshape(4, 5)
    own = upload(0, array)
    to, source = keys
    own[to] = own[source]
    array[to] = array[source].copy()
    np.testing.assert_array_equal(own.copy_to_host(), array)


def test_indices_of_a_plan_stay():
    plan = fastopt.IndexPlan(upload(0, np.array([1, 2, 1])), 4)
    for array in (plan.indices, plan.distinct):
        with pytest.raises(ValueError, match="read-only"):
            array.fill(9)
    np.testing.assert_array_equal(plan.indices.copy_to_host(), [1, 2, 1])


def test_numpy_makes_no_array_of_objects():
    with pytest.raises(TypeError, match=r"copy_to_host\(\)"):
        np.asarray(zeros(0, 3, np.float32))


def test_a_number_of_a_device_is_a_learning_rate():
    rate, array = upload(0, np.array(0.5)), np.ones(3, np.float32)
    opt = fastopt.SGD(Lent(driver.driver(), array), lr=rate)
    gradient = Lent(driver.driver(), np.ones(3, np.float32))
    opt.step(gradient)
    rate.fill(0.25)
    opt.step(gradient)
    np.testing.assert_array_equal(array, np.full(3, 0.25))
    assert upload(0, np.arange(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("key", [..., (slice(None), slice(1, 3))], ids=["whole", "columns"])
def test_arrays_go_from_one_device_to_another(two, dtype, key):
    source = np.arange(12, dtype=np.float32).reshape(3, 4)
    target = zeros(1, source[key].shape, dtype)
    target[...] = upload(0, source)[key]
    np.testing.assert_array_equal(target.copy_to_host(), source[key])
    assert two.device_of(target.address) == 1


def test_memory_goes_with_the_process(two, monkeypatch):
    memory, freed = Memory(0, 8), []
    monkeypatch.setattr(two, "free", lambda *given: freed.append(given))
    memory.__del__(lambda: True)
    assert not freed
    memory.__del__(lambda: False)
    assert freed == [(0, memory.address)]


def test_the_end_of_a_process_is_quiet():
    """Modules go before arrays that a user's module holds."""
    source = """
import sys
sys.path.insert(0, "tests")
from gpu.interpreted import Interpreted
from fastopt.kernels.cuda import array, driver
driver.use(Interpreted())
kept = array.zeros(0, 8, "float32")
class Holder: pass
holder = Holder(); holder.self = holder; holder.kept = kept
sys.keeps_until_the_end = holder
del array, driver
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stderr == ""


# Copies


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_an_optimizer_is_copied_with_its_arrays(two, copied):
    param = zeros(1, (4, 3), np.float32)
    opt = fastopt.AdamW(param, lr=0.1, state_dtype="bfloat16")
    gradient = upload(1, np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3))
    opt.step(gradient)
    other = copied(opt)
    own = other.param_groups[0]["params"]
    assert isinstance(own, DeviceArray) and own.device == 1 and own.address != param.address
    opt.step(gradient)
    assert other.steps == 1
    other.step(gradient)
    np.testing.assert_array_equal(own.copy_to_host(), param.copy_to_host())
    np.testing.assert_equal(other.state_dict()["state"], opt.state_dict()["state"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_a_plan_is_copied_to_its_device(two, copied):
    table = upload(1, np.arange(12, dtype=np.float32).reshape(4, 3))
    plan = copied(fastopt.IndexPlan(upload(1, np.array([3, 1, 3])), 4))
    got = fastopt.embedding(table, plan)
    np.testing.assert_array_equal(got.copy_to_host(), table.copy_to_host()[[3, 1, 3]])
    np.testing.assert_array_equal(plan.distinct.copy_to_host(), [1, 3])


# Arrays of other libraries


class Bare:
    """An object with nothing but the CUDA array interface."""

    def __init__(self, lent, **changed):
        self._lent = lent
        self.__cuda_array_interface__ = {**lent.__cuda_array_interface__, **changed}


def test_the_interface_alone_makes_a_parameter(two):
    array = np.ones(3, np.float32)
    fastopt.SGD(Bare(Lent(two, array)), lr=0.5).step(Bare(Lent(two, np.ones(3, np.float32))))
    np.testing.assert_array_equal(array, np.full(3, 0.5))
    fastopt.SGD([Bare(Lent(two, array))], lr=0.5).step([Bare(Lent(two, np.ones(3, np.float32)))])
    np.testing.assert_array_equal(array, np.zeros(3))


@pytest.mark.parametrize("address", [0, None])
@pytest.mark.parametrize("dlpack", [False, True])
def test_an_array_without_elements_lies_where_its_library_says(two, monkeypatch, address, dlpack):
    empty = Bare(Lent(two, np.zeros((0, 3), np.float32), 1), data=(address, False))
    if dlpack:
        empty.__dlpack_device__ = lambda: (2, 1)
    else:
        monkeypatch.setattr(two, "current_device", lambda: 1)
    found = device_array(empty)
    assert found.device == 1 and found.shape == (0, 3) and found.address == 0


def test_a_batch_without_lookups_changes_nothing_on_any_device(two, monkeypatch):
    table = np.ones((4, 3), np.float32)
    opt = fastopt.Adam(Lent(two, table, 1))
    indices, values = (Bare(zeros(1, shape, t)) for shape, t in ((0, "int64"), ((0, 3), "float32")))
    monkeypatch.setattr(two, "current_device", lambda: 1)
    opt.step(fastopt.IndexedSlices(indices, values))
    assert opt.steps == 1
    np.testing.assert_array_equal(table, np.ones((4, 3)))
    assert fastopt.embedding(Lent(two, table, 1), indices).shape == (0, 3)


def test_streams_of_each_thread_are_those_that_the_default_one_waits_for(monkeypatch):
    for pointer, handle in ((0, 1), (1, 1), (2, 1), (77, 77)):
        stream = types.SimpleNamespace(ptr=pointer)
        cuda = types.SimpleNamespace(get_current_stream=lambda device, stream=stream: stream)
        monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
        assert current_stream(0) == handle


def test_a_library_that_is_being_imported_has_no_arrays_yet(two, monkeypatch):
    for name in ("torch", "cupy"):
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(_initializing=True)
        monkeypatch.setitem(sys.modules, name, module)
    array = np.ones(3, np.float32)
    fastopt.SGD(Lent(two, array), lr=1.0).step(Lent(two, np.ones(3, np.float32)))
    assert not array.any()
    fastopt.SGD(array, lr=1.0).step(np.ones(3, np.float32))


# Work that is captured in a graph


@pytest.mark.parametrize(
    "call",
    [
        lambda array, table, indices: fastopt.embedding(table, indices),
        lambda array, table, indices: fastopt.embedding_bag(table, indices, mode="sum"),
        lambda array, table, indices: fastopt.grad_norm(array),
        lambda array, table, indices: fastopt.clip_grad_norm(array, 1.0),
        lambda array, table, indices: fastopt.IndexPlan(indices, 4),
        lambda array, table, indices: array.copy_to_host(),
        lambda array, table, indices: array.copy(),
        lambda array, table, indices: array.item(),
        lambda array, table, indices: fastopt.Adam(table).catch_up(table, indices),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(two, call, monkeypatch):
    given = np.ones(5, np.float32), np.ones((4, 3), np.float32), np.array([[1, 2]])
    array, table, indices = (upload(0, own) for own in given)
    before = two.launches
    with monkeypatch.context() as patch:
        patch.setattr(two, "capturing", lambda device: True)
        with pytest.raises(RuntimeError, match=r"can't be captured in a (CUDA )?graph"):
            call(array, table, indices)
    assert two.launches == before
    np.testing.assert_array_equal(array.copy_to_host(), given[0])


def test_clipping_by_value_can_be_captured(two, capturing):
    array = np.linspace(-2, 2, 5, dtype=np.float32)
    fastopt.clip_grad_value(Lent(two, array), 1.0)
    np.testing.assert_array_equal(array, [-1, -1, 0, 1, 1])
