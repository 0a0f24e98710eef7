"""The conformance suite of the seam for devices: every backend is judged by these tests."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from devices import ALL, Cpu, watched


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "covers(*names): names of the protocol Backend that a test is about")
    config.addinivalue_line("markers", "host: about what the host's backend alone has")


@pytest.fixture(params=ALL)
def device(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A device. A test that is marked to cover a name must have asked its backend for it."""
    made = request.param()
    if request.node.get_closest_marker("host") and not isinstance(made, Cpu):
        pytest.skip("the host's alone")
    made.backend = watched(made)
    yield made
    names = {name for mark in request.node.iter_markers("covers") for name in mark.args}
    assert names <= made.backend.asked, f"marked, and not used: {names - made.backend.asked}"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)
