"""``fastopt info``: what machine this is, for a person and for a report of a fault."""

import platform
from importlib.metadata import version

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fastopt
from fastopt._core.backend import about

PACKAGES = "numpy", "numba", "llvmlite"


def command() -> None:
    """Print versions, threads, vector width, threading layer, cache folder, and CUDA driver and devices."""
    table = Table(show_header=False, box=None)
    table.add_row("fastopt", fastopt.__version__)
    table.add_row("Python", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        table.add_row(package, version(package))
    for what, how in about():
        table.add_row(what, escape(how))
    Console(soft_wrap=True).print(table)
