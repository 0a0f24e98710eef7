"""The README's Python examples run as they stand."""

import re
from pathlib import Path

import numpy as np
import pytest

import fastopt

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # tables in files are made there
    if "import jax" in BLOCKS[number]:
        pytest.importorskip("jax")
    exec(compile(BLOCKS[number], f"README example {number}", "exec"), {"__name__": f"readme{number}"})


def test_trainer_example_trains():
    names = {"__name__": "readme"}
    source = next(block for block in BLOCKS if "opt.step" in block)
    setup, loop = source.split("for _ in range(100):")
    exec(setup, names)
    before = np.square(names["params"]["table"]).mean()
    exec("for _ in range(100):" + loop, names)
    assert np.square(names["params"]["table"]).mean() < before


def test_every_optimizer_has_a_row():
    table = README.read_text().split("## Optimizers")[1]
    classes = [
        name
        for name in fastopt.__all__
        if isinstance(getattr(fastopt, name), type)
        and issubclass(getattr(fastopt, name), fastopt.Optimizer)
        and name != "Optimizer"
    ]
    assert len(classes) == 14
    for name in classes:
        assert f"| `{name}`" in table, name
