import pytest
import torch
from ranks import Ranks


@pytest.fixture(scope="package")
def ranks():
    """Four processes for all tests of this folder: to start them takes seconds."""
    own = Ranks(4)
    yield own
    own.close()


@pytest.fixture(scope="package")
def gpus():
    """Processes with a GPU of this machine each: 4, 2 or 1, by which means over ranks have the same bits."""
    count = next((own for own in (4, 2, 1) if own <= torch.cuda.device_count()), 0)
    if not count:
        pytest.skip("torch finds no GPU")
    own = Ranks(count, "nccl")
    yield own
    own.close()
