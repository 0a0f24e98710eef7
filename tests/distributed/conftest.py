import pytest
from ranks import Ranks


@pytest.fixture(scope="package")
def ranks():
    """Four processes for all tests of this folder: to start them takes seconds."""
    own = Ranks(4)
    yield own
    own.close()
