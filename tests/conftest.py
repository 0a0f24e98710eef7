import gc
import os
import signal

import numba
import pytest
from hypothesis import HealthCheck, settings

# A shell lets what it runs in the background ignore SIGINT, which tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Kernels compile at their first use, so no example has a deadline and the first may be slow.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}

# The same examples in every run, so that a failure is one of the code and not of the day. The search for
# others is a profile of its own: each --hypothesis-seed has other examples.
settings.register_profile("deterministic", max_examples=15, derandomize=True, database=None, **COMMON)
settings.register_profile("thorough", max_examples=200, derandomize=False, database=None, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "deterministic"))

# Compiling makes millions of objects that stay: a collection of them all takes seconds, and finds nothing.
gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def what_stays_is_left_out_of_later_collections():
    """Each module is collected once, and what is left of it then never again."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def restored_threads():
    """Threads may be set by the test."""
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)
