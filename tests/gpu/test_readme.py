"""The README's examples for a GPU run: as they stand on a real one, and on an interpreted one with arrays of
its own in the place of torch's."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from devices import INTERPRETED, REAL

README = Path(__file__).parents[2] / "README.md"
BLOCKS = dict(re.findall(r"```python (gpu\S*)\n(.*?)```", README.read_text(), re.DOTALL))


@pytest.mark.parametrize("device", [REAL])
@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_example_runs(device, name):
    pytest.importorskip("torch")
    device()
    exec(compile(BLOCKS[name], f"README example {name}", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("device", [INTERPRETED])
def test_example_runs_on_interpreted_kernels(device, monkeypatch):
    on = device()
    rng = np.random.default_rng(0)
    lend = on.lend
    stand_in = SimpleNamespace(
        randn=lambda *shape, device: lend(rng.standard_normal(shape, dtype=np.float32)),
        zeros=lambda *shape, device: lend(np.zeros(shape, np.float32)),
        ones_like=lambda p: lend(np.ones_like(p.host)),
        tensor=lambda values, device: lend(np.array(values)),
        Tensor=type("Tensor", (), {}),  # of which nothing is an instance
        nn=SimpleNamespace(Parameter=type("Parameter", (), {})),
        strided=None,
        **dict.fromkeys(("float16", "bfloat16", "float32", "float64")),
        cuda=SimpleNamespace(is_initialized=lambda: False),
    )
    monkeypatch.setitem(sys.modules, "torch", stand_in)
    names = {"__name__": "readme"}
    exec(compile(BLOCKS["gpu"], "README example", "exec"), names)
    size = 64_064
    assert names["info"].norm == pytest.approx(np.sqrt(size))
    assert names["info"].clipped
    assert names["opt"].steps == names["sparse"].steps == 1
    bias = names["params"][1].host
    np.testing.assert_allclose(bias, np.full(64, -1e-3), rtol=1e-4)
    rows = names["rows"].copy_to_host()
    np.testing.assert_array_equal(rows[0], rows[2])
    table, seen = names["table"].host, np.array([3, 9_999])
    np.testing.assert_allclose(table[seen], rows[:2] - 1e-3 * np.sign(rows[:2]), atol=1e-5)
