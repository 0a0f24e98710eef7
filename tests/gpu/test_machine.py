"""The driver of the machine: devices, streams, and memory that goes from one to the other.

CUDA itself is replaced by :class:`FakeCuda`, which knows what is in order.
"""

import random
import threading

import numpy as np
import pytest

from fastopt.kernels.cuda import machine as machines
from fastopt.kernels.cuda import pool
from fastopt.kernels.cuda.errors import NoDriverError
from gpu.fake_cuda import LEGACY, FakeCuda

SIZE = 1000  # bytes


@pytest.fixture
def cuda():
    return FakeCuda()


@pytest.fixture
def machine(cuda, monkeypatch):
    return cuda.install(monkeypatch)


def launch(machine, device, *addresses):
    machine.launcher(device, "kernel", 1, 32, addresses)()


# Devices


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("device", [0, 1])
def test_work_goes_to_its_device_whatever_is_the_current_one(machine, cuda, before, device):
    launch(machine, device)
    cuda.contexts[-1] = before  # as torch.cuda.set_device does
    memory, other = machine.allocate(device, SIZE), machine.allocate(1 - device, SIZE)
    machine.zero(device, memory, SIZE)
    machine.upload(device, memory, np.zeros(4))
    machine.copy(device, memory, 1 - device, other, SIZE)
    machine.download(device, np.zeros(4), memory)
    launch(machine, device, memory)
    machine.synchronize(device)
    machine.wait_for(device, LEGACY)
    assert not machine.capturing(device)
    machine.free(device, memory)
    assert cuda.launches == [(device, LEGACY)] * 2
    assert cuda.contexts == [before]


def test_a_call_that_fails_leaves_the_current_device(machine, cuda):
    cuda.contexts[-1] = 1
    cuda.alive.clear()
    with pytest.raises(AssertionError, match="destroyed"):
        launch(machine, 1, 5)
    assert cuda.contexts == [1]


@pytest.mark.parametrize(("context", "device"), [(0, 0), (1, 0), (2, 1)])
def test_the_current_device_is_that_of_the_thread(machine, cuda, context, device):
    cuda.contexts[-1] = context
    assert machine.current_device() == device


def test_devices_have_default_streams_of_their_own(machine, cuda):
    for device in (0, 1):
        launch(machine, device)
    assert cuda.launches == [(0, LEGACY), (1, LEGACY)]


@pytest.mark.parametrize("pinned", [False, True])
def test_an_array_of_the_host_may_be_changed_once_it_is_brought(machine, cuda, pinned):
    array = np.zeros(4)
    cuda.pinned = {array.ctypes.data} if pinned else set()
    machine.upload(0, machine.allocate(0, SIZE), array)
    assert cuda.synchronized == [LEGACY] * pinned


def test_a_copy_waits_for_the_work_of_both_devices(machine, cuda):
    cuda.now = {device: cuda.made(device) for device in (0, 1)}
    source, target = machine.allocate(0, SIZE), machine.allocate(1, SIZE)
    launch(machine, 0, source)
    launch(machine, 1, target)
    machine.copy(1, target, 0, source, SIZE)  # FakeCuda refuses work that is not in order
    launch(machine, 0, source)
    launch(machine, 1, target)


# Streams


def test_memory_is_used_again_on_the_same_stream_without_a_wait(machine, cuda):
    first = machine.allocate(0, SIZE)
    launch(machine, 0, first)
    machine.free(0, first)
    assert machine.allocate(0, SIZE - 1) == first
    assert machine.allocate(0, SIZE) != first


@pytest.mark.parametrize("freed_on", [0, 1])
@pytest.mark.parametrize("taken_on", [0, 1])
def test_memory_that_two_streams_used_is_used_again_in_order(machine, cuda, freed_on, taken_on):
    streams = [cuda.made(0), cuda.made(0)]
    cuda.now[0] = streams[0]
    memory = machine.allocate(0, SIZE)
    launch(machine, 0, memory)
    cuda.order(0, streams[0].handle, streams[1].handle)
    cuda.now[0] = streams[1]
    launch(machine, 0, memory)
    cuda.now[0] = streams[freed_on]
    launch(machine, 0)
    machine.free(0, memory)
    cuda.now[0] = streams[taken_on]
    got = machine.allocate(0, SIZE)
    assert (got == memory) == (freed_on == taken_on)
    launch(machine, 0, got)
    launch(machine, 0, got)


def test_memory_of_one_stream_does_not_wait_for_another(machine, cuda):
    main, side = cuda.made(0), cuda.made(0)
    cuda.now[0] = main
    launch(machine, 0, 77)
    cuda.now[0] = side
    own = machine.allocate(0, SIZE)
    launch(machine, 0, own)
    machine.free(0, own)
    assert machine.allocate(0, SIZE) == own
    cuda.contexts.append(1)
    assert (0, main.handle) not in cuda.clock(side.handle)


@pytest.mark.parametrize("seed", range(40))
def test_memory_is_used_in_order_over_streams_drawn_at_random(machine, cuda, seed):
    rng = random.Random(seed)
    streams = [cuda.made(0) for _ in range(3)]
    used: dict[int, int] = {}  # by address, the stream that a user knows of
    for _ in range(150):
        cuda.now[0] = stream = rng.choice(streams)
        if used and rng.random() < 0.4:
            address = rng.choice([*used])
            del used[address]
            machine.free(0, address)
            continue
        if rng.random() < 0.5 or not used:
            used[machine.allocate(0, rng.choice([100, 5000]))] = stream.handle
        chosen = rng.sample([*used], min(2, len(used)))
        for address in chosen:
            cuda.order(0, used[address], stream.handle)
            used[address] = stream.handle
        launch(machine, 0, *chosen)


def test_a_thread_that_frees_memory_has_no_say_in_streams(machine, cuda):
    stream = cuda.now[0] = cuda.made(0)
    memory = machine.allocate(0, SIZE)
    launch(machine, 0, memory)
    cuda.now[0] = LEGACY  # the one of the thread that collects garbage
    collector = threading.Thread(target=machine.free, args=(0, memory))
    collector.start()
    collector.join()
    cuda.now[0] = stream
    assert machine.allocate(0, SIZE) == memory
    launch(machine, 0, memory)


def test_streams_live_while_memory_may_wait_for_them(machine, cuda):
    cuda.now[0] = cuda.made(0)
    memory = machine.allocate(0, SIZE)
    launch(machine, 0, memory)
    cuda.now[0] = LEGACY  # the stream is the machine's alone now
    launch(machine, 0)
    machine.free(0, memory)
    launch(machine, 0, machine.allocate(0, SIZE))


def test_streams_are_forgotten_in_the_end(machine, cuda, monkeypatch):
    monkeypatch.setattr(pool, "MOST_STREAMS", 4)
    cuda.now[0] = cuda.made(0)
    memory, waiting = machine.allocate(0, SIZE), machine.allocate(0, 3 * SIZE)
    launch(machine, 0, memory, waiting)
    machine.free(0, waiting)
    for _ in range(20):
        cuda.now[0] = cuda.made(0)
        launch(machine, 0)
    assert len(cuda.alive) == 5  # with the default one
    machine.free(0, memory)
    launch(machine, 0, machine.allocate(0, SIZE))
    got = machine.allocate(0, 3 * SIZE)
    assert got == waiting
    launch(machine, 0, got)


def test_work_of_a_device_can_wait_for_a_stream(machine, cuda):
    stream = cuda.now[0] = cuda.made(0)
    memory = machine.allocate(0, SIZE)
    launch(machine, 0, memory)
    cuda.now[0] = LEGACY
    machine.wait_for(0, stream.handle)
    launch(machine, 0, memory)


# Captured work


@pytest.mark.parametrize("nbytes", [SIZE, pool.MOST_WAITING + 1])
@pytest.mark.parametrize("shared", [False, True])
def test_memory_that_is_freed_while_work_is_captured_waits_for_the_end(machine, cuda, nbytes, shared):
    main, side = cuda.made(0), cuda.made(0)
    cuda.now[0] = main
    memory = machine.allocate(0, nbytes)
    launch(machine, 0, memory)
    cuda.order(0, main.handle, side.handle)
    cuda.now[0] = side
    if shared:
        launch(machine, 0, memory)
    cuda.capturing = {side.handle}
    assert machine.capturing(0)
    machine.free(0, memory)
    assert not cuda.closed
    cuda.capturing = set()
    other = machine.allocate(0, SIZE)
    launch(machine, 0, other)
    assert (other == memory) == (nbytes == SIZE)
    assert cuda.closed == [memory] * (nbytes != SIZE)


def test_memory_is_not_closed_on_a_stream_that_captures(machine, cuda, monkeypatch):
    """What has waited there longest, neither."""
    monkeypatch.setattr(pool, "MOST_WAITING", 10_000)
    captured, side = cuda.made(0), cuda.made(0)
    cuda.now[0] = captured
    waiting = machine.allocate(0, 3000)
    machine.free(0, waiting)
    cuda.now[0] = side
    held = [machine.allocate(0, 4000) for _ in range(2)]
    cuda.capturing = {captured.handle}
    for address in held:
        machine.free(0, address)
    assert not cuda.closed
    cuda.capturing = set()
    machine.allocate(0, 1)
    assert waiting in cuda.closed


def test_streams_that_capture_are_not_forgotten(machine, cuda, monkeypatch):
    monkeypatch.setattr(pool, "MOST_STREAMS", 4)
    captured = cuda.now[0] = cuda.made(0)
    launch(machine, 0)
    cuda.capturing = {captured.handle}
    for _ in range(20):
        cuda.now[0] = cuda.made(0)
        launch(machine, 0)
    assert captured.handle in cuda.alive
    assert len(cuda.alive) == 5


def test_a_default_stream_that_may_not_be_asked_captures(machine, cuda):
    launch(machine, 0)
    assert not machine.capturing(0)
    cuda.implicit = True
    assert machine.capturing(0)


# Garbage that is collected while the pool is at work


class Interrupting(dict):
    """A dict of the pool, in the middle of whose use garbage is collected."""

    def __init__(self, own, free):
        super().__init__(own)
        self._free = free

    def get(self, *given):
        self._free()
        return super().get(*given)

    def values(self):
        self._free()
        return super().values()


def test_memory_that_is_freed_while_the_pool_is_at_work_waits(machine, cuda, monkeypatch):
    """It is only noted then."""
    monkeypatch.setattr(pool, "MOST_WAITING", 20_000)
    first, second, waiting = (machine.allocate(0, SIZE) for _ in range(3))
    machine.free(0, waiting)
    own, garbage = machine._pools[0], [first, second]

    def free():
        if garbage:
            machine.free(0, garbage.pop())

    own._waiting, own._epochs = Interrupting(own._waiting, free), Interrupting(own._epochs, free)
    assert machine.allocate(0, SIZE) == waiting
    assert not garbage
    got = {machine.allocate(0, SIZE) for _ in range(2)}
    assert got == {first, second}
    launch(machine, 0, *got)


# Memory that waits


def test_memory_that_waits_is_limited(machine, cuda, monkeypatch):
    monkeypatch.setattr(pool, "MOST_WAITING", 10_000)
    held = [machine.allocate(0, 3000) for _ in range(4)]
    for address in held:
        machine.free(0, address)
    assert cuda.closed == held[:3]
    large = machine.allocate(0, 20_000)
    machine.free(0, large)
    assert cuda.closed == [*held[:3], large]


@pytest.mark.parametrize("nbytes", [1, 255, 256, 257, 4096, 5000, 10**6, pool.MOST_WAITING])
def test_a_size_serves_for_what_is_a_little_smaller(nbytes):
    capacity = pool.capacity_of(nbytes)
    assert nbytes <= capacity <= max(nbytes * 9 / 8, nbytes + 256)
    assert capacity == pool.capacity_of(capacity)


def test_memory_that_will_not_wait_is_as_large_as_asked_for():
    assert pool.capacity_of(pool.MOST_WAITING + 1) == pool.MOST_WAITING + 1


# What a machine lacks


def test_a_machine_without_a_driver_says_so(monkeypatch):
    def missing():
        raise machines.DynamicLibNotFoundError("not found")

    monkeypatch.setattr(machines.Device, "get_all_devices", missing)
    with pytest.raises(NoDriverError, match="need NVIDIA's driver, which this machine lacks: install it"):
        machines.Machine()


def test_a_driver_that_fails_says_why(monkeypatch):
    def failing():
        raise RuntimeError("CUDA_ERROR_NOT_INITIALIZED")

    monkeypatch.setattr(machines.Device, "get_all_devices", failing)
    with pytest.raises(NoDriverError, match="can't be used in this process: CUDA_ERROR_NOT_INIT"):
        machines.Machine()
