"""Adafactor of matrices, and its reference, against torch.optim.Adafactor and the formula."""

import ml_dtypes
import numba
import numpy as np
import pytest
import reference

from fastopt.kernels import formats, rules
from fastopt.kernels.cpu import threads
from fastopt.kernels.cpu.backend.addresses import address
from fastopt.kernels.cpu.factored import LANES, TILE_COLUMNS, TILE_ROWS, tile_arguments, update_tiles
from fastopt.kernels.rule import Decoupled

PLAIN, BFLOAT16 = formats.PLAIN, formats.BFLOAT16
# around the ends of tiles and of what is worked on at a time
SHAPES = [
    (1, 1), (5, 3), (TILE_ROWS + 1, 7), (3, LANES + 1), (2, 3, 4), (3, 2, 2 * TILE_ROWS, 9),
    (70, 2 * LANES), (2, 33, TILE_COLUMNS + 1),
]  # fmt: skip
OPTIONS = {"lr": 0.3, "beta2_decay": -0.6, "eps": (1e-3, 0.02), "d": 1.5, "weight_decay": 0.05}


def state_of(p):
    matrices = int(np.prod(p.shape[:-2]))
    return (matrices, *p.shape[-2:]), *(np.zeros(matrices * n, p.dtype) for n in p.shape[-2:])


def update(p, g, state, step, options, members=(PLAIN, PLAIN), master=None, scale=1.0, zero_grads=False):
    """A step of ``p``, with the numbers of the type of its state."""
    shape, row_var, col_var = state
    dtype = row_var.dtype.type
    lr, weight_decay = options["lr"], options["weight_decay"]
    h = rules.ADAFACTOR.fold(step, options, dtype)
    c = Decoupled(-scale if options.get("maximize") else scale, np.inf, 1 - lr * weight_decay)
    numbers = np.array([*h, *c])
    places = np.array([address(p), 0 if master is None else address(master), address(g), 0])
    h, c = (type(t)(*map(float, t)) for t in (h, c))  # as launches have them, which share this kernel
    kinds = formats.formats(*members)
    given = h, c, dtype(0), kinds, places, shape, row_var, col_var, numbers, zero_grads
    update_tiles(p.size, *tile_arguments(*given))


CASES = [(shape, np.float32) for shape in SHAPES] + [(shape, np.float64) for shape in SHAPES[:-1]]


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_matrices_follow_torch(shape, dtype):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    for options in (
        OPTIONS,
        {**OPTIONS, "d": 1.0, "eps": (1e-9, 1e-3), "weight_decay": 0.0, "maximize": True},
    ):
        p = np.asarray(rng.standard_normal(shape), dtype)
        twin = torch.nn.Parameter(torch.from_numpy(p.copy()))
        opt = torch.optim.Adafactor([twin], **options)
        state = state_of(p)
        for step in range(1, 5):
            g = np.asarray(rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3), dtype)
            twin.grad = torch.from_numpy(g.copy())
            opt.step()
            update(p, g, state, step, options)
        unit = 64 * np.finfo(dtype).eps
        np.testing.assert_allclose(p, twin.detach().numpy(), rtol=0, atol=unit * max(1, reference.peak(p)))
        for name, own in zip(("row_var", "col_var"), state[1:], strict=True):
            np.testing.assert_allclose(own, opt.state[twin][name].numpy().reshape(-1), rtol=unit)


@pytest.mark.parametrize("shape", [(), (9,), (4, 7), (2, 3, 5)], ids=str)
def test_the_reference_follows_torch(shape):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    for options in (OPTIONS, {**OPTIONS, "eps": (1e-9, 1e-3), "weight_decay": 0.0, "maximize": True}):
        start = np.asarray(rng.standard_normal(shape))
        twin = torch.nn.Parameter(torch.from_numpy(start.copy()))
        opt = torch.optim.Adafactor([twin], **options)
        tracked = reference.Tracked(reference.adafactor, start, options)
        for _ in range(5):
            g = np.asarray(rng.standard_normal(shape))
            twin.grad = torch.from_numpy(g.copy())
            opt.step()
            tracked.step(g)
        np.testing.assert_allclose(tracked.p, twin.detach().numpy(), rtol=1e-12, atol=1e-14)
        for name, want in tracked.state.items():
            np.testing.assert_allclose(want, opt.state[twin][name].numpy(), rtol=1e-12)


@pytest.mark.parametrize("master", [False, True], ids=["stored", "master"])
def test_stored_formats_are_rounded_once(master):
    rng = np.random.default_rng(3)
    shape = (2, TILE_ROWS + 3, LANES + 5)
    kinds = (formats.BFLOAT16_OF if master else BFLOAT16, BFLOAT16)
    stored = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
    own_master = stored.astype(np.float32) if master else None
    state = state_of(np.zeros(shape, np.float32))
    want_state = reference.new_state(reference.adafactor, np.zeros(shape), {})
    for step in range(1, 4):
        g = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
        before = (own_master if master else stored).astype(np.float64)
        want = reference.adafactor(before, -0.5 * g.astype(np.float64), want_state, step, **OPTIONS)
        update(stored, g, state, step, OPTIONS, kinds, master=own_master, scale=-0.5)
        if master:
            np.testing.assert_allclose(own_master, want, rtol=0, atol=1e-5)
            np.testing.assert_array_equal(stored, own_master.astype(ml_dtypes.bfloat16))
        else:
            np.testing.assert_allclose(stored.astype(np.float64), want, rtol=2.0**-8, atol=1e-5)


def test_bits_do_not_depend_on_threads(restored_threads, monkeypatch):
    def run():
        rng = np.random.default_rng(4)
        p = rng.standard_normal((2, 3 * TILE_ROWS + 1, TILE_COLUMNS + LANES + 3)).astype(np.float32)
        state = state_of(p)
        for step in range(1, 3):
            update(p, rng.standard_normal(p.shape).astype(np.float32), state, step, OPTIONS)
        return b"".join(array.tobytes() for array in (p, *state[1:]))

    want = run()
    numba.set_num_threads(1)
    assert run() == want
    monkeypatch.setattr(threads, "PARALLEL_FROM", 2**62)
    assert run() == want


def test_gradients_are_cleared_after_the_last_pass():
    p = np.ones((2, TILE_ROWS + 2, LANES + 2), np.float32)
    twin, g = p.copy(), np.random.default_rng(5).standard_normal(p.shape).astype(np.float32)
    update(p, g, state_of(p), 1, OPTIONS)
    update(twin, g, state_of(p), 1, OPTIONS, zero_grads=True)
    np.testing.assert_array_equal(p, twin)
    assert not g.any()


def test_a_gradient_of_zeros_moves_nothing_and_none_is_needed():
    p = np.ones((3, 5), np.float32)
    update(p, np.zeros_like(p), state_of(p), 1, {**OPTIONS, "weight_decay": 0.0})
    np.testing.assert_array_equal(p, 1)
    empty = np.ones((0, 5), np.float32)
    update(empty, empty, state_of(empty), 1, OPTIONS)


def test_a_nan_shows_in_the_state_of_its_row_and_column_alone():
    p, g = np.ones((4, 6), np.float32), np.ones((4, 6), np.float32)
    g[1, 2] = np.nan
    state = state_of(p)
    update(p, g, state, 1, OPTIONS)
    assert list(np.flatnonzero(np.isnan(state[1]))) == [1]
    assert list(np.flatnonzero(np.isnan(state[2]))) == [2]
    assert np.isnan(p[1, 2])
