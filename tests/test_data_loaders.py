"""Plans that the workers of torch's DataLoader make, through its default collate."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastopt

torch = pytest.importorskip("torch")
data = torch.utils.data

ROWS = 50


def indices_of(number):
    return np.random.default_rng(number).integers(0, ROWS, 20 + number)


class Batches(data.Dataset):
    """Whole batches, with plans in a dict, in a tuple, and in a gradient."""

    def __len__(self):
        return 4

    def __getitem__(self, number):
        plan = fastopt.IndexPlan(indices_of(number), ROWS)
        return {"plan": plan, "pair": (plan, np.full(3, number)), "number": number}


class Gradients(Batches):
    def __getitem__(self, number):
        plan = fastopt.IndexPlan(indices_of(number), ROWS)
        return fastopt.IndexedSlices(plan, np.full((plan.indices.size, 2), number, np.float32))


def assert_plan_of(plan, indices):
    distinct, counts = np.unique(indices, return_counts=True)
    assert type(plan) is fastopt.IndexPlan and plan.rows == ROWS
    np.testing.assert_array_equal(plan.indices, indices)
    np.testing.assert_array_equal(plan.distinct, distinct)
    np.testing.assert_array_equal(plan.counts, counts)
    table = np.random.default_rng(0).standard_normal((ROWS, 4))
    np.testing.assert_array_equal(fastopt.embedding(table, plan), table[indices])


def plans_go_through_a_loader(size, workers):
    items = []
    for batch in data.DataLoader(Batches(), batch_size=size, num_workers=workers):
        numbers = np.atleast_1d(batch["number"]).tolist()
        indices = np.concatenate([indices_of(number) for number in numbers])
        assert_plan_of(batch["plan"], indices)
        assert_plan_of(batch["pair"][0], indices)
        assert batch["pair"][1].tolist() == ([[k] * 3 for k in numbers] if size else numbers * 3)
        assert data._utils.pin_memory.pin_memory(batch["plan"]) is batch["plan"]
        items += numbers
    assert items == [0, 1, 2, 3]


def gradients_go_through_a_loader_of_whole_batches(workers):
    table = np.zeros((ROWS, 2), np.float32)
    opt = fastopt.SGD(table, lr=1.0)
    for number, gradient in enumerate(data.DataLoader(Gradients(), batch_size=None, num_workers=workers)):
        table[:] = 0
        opt.step(gradient)
        np.testing.assert_array_equal(-table[:, 0], number * np.bincount(indices_of(number), minlength=ROWS))


@pytest.mark.parametrize("size", [None, 1, 2])
def test_plans_go_through_a_loader(size):
    plans_go_through_a_loader(size, 0)


def test_gradients_that_hold_plans_go_through_a_loader_of_whole_batches():
    gradients_go_through_a_loader_of_whole_batches(0)


def test_they_come_from_workers():
    """In a process of its own, as they are forked, and other tests may have left threads."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_data_loaders as tests
for size in (None, 1, 2):
    tests.plans_go_through_a_loader(size, 2)
tests.gradients_go_through_a_loader_of_whole_batches(2)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_what_becomes_of_several_plans():
    def collated(*plans):
        return data.default_collate([fastopt.IndexPlan(np.asarray(of), rows) for of, rows in plans])

    one = fastopt.IndexPlan(np.array([[3, 1]]), ROWS)
    assert data.default_collate([one]) is one
    assert collated((np.int32(4), 5), (np.int32(2), 5)).indices.tolist() == [4, 2]
    mixed = collated(([[1, 2]], 5), (np.array([[3, 0], [1, 1]], np.int32), 5))
    assert mixed.indices.tolist() == [[1, 2], [3, 0], [1, 1]] and mixed.indices.dtype == np.int64
    with pytest.raises(
        ValueError, match=r"batch\[1\] is a plan for 6 rows and batch\[0\] for 5: .* a key of"
    ):
        collated(([1], 5), ([1], 6))
    with pytest.raises(
        ValueError, match=r"batch\[1\].indices has shape \(1, 3\) and batch\[0\].indices \(1, 2"
    ):
        collated(([[1, 2]], 5), ([[1, 2, 3]], 5))
    with pytest.raises(TypeError, match=r"batch\[1\] is an int and batch\[0\] an IndexPlan"):
        data.default_collate([one, 3])


def test_plans_that_were_made_before_torch_was_loaded():
    """A process that gets them, as a worker that was spawned does, loads torch first or last."""
    script = """
import pickle, sys
import numpy as np
import fastopt
text = pickle.dumps(fastopt.IndexPlan(np.array([3, 1]), 5))
assert "torch" not in sys.modules
import torch
plan = pickle.loads(text)
assert torch.utils.data.default_collate([plan, plan]).indices.tolist() == [3, 1, 3, 1]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
