"""Arrays of JAX as gradients, indices and options; parameters stay NumPy arrays, which JAX reads."""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import fastopt


@pytest.fixture(scope="module")
def jax():
    return pytest.importorskip("jax")


class Dense(NamedTuple):
    weight: Any
    bias: Any = None


def test_a_training_loop_over_a_tree(jax):
    """Of a network of two layers, against the same steps with gradients that NumPy holds."""
    jnp, rng = jax.numpy, np.random.default_rng(0)
    params = {
        "layers": [
            Dense(rng.standard_normal((8, 16), dtype=np.float32), np.zeros(16, np.float32)),
            Dense(rng.standard_normal((16, 1), dtype=np.float32)),
        ],
        "scale": np.ones((), np.float32),
    }
    twin = jax.tree.map(np.copy, params)
    x = rng.standard_normal((64, 8), dtype=np.float32)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        first, second = params["layers"]
        found = params["scale"] * (jnp.tanh(x @ first.weight + first.bias) @ second.weight)
        return ((found - x.sum(axis=1, keepdims=True)) ** 2).mean()

    opt = fastopt.AdamW(params, lr=jnp.float32(0.02))
    peer = fastopt.AdamW(jax.tree.leaves(twin), lr=float(np.float32(0.02)))
    losses = []
    for _ in range(60):
        value, grads = loss(params)
        own = [np.array(grad) for grad in jax.tree.leaves(grads)]
        assert opt.step(grads, clip_norm=1.0) == peer.step(own, clip_norm=1.0)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 10
    assert list(opt.state) == ["layers.0.weight", "layers.0.bias", "layers.1.weight", "scale"]
    for p, q in zip(jax.tree.leaves(params), jax.tree.leaves(twin), strict=True):
        np.testing.assert_array_equal(p, q)
    assert fastopt.grad_norm(grads) == fastopt.grad_norm(own)


def test_gradients_are_not_copied(jax):
    grad = jax.numpy.ones(3, np.float32) * 2
    opt = fastopt.SGD(np.zeros(3, np.float32))
    opt.step(grad)
    assert opt._planner.kept.gradients_at.tolist() == [grad.unsafe_buffer_pointer()]


def test_gradients_of_16_bits(jax):
    p = np.zeros((2, 2), ml_dtypes.bfloat16)
    opt = fastopt.SGD(p, lr=1.0)
    opt.step(jax.numpy.ones((2, 2), jax.numpy.bfloat16))
    opt.step(jax.numpy.ones((2, 2), np.float32))
    opt.step(fastopt.IndexedSlices(jax.numpy.array([1]), jax.numpy.ones((1, 2), jax.numpy.bfloat16)))
    assert p.tolist() == [[-2, -2], [-3, -3]]


def test_sparse_gradients_and_lookups(jax):
    jnp = jax.numpy
    table = np.arange(10, dtype=np.float32).reshape(5, 2)
    before, indices, offsets = table.copy(), jnp.array([1, 3, 1]), jnp.array([0, 2])
    np.testing.assert_array_equal(fastopt.embedding(table, indices), before[[1, 3, 1]])
    np.testing.assert_array_equal(fastopt.embedding(jnp.asarray(before), indices), before[[1, 3, 1]])
    weights = jnp.array([1.0, 2.0, 0.5])
    pooled = fastopt.embedding_bag(table, indices, offsets, mode="sum", per_sample_weights=weights)
    np.testing.assert_array_equal(pooled, [before[1] + 2 * before[3], 0.5 * before[1]])
    plan = fastopt.IndexPlan(indices, 5)
    assert plan.distinct.tolist() == [1, 3]
    opt = fastopt.SGD({"table": [table]}, lr=1.0)
    opt.step({"table": [fastopt.IndexedSlices(indices, jnp.ones((3, 2)))]})
    opt.step({"table": [fastopt.BagGradient(plan, offsets, jnp.ones((2, 2)), "sum", weights)]})
    np.testing.assert_array_equal(before - table, np.array([0, 2 + 1.5, 0, 1 + 2, 0])[:, None] * [1, 1])


def test_what_jax_can_not_have_changed_is_refused(jax):
    jnp, p = jax.numpy, np.zeros(2, np.float32)
    grads = {"a": [jnp.ones(2)]}
    for params, label in ((grads, r"params\['a'\]\[0\]"), (jnp.ones(2), "params")):
        with pytest.raises(
            TypeError, match=rf"^{label} is an array of JAX, .*jax.tree.map\(np.array, params"
        ):
            fastopt.SGD(params)
    opt = fastopt.SGD({"a": [p]}, lr=1.0)
    with pytest.raises(ValueError, match=r"^grads\['a'\]\[0\] is read-only: .* leave out zero_grads"):
        opt.step(grads, zero_grads=True)
    with pytest.raises(ValueError, match=r"is read-only: .*; pass np.array\(grads\['a'\]\[0\]\)"):
        fastopt.clip_grad_norm(grads, 0.1)
    with pytest.raises(TypeError, match=r"^grads\['a'\]\[0\] has no numbers while JAX traces a function"):
        jax.jit(lambda grads: opt.step(grads))(grads)
    with pytest.raises(
        TypeError, match=r"\[0\] has dtype int32 but .*: pass grads\['a'\]\[0\].astype\(np.flo"
    ):
        opt.step({"a": [jnp.ones(2, np.int32)]})
    with pytest.raises(TypeError, match=r"indices has dtype uint8: .*; pass indices.astype\(np.int64"):
        fastopt.IndexPlan(jnp.ones(2, np.uint8), 5)
    grads["a"][0].delete()
    with pytest.raises(TypeError, match=r"^grads\['a'\]\[0\] can't be seen as a NumPy array: Array has been"):
        opt.step(grads)
    assert opt.steps == 0 and not p.any()


def test_a_step_waits_for_its_gradients(jax):
    """JAX returns an array before it is computed."""
    x = np.full((256, 256), 1 / 256, np.float32)  # whose product with itself is the same
    late = jax.jit(lambda x: jax.lax.fori_loop(0, 40, lambda _, y: x @ y, x))
    late(x).block_until_ready()
    p = np.zeros_like(x)
    opt = fastopt.SGD(p, lr=256.0)
    for _ in range(3):
        opt.step(late(x))
    assert (p == -3).all()
