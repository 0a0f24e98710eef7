"""What is installed is all of the repository's package, under the metadata it says."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest

import fastopt
import fastopt.kernels

ROOT = Path(__file__).parents[1]
FOLDERS = {"fastopt": Path(fastopt.__file__).parent, "kernels": Path(fastopt.kernels.__file__).parent}


def sources(folder):
    return {path.relative_to(folder) for path in folder.rglob("*.py")}


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_with_code_is_a_listed_package():
    listed = project()["tool"]["setuptools"]["packages"]
    found = set()
    for name, package in (("fastopt", "fastopt"), ("kernels", "fastopt.kernels")):
        assert sources(ROOT / name)
        found |= {".".join((package, *path.parent.parts)) for path in sources(ROOT / name)}
    assert sorted(listed) == sorted(found)


@pytest.mark.parametrize("name", FOLDERS)
def test_every_source_file_is_installed(name):
    assert sources(ROOT / name) <= sources(FOLDERS[name])


def test_the_type_marker_is_installed():
    assert (FOLDERS["fastopt"] / "py.typed").is_file()


def test_the_versions_agree():
    assert fastopt.__version__ == importlib.metadata.version("fastopt")


def test_the_command_is_installed():
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="fastopt")
    assert command.value == project()["project"]["scripts"]["fastopt"]
    assert callable(command.load())
