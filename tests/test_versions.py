"""Tensors that are written have their version counters advanced, so that graphs that saved them refuse."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

import fastopt
from fastopt._core.versions import written

torch = pytest.importorskip("torch")

INDICES, OFFSETS = np.array([0, 2, 2]), np.array([0, 1])
WRITES = {
    "clip_grad_norm": lambda t: fastopt.clip_grad_norm({"a": [np.ones(2), t]}, 0.1),
    "clip_grad_norm of slices": lambda t: fastopt.clip_grad_norm(fastopt.IndexedSlices(INDICES, t), 0.1),
    "clip_grad_norm of bags": lambda t: fastopt.clip_grad_norm(
        fastopt.BagGradient(INDICES, np.array([0, 1, 1]), t, "mean"), 0.1
    ),
    "clip_grad_value": lambda t: fastopt.clip_grad_value([t, None, np.ones(2)], 0.1),
    "clip_grad_value of slices": lambda t: fastopt.clip_grad_value(fastopt.IndexedSlices(INDICES, t), 0.1),
    "embedding": lambda t: fastopt.embedding(t, INDICES, max_norm=0.1),
    "embedding_bag": lambda t: fastopt.embedding_bag(t, INDICES, OFFSETS, mode="mean", max_norm=0.1),
}
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize(
    "of", [lambda t: t, torch.Tensor.detach, lambda t: t.view(3, 2), lambda t: t.detach()[:]],
    ids=["itself", "detached", "a view", "a view of it detached"],
)  # fmt: skip
def test_a_graph_that_saved_what_is_written_refuses(write, dtype, of):
    t = torch.ones(3, 2, dtype=dtype, requires_grad=True)
    loss = (t**2).sum()
    write(of(t))
    assert (t < 1).any()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_graph_that_saved_another_tensor_goes_on(write):
    t, other = torch.ones(3, 2), torch.ones(3, 2, requires_grad=True)
    loss = (other**2).sum()
    write(t)
    loss.backward()
    assert (other.grad == 2).all()


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_tensors_without_a_counter_are_written(write):
    with torch.inference_mode():
        t = torch.ones(3, 2)
    write(t)
    assert (t < 1).any()


def test_what_is_only_read_keeps_its_version():
    t = torch.ones(3, 2, requires_grad=True)
    fastopt.grad_norm([t, fastopt.IndexedSlices(INDICES, t)])
    fastopt.clip_grad_norm(t, 1e3)
    fastopt.embedding(t, INDICES)
    fastopt.embedding_bag(t, INDICES, OFFSETS, mode="max")
    with pytest.raises(ValueError, match="is read-only"):
        fastopt.clip_grad_norm([t, np.broadcast_to(np.ones(1), (1,))], 0.1)
    assert t._version == 0


def test_tensors_are_found_among_anything():
    with torch.inference_mode():
        without = torch.ones(1)
    tensors = [torch.ones(2), torch.nn.Parameter(torch.ones(2)), torch.ones(4)[1:]]
    written([np.ones(2), None, tensors[0], 3, without, *tensors[1:]])
    assert [t._version for t in tensors] == [1, 1, 1]
    written([])
    written((None,))


def test_torch_may_take_one_tensor_at_a_time(monkeypatch):
    """As torch 2.4 does, which refuses lists, and tensors without a counter."""
    now = torch.autograd.graph.increment_version

    def of_one(tensor):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError("expected a tensor")
        if tensor.is_inference():
            raise RuntimeError("it has no counter")
        now(tensor)

    monkeypatch.setattr(torch.autograd.graph, "increment_version", of_one)
    with torch.inference_mode():
        without = torch.ones(1)
    tensors = [torch.ones(2), torch.ones(3)]
    written([tensors[0], without, tensors[1]])
    assert [t._version for t in tensors] == [1, 1]


def test_nothing_is_asked_of_torch_without_tensors(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(Tensor=torch.Tensor))
    written([np.ones(2), None])
    monkeypatch.delitem(sys.modules, "torch")
    written([torch.ones(2)])
