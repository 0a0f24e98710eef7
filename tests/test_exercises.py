"""Adding an optimizer, a storage format, or a kind of gradient is one file each (``exercises/``)."""

import ml_dtypes
import numpy as np
import pytest
from exercises import gradient, optimizer

import fastopt
from fastopt.kernels import formats

ROWS, DIM = 9, 300


def start(rng):
    return rng.standard_normal((ROWS, DIM)).astype(np.float32)


@pytest.mark.parametrize("options", [{}, {"rows": "dense"}], ids=["lazy", "dense"])
def test_an_optimizer_in_one_file_has_dense_and_sparse_updates(options):
    rng = np.random.default_rng(0)
    own = start(rng)
    twin = own.copy()
    opt = optimizer.Leaky(own, lr=0.25, leak=0.5, **options)
    known = fastopt.SGD(twin, lr=0.25, momentum=0.5, **options)
    for step in range(6):
        values = np.rint(rng.standard_normal((5, DIM)) * 8).astype(np.float32) / 8
        grad = start(rng) if step % 3 == 0 else fastopt.IndexedSlices(rng.integers(0, ROWS, 5), values)
        for one in (opt, known):
            one.step(grad)
    for one in (opt, known):
        one.flush()
    np.testing.assert_allclose(own, twin, rtol=0, atol=2e-6)
    saved = opt.state_dict()
    assert list(saved["state"][0]) == ["step", "total"]
    again = optimizer.Leaky(own.copy(), **options)
    again.load_state_dict(saved)


@pytest.fixture
def storage():
    from exercises import storage

    yield storage
    formats.STATE_DTYPES.pop(storage.NAME)


def test_a_storage_format_in_one_file_stores_state_wherever_it_lies(storage, tmp_path):
    rng = np.random.default_rng(1)
    p, lr = start(rng), 0.5
    opt = fastopt.SGD(p, lr=lr, momentum=0.5, state_dtype=storage.NAME)
    want, momentum = p.copy(), np.zeros_like(p)
    with fastopt.open_table(tmp_path / "t", ROWS, DIM, init=lambda a, b: want[a:b]) as table:
        in_files = fastopt.SGD(table, lr=lr, momentum=0.5, state_dtype=storage.NAME)
        for _ in range(4):
            g = np.rint(start(rng) * 4) / np.float32(4)
            slices = fastopt.IndexedSlices(np.arange(ROWS), g)
            opt.step(g)
            in_files.step(slices)
            momentum = np.float32(0.5) * momentum + g
            want -= np.float32(lr) * momentum
            momentum = (momentum.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        np.testing.assert_array_equal(table.weights, want)
    np.testing.assert_array_equal(p, want)
    stored = opt.state_dict()["state"][0]["momentum_buffer"]
    assert stored.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(stored.astype(np.float32), momentum)


def test_a_kind_of_gradient_in_one_file_goes_wherever_gradients_go():
    rng = np.random.default_rng(2)
    own, values = start(rng), start(rng)[:4]
    twin = own.copy()
    grad, known = gradient.RowRange(3, values.copy()), fastopt.IndexedSlices(np.arange(3, 7), values.copy())
    assert fastopt.grad_norm([grad]) == fastopt.grad_norm([known])
    info = [fastopt.Adam(p).step(g, clip_norm=1.0) for p, g in ((own, grad), (twin, known))]
    assert info[0] == info[1] and info[0].clipped
    assert own.tobytes() == twin.tobytes()
    fastopt.clip_grad_value({"a": grad}, 0.5)
    assert np.abs(grad.values).max() == 0.5
    fastopt.Adam(own).step(grad, zero_grads=True)
    assert not grad.values.any()
    with pytest.raises(ValueError, match=r"grads has the rows 6 to 10: expected rows of the table"):
        fastopt.SGD(own).step(gradient.RowRange(6, values))
    with pytest.raises(ValueError, match=r"shares memory with params"):
        fastopt.SGD(own).step(gradient.RowRange(0, own[2:4]))
