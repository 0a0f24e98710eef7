"""What error messages name as remedies, followed to the letter, trains the model and not a copy of it."""

import re

import ml_dtypes
import numpy as np
import pytest

import fastopt

torch = pytest.importorskip("torch")


def refusal(call):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    return str(caught.value)


def read_only(array):
    array.flags.writeable = False
    return array


def misaligned(count):
    return np.zeros(count * 8 + 1, np.uint8)[1:].view(np.float64)


OWN_ARRAYS = {
    "strided": lambda: np.ones(6)[::2],
    "transposed": lambda: np.ones((2, 3)).T,
    "float16 in another byte order": lambda: np.ones(3, ">f2"),
    "int64": lambda: np.ones(3, np.int64),
    "misaligned": lambda: misaligned(3),
    "read-only": lambda: read_only(np.ones(3)),
}


@pytest.mark.parametrize("make", OWN_ARRAYS.values(), ids=OWN_ARRAYS)
def test_a_model_of_arrays_is_trained_by_the_remedy(make):
    model = {"w": make()}
    message = refusal(lambda: fastopt.SGD(model, lr=1.0))
    found = re.search(r"have the model itself use (.*) in its place before the optimizer is built", message)
    model["w"] = eval(found[1], {"np": np, "array": model["w"]})
    before = model["w"].copy()
    fastopt.SGD(model, lr=1.0).step({"w": np.ones_like(before)})
    np.testing.assert_array_equal(model["w"], before - 1)


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.5}], ids=str)
def test_a_table_that_is_written_is_that_of_the_model_by_the_remedy(options):
    model = {"w": np.ones((2, 4)).T}
    message = refusal(lambda: fastopt.embedding(model["w"], np.array([1]), **options))
    found = re.search(r"have the model itself use (.*) in its place before the optimizer is built", message)
    model["w"] = eval(found[1], {"np": np, "array": model["w"]})
    got = fastopt.embedding(model["w"], np.array([1]), **options)
    np.testing.assert_array_equal(got, model["w"][[1]])


OWN_TENSORS = {
    "transposed": lambda: torch.ones(2, 3).T,
    "strided": lambda: torch.ones(6)[::2],
    "expanded": lambda: torch.ones(1).expand(3),
    "float8": lambda: torch.ones(3, dtype=torch.float8_e5m2),
    "int64": lambda: torch.ones(3, dtype=torch.int64),
    "bfloat16, strided": lambda: torch.ones(6, dtype=torch.bfloat16)[::2],
}


@pytest.mark.parametrize("make", OWN_TENSORS.values(), ids=OWN_TENSORS)
def test_a_model_of_torch_is_trained_by_the_remedy(make):
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(make(), requires_grad=False)
    params = [model.w]
    message = refusal(lambda: fastopt.SGD(params, lr=1.0))
    found = re.search(r"before the optimizer is built, change the model's own: (.*)$", message)
    exec(found[1], {"params": params})
    before = model.w.detach().clone()
    fastopt.SGD(params, lr=1.0).step([torch.ones_like(before)])
    torch.testing.assert_close(model.w.detach(), before - 1, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["dense", "slices", "bags"])
@pytest.mark.parametrize(
    "make",
    [
        lambda ones: np.repeat(ones, 2, axis=1)[:, ::2],
        lambda ones: ones.astype(np.float16),
        lambda ones: ones.astype(np.int64),
        lambda ones: np.ma.masked_array(ones),
        lambda ones: torch.tensor(np.repeat(ones, 2, axis=1))[:, ::2],
        lambda ones: torch.tensor(ones).half(),
        lambda ones: torch.tensor(ones).T.contiguous().T,
    ],
)
def test_a_gradient_is_used_by_the_remedy(make, kind):
    p = np.ones((4, 3))
    opt = fastopt.SGD(p, lr=1.0)
    g = make(np.ones((4, 3)))

    def gradient(array):
        if kind == "slices":
            return fastopt.IndexedSlices(np.arange(4), array)
        if kind == "bags":
            return fastopt.BagGradient(np.arange(4)[:, None], None, array, mode="sum")
        return array

    message = refusal(lambda: opt.step(gradient(g)))
    name = {"dense": "grads", "slices": "grads.values", "bags": "grads.grad_output"}[kind]
    found = re.search(r"pass (.*?)( \(zero_grads clears.*)?$", message)
    assert (p == 1).all() and name in found[1]
    opt.step(gradient(eval(found[1].replace(name, "g"), {"np": np, "torch": torch, "g": g})))
    assert (p == 0).all()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_a_gradient_of_another_dtype_is_used_by_the_remedy(dtype):
    ours, theirs = (
        np.ones(3, dtype),
        {ml_dtypes.bfloat16: "bfloat16", np.float16: "half", np.float32: "float"},
    )
    p = getattr(torch.ones(3), theirs[dtype])()
    for params, g in ((ours, np.ones(3)), (p, torch.ones(3).double()), (p, np.ones(3))):
        opt = fastopt.SGD(params, lr=0.5)
        message = refusal(lambda opt=opt, g=g: opt.step(g))
        found = re.search(r"pass (.*?)( \(zero_grads clears.*)?$", message)
        opt.step(eval(found[1], {"np": np, "torch": torch, "ml_dtypes": ml_dtypes, "grads": g}))
    assert (ours == 0.5).all() and (p == 0).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda dense: dense.to_sparse(2),
        lambda dense: dense[1].to_sparse(1),
        lambda dense: torch.stack([dense, dense]).to_sparse(1),
    ],
)
def test_a_sparse_gradient_of_torch_is_used_by_the_remedy(make):
    dense = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [2.0, 3.0]])
    g = make(dense)
    dense = g.to_dense()
    p = torch.zeros_like(dense)
    opt = fastopt.SGD([p], lr=1.0)
    message = refusal(lambda: opt.step([g]))
    grads = [g]
    opt.step([eval(re.search("pass (.*)$", message)[1], {"fastopt": fastopt, "grads": grads})])
    assert (p == -dense).all()


def test_a_mask_of_a_parameter_is_left_off_by_the_remedy():
    params = np.ma.masked_array(np.ones(3), mask=[0, 1, 0])
    message = refusal(lambda: fastopt.SGD(params, lr=1.0))
    fastopt.SGD(eval(re.search("pass (.*?),", message)[1], {"params": params}), lr=1.0).step(np.ones(3))
    assert (params.data == 0).all()


@pytest.mark.parametrize(
    "make", [lambda: np.full((2, 4), 3.0)[:, ::2], lambda: read_only(np.full((2, 2), 3.0))]
)
@pytest.mark.parametrize("clip", [fastopt.clip_grad_norm, fastopt.clip_grad_value])
def test_a_gradient_is_clipped_by_the_remedy(make, clip):
    grads = [make()]
    message = refusal(lambda: clip(grads, 0.5))
    found = re.search(r"pass (.*), and the same array to step$", message)
    grads[0] = eval(found[1], {"np": np, "grads": grads})
    clip(grads, 0.5)
    p = np.zeros((2, 2))
    fastopt.SGD([p], lr=1.0).step(grads)
    assert (abs(p) <= 0.5).all() and (p < 0).all()


def test_a_read_only_gradient_is_used_without_clearing_it():
    p, g = np.ones(3), read_only(np.ones(3))
    opt = fastopt.SGD(p, lr=1.0)
    assert "leave out zero_grads" in refusal(lambda: opt.step(g, zero_grads=True))
    opt.step(g)
    assert (p == 0).all()


def test_a_gradient_that_shares_memory_is_used_as_a_copy():
    p = np.ones(3)
    opt = fastopt.SGD(p, lr=1.0)
    assert "a copy of the gradient" in refusal(lambda: opt.step(p))
    opt.step(p.copy())
    assert (p == 0).all()


def test_numbers_that_are_no_rows_have_no_remedy_that_makes_them_rows():
    table = np.ones((4, 2))
    mask = np.array([False, True, False, True])
    message = refusal(lambda: fastopt.embedding(table, mask))
    rows = eval(re.search("pass (.*)$", message)[1], {"np": np, "mask": mask})
    assert fastopt.embedding(table, rows).shape == (2, 2)
    assert "astype" not in refusal(lambda: fastopt.embedding(table, np.array([1.5])))
    for indices in (np.array([3], np.uint8), torch.tensor([3], dtype=torch.int16)):
        message = refusal(lambda indices=indices: fastopt.embedding(table, indices))
        own = eval(re.search("pass (.*)$", message)[1], {"np": np, "indices": indices})
        assert fastopt.embedding(table, own).shape == (1, 2)
