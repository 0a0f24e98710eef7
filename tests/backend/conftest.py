"""The conformance suite of the seam for devices: every backend is judged by these tests."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from backend.devices import DEVICES


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "covers(*names): names of the protocol Backend that a test is about")


@pytest.fixture(params=DEVICES, ids=lambda device: device.__name__)
def device(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A device. A test that is marked to cover a name must have asked its backend for it."""
    made = request.param()
    yield made
    names = {name for mark in request.node.iter_markers("covers") for name in mark.args}
    assert names <= made.backend.asked, f"marked, and not used: {names - made.backend.asked}"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)
