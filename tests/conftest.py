import os

import numba
import pytest
from hypothesis import HealthCheck, settings

# Kernels compile at their first use, so no example has a deadline and the first may be slow.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}

settings.register_profile("local", max_examples=15, **COMMON)
settings.register_profile("ci", max_examples=15, derandomize=True, database=None, **COMMON)
settings.register_profile("thorough", max_examples=200, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "local"))


@pytest.fixture
def restored_threads():
    """Threads may be set by the test."""
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)
