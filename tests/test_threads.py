"""How many threads kernels take, and others beside them."""

import os
import subprocess
import sys

import pytest

STEP = """
import numba, numpy as np, fastopt
def step():
    table = np.ones(300_000, np.float32)
    fastopt.SGD([table], lr=0.5).step([table.copy()])
    assert (table == 0.5).all()
"""


def printed(code, first="numba", **environment):
    """By a new process, with 4 threads of Numba if nothing else is said."""
    kept = {name: own for name, own in os.environ.items() if "NUM_THREADS" not in name}
    own = {**kept, "NUMBA_NUM_THREADS": "4", **environment}
    own = {name: value for name, value in own.items() if value}
    return subprocess.check_output(
        [sys.executable, "-c", f"import {first}\n{STEP}{code}"], text=True, env=own
    ).split()


@pytest.mark.parametrize("first", ["torch", "numba"])
def test_torch_keeps_its_number_of_threads(first):
    """It shares OpenMP with Numba, which sets the number for both when it starts its threads."""
    code = "step(); import torch; print(torch.get_num_threads(), numba.get_num_threads())"
    assert printed(code, first, OMP_NUM_THREADS="1") == ["1", "4"]


@pytest.mark.parametrize(
    "given, share",
    [({"NUMBA_NUM_THREADS": ""}, 2), ({"NUMBA_NUM_THREADS": "4"}, 1)],
    ids=["of the cores", "unless told"],
)
def test_processes_of_torchrun_share_the_cores(given, share):
    found, of = map(
        int,
        printed(
            "step(); print(numba.get_num_threads(), numba.config.NUMBA_NUM_THREADS)",
            LOCAL_WORLD_SIZE="2",
            **given,
        ),
    )
    assert found == max(1, of // share)


def test_a_number_that_was_set_stays():
    assert printed(
        "numba.set_num_threads(3); step(); print(numba.get_num_threads())", LOCAL_WORLD_SIZE="2"
    ) == ["3"]
