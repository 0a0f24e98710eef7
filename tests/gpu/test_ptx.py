"""What the compiler and the assembler make of the kernels for real GPUs, none of which need be there."""

import os
import re

import pytest
from registers import CAPABILITIES, PTXAS, assembled, registers

from gpu.kernels import every_kernel

pytestmark = pytest.mark.interpreted  # in that process: what it compiles, tests of the CPU do not need

if not PTXAS.is_file():
    pytest.skip(f"{PTXAS} is not there", allow_module_level=True)

MOST_REGISTERS = 255  # that a thread can have
KERNELS = {name: kernel for name, _, kernel in every_kernel()}
EACH = 24  # kernels, of which one is compiled where not all are
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
# Their sums of squares are float64, and so are counts of steps.
WITH_DOUBLES = "rows: LAMB, ", "rows: Adam, norms limited", "rows: Adam, steps counted by row"
ON_ALL = "dense: Adam, float32", "dense: Adam, 8-bit state"  # of the others, each on one in turn


def compiled_for() -> list:
    """Every EACH-th kernel, each for one compute capability in turn; with HYPOTHESIS_PROFILE=thorough all,
    for all."""
    found = []
    for i, name in enumerate(KERNELS):
        if not THOROUGH and i % EACH and name not in ON_ALL:
            continue
        every = THOROUGH or name in ON_ALL
        chosen = CAPABILITIES if every else [CAPABILITIES[i // EACH % len(CAPABILITIES)]]
        found.append(pytest.param(name, chosen, id=f"{name}-{'-'.join(f'sm_{a}{b}' for a, b in chosen)}"))
    return found


def instructions(text: str) -> list[str]:
    return re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z]\w*(?:\.\w+(?:::\w+)?)+|call\S*)\s", text, re.MULTILINE)


@pytest.mark.parametrize(("name", "ccs"), compiled_for())
def test_kernels_are_lean(name, ccs):
    texts, entry = KERNELS[name].code(*ccs)
    for cc, text in zip(ccs, texts, strict=True):
        assert_lean(name, cc, text, entry)


def assert_lean(name, cc, text, entry):
    found = instructions(text)
    assert f".target sm_{cc[0]}{cc[1]}" in text and entry in text
    assert any(one.startswith(("st.global", "atom.", "red.")) for one in found)
    assert [one for one in found if one.startswith("call")] == []
    assert [one for one in found if re.match(r"(div|rem)\.[su]64", one)] == []
    if not name.startswith("coefficients"):  # which take exponentials, of CUDA's own library
        assert [one for one in found if one.startswith("fma.rn.f")] == []  # rounded twice, as on the CPU
    updates = name.startswith(("dense: ", "rows: ")) and not name.startswith(WITH_DOUBLES)
    if updates and "float64" not in name:
        assert [one for one in found if "f64" in one] == []
    report = assembled(KERNELS[name], text, cc)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    assert registers(report) <= MOST_REGISTERS


def test_aligned_float32_is_read_and_written_16_bytes_at_a_time():
    for text in KERNELS["dense: Adam, float32"].code(*CAPABILITIES)[0]:
        # 16 bytes are four words or two of twice the size.
        found = (re.fullmatch(r"(ld|st)\.global\.v(\d)\.[a-z](\d+)", one) for one in instructions(text))
        whole = [one[1] for one in found if one and int(one[2]) * int(one[3]) == 128]
        assert whole.count("ld") == 4  # p, g, exp_avg, exp_avg_sq
        assert whole.count("st") == 4  # all but g, and g where it is cleared
