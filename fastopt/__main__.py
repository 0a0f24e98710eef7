"""``python -m fastopt``: the command."""

from fastopt.cli import main

main()
