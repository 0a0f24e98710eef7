"""That a backend has every name of the protocol, and that each has a test in this folder."""

import _thread
import ast
from functools import partial
from pathlib import Path

import pytest
from devices import Cpu

from fastopt._core.backend import Backend

HOST_NAMES = {"Locator", "Identities"}  # what looks at Python's objects
VALUES = {"device", "capturing"}
NAMES = {name for name in {*Backend.__annotations__, *vars(Backend)} if not name.startswith("_")} - VALUES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_backend_has_every_name_of_the_protocol(device, name):
    if name in HOST_NAMES and not isinstance(device, Cpu):
        pytest.skip("the host's alone")
    assert callable(getattr(device.backend, name))


def test_backend_knows_its_device(device):
    assert device.backend.device == (-1 if isinstance(device, Cpu) else 0)
    assert device.backend.capturing is False


@pytest.mark.covers("run")
def test_no_handler_comes_between_calls(device):
    done = []
    calls = [partial(done.append, k) for k in range(3)]
    with pytest.raises(KeyboardInterrupt):
        device.backend.run([*calls, _thread.interrupt_main, *calls])  # the signal comes, and waits
    assert done == [0, 1, 2, 0, 1, 2]


def test_every_name_of_the_protocol_has_a_test():
    covered = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.covers":
                covered |= {ast.literal_eval(argument) for argument in node.args}
    assert covered == NAMES
