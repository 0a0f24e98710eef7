"""The CUDA kernels compiled for real GPUs, none of which need be there."""

import re
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from numba.core import config

from fastopt.kernels.rule import L2, Decoupled, Scaled

if config.ENABLE_CUDASIM:
    pytest.skip("the simulator does not compile", allow_module_level=True)
pytest.importorskip("numba_cuda")

from fastopt.kernels.cuda import compile, flat

OPTIONS = {
    "lr": 0.1,
    "momentum": 0.9,
    "dampening": 0.0,
    "nesterov": True,
    "lr_decay": 0.0,
    "momentum_decay": 4e-3,
    "alpha": 0.9,
    "betas": (0.9, 0.99),
    "beta": 0.9,
    "eps": 1e-8,
}
PTXAS = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", "ptxas")
# A multiprocessor has 65,536 registers and room for 2,048 threads. A thread with a row of its own
# needs more: its loops over the row are unrolled.
MOST_REGISTERS, MOST_REGISTERS_ROWS = 32, 128


@pytest.fixture
def ptx(rule, hyperparameters, arrays, cc):
    """``ptx(dtype)``: of the rule's kernel."""
    kernel = flat.flat_rows if rule.row_slots else flat.flat
    return lambda dtype: compile.ptx(
        kernel, *hyperparameters(dtype, 1, 1.0, np.inf, 0.1, OPTIONS), *arrays(dtype, 2, 2), cc=cc
    )


def instructions(text):
    return re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z]\w*(?:\.\w+)+|call\S*)\s", text, re.MULTILINE)


def assembled(text, cc, folder):
    """What ptxas says of a kernel."""
    source = folder / "kernel.ptx"
    source.write_text(text)
    command = [PTXAS, "-v", f"-arch=sm_{cc[0]}{cc[1]}", "-o", folder / "kernel.cubin", source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("cc", "decay"),
    [((8, 0), L2), ((9, 0), Scaled), ((9, 0), Decoupled)],
    indirect=["decay"],
    ids=lambda value: value.__name__ if isinstance(value, type) else "sm_{}{}".format(*value),
)
def test_float32_kernels_are_lean(rule, ptx, cc, tmp_path):
    text = ptx(np.float32)
    found = instructions(text)
    assert f".target sm_{cc[0]}{cc[1]}" in text
    assert any(name.startswith("st.global") and name.endswith("f32") for name in found)
    assert [name for name in found if "f64" in name] == []
    assert [name for name in found if name.startswith("call")] == []
    assert [name for name in found if re.match(r"(div|rem)\.[su]64", name)] == []
    if not PTXAS.is_file():
        pytest.skip(f"{PTXAS} is not there")
    report = assembled(text, cc, tmp_path)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    assert registers <= (MOST_REGISTERS_ROWS if rule.row_slots else MOST_REGISTERS)


@pytest.mark.parametrize("decay", [L2], indirect=True)
@pytest.mark.parametrize("cc", [(9, 0)], ids=["sm_90"])
def test_float64_kernels_compile(rule, ptx, cc, tmp_path):
    text = ptx(np.float64)
    found = instructions(text)
    assert [name for name in found if name.endswith(".f32")] == []
    assert [name for name in found if name.startswith("call")] == []
    if not PTXAS.is_file():
        pytest.skip(f"{PTXAS} is not there")
    assert "0 bytes spill stores, 0 bytes spill loads" in assembled(text, cc, tmp_path)
