"""Files, classes and functions of the package stay small enough to be read at once."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("fastopt/**/*.py"), *ROOT.glob("kernels/**/*.py")])
LONGEST_FILE, LONGEST_CLASS, LONGEST_FUNCTION = 450, 320, 70


def lines_of_code(node, lines):
    """How many lines a function has, without its docstring, blank lines and comments."""
    body = node.body
    own = range(node.lineno - 1, node.end_lineno)
    if ast.get_docstring(node) is not None:
        own = [n for n in own if not body[0].lineno - 1 <= n < body[0].end_lineno]
    return sum(bool(line) and not line.startswith("#") for line in (lines[n].strip() for n in own))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_is_read_at_once_is_short(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= LONGEST_FILE
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno + 1 <= LONGEST_CLASS, node.name
        if isinstance(node, ast.FunctionDef):
            assert lines_of_code(node, lines) <= LONGEST_FUNCTION, node.name


def test_all_files_are_looked_at():
    assert {"optimizer.py", "backend.py", "rows.py"} <= {path.name for path in FILES}
