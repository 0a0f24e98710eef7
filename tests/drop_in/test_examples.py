"""The programs in docs/examples, at sizes that take a moment: what they promise holds."""

import difflib
import importlib
import inspect

import dlrm
import knowledge_graph
import matrix_factorisation
import numba
import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """What is small is not worth waiting for a second thread."""
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    numba.set_num_threads(before[1])


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


SMALL = {"tables": 5, "largest": 100, "dim": 8, "batch": 256, "steps": 30}


def falls(losses, below):
    """Whether the last losses are below so much of the first ones."""
    return np.mean(losses[-3:]) < below * np.mean(losses[:3])


def test_dlrm_has_the_losses_of_torch():
    curves = dlrm.main(**SMALL)
    # Two units in the last place of the losses; one was found.
    np.testing.assert_allclose(curves["fastopt"], curves["torch"], rtol=0, atol=2.0**-23)
    np.testing.assert_allclose(curves["together"], curves["fastopt"], rtol=0, atol=2.0**-23)
    assert falls(curves["fastopt"], 0.95)


def test_dlrm_has_them_to_the_last_bits_in_float64(float64):
    """At a higher rate, and twenty lookups a feature, where in float32 rounding is amplified."""
    curves = dlrm.main(**{**SMALL, "batch": 128}, bags=20, lr=3e-3)
    np.testing.assert_allclose(curves["fastopt"], curves["torch"], rtol=1e-13)
    assert falls(curves["fastopt"], 0.8)


def test_dlrm_learns_by_one_adam():
    curves = dlrm.main(dlrm.Optimizer.adam, **SMALL)
    assert falls(curves["torch"], 0.95)
    assert falls(curves["fastopt"], 0.95)


def test_of_the_builders_of_dlrm_two_lines_differ():
    before, after = (inspect.getsource(f).splitlines() for f in (dlrm.torch_model, dlrm.fastopt_model))
    changed = [line for line in difflib.ndiff(before[1:], after[1:]) if line[0] in "-+"]
    assert [line[0] for line in changed] == ["-", "+", "-", "+"]


def test_factors_of_ratings_reach_the_noise():
    errors = matrix_factorisation.main(users=200, items=100, ratings=30_000, batch=512)
    assert errors["torch"][0] > 2 * matrix_factorisation.NOISE
    assert errors["torch"][-1] < 1.05 * matrix_factorisation.NOISE
    np.testing.assert_allclose(errors["numpy"], errors["torch"], rtol=1e-6)


def test_moves_on_a_map_are_found():
    losses, before, after = knowledge_graph.main(width=12, epochs=20, batch=64)
    assert falls(losses, 0.2)
    assert before < 0.15
    assert after > 0.75


@pytest.mark.parametrize(
    ("precision", "limit"),
    [
        ("32-true", 1e-5),
        ("bf16-mixed", 2.0**-8),  # a weight rounded the other way is off by as much
    ],
)
def test_lightning_trains_as_with_torch_and_resumes(precision, limit):
    pytest.importorskip("lightning")
    example = importlib.import_module("lightning_module")
    small = {"samples": 2_000, "epochs": 6, "width": 64, "precision": precision}
    whole, resumed = example.main(**small)
    assert resumed == whole
    theirs, _ = example.main(torch.optim.AdamW, **small)
    np.testing.assert_allclose(whole, theirs, rtol=0, atol=limit)
    assert falls(whole, 0.3)
