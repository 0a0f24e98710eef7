"""The command ``fastopt``, with its subcommands."""

import signal
import sys

import typer

from fastopt.cli import info, loads, train

# What typer raises for a wrong command line is click's class, or a copy of it within typer.
USAGE_ERROR: type[Exception] = typer.BadParameter.mro()[1]

app = typer.Typer(add_completion=False)
app.command("train")(train.command)
app.command("info")(info.command)
app.command("loads")(loads.command)


@app.callback()
def root() -> None:
    """Optimizer steps at the speed of memory."""


def main() -> None:
    """Run the command; an error is one line."""
    # A console that lacks a word's letters shows others instead.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        code = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = 128 + signal.SIGINT
    except USAGE_ERROR as error:
        code = _complain(f"{error.format_message()} (see fastopt --help)")  # type: ignore[attr-defined]
    except OSError as error:
        code = _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except MemoryError as error:
        code = _complain(f"out of memory: {error}")
    except ValueError as error:
        code = _complain(str(error))
    sys.exit(code)


def _complain(message: str) -> int:
    sys.stderr.write(f"fastopt: {' '.join(message.split())}\n")  # at once, as processes may share it
    return 2
