"""What must never change silently: the bits of every optimizer, and state files of earlier versions."""

import json
import shutil
from pathlib import Path

import golden_runs
import pytest

FOLDER = Path(__file__).parent / "golden"
DIGESTS = json.loads((FOLDER / "digests.json").read_text())


RUNS = [(optimizer, gradient) for optimizer in golden_runs.OPTIMIZERS for gradient in ("dense", "slices")]
RUNS += [
    (optimizer, "dense_rows") for optimizer in ("sgd", "nesterov", "adamw", "lion")
]  # each way to catch up


@pytest.mark.parametrize(("optimizer", "gradient"), RUNS, ids=map("-".join, RUNS))
def test_the_bits_of_an_optimizer_are_what_they_were(optimizer, gradient):
    run = golden_runs.Run(optimizer, "float32", gradient, None, False, False)
    assert golden_runs.digest(run, 1) == DIGESTS["runs"][str(run)]


def test_files_of_an_earlier_version_go_on_with_the_same_bits(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "golden")
    assert golden_runs.go_on(str(tmp_path / "golden")) == DIGESTS["saved"]
