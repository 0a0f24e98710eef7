"""Files and folders that are written whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".tmp"  # ends the name of the folder in which a file or a folder is written


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """The path at which a block writes a file or a folder, which is then synced and renamed to ``target``.

    The files in a folder are for the block to sync. Where it raises, what was at ``target`` stays.

    Raises:
        OSError: it can't be written.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=TEMPORARY, dir=target.parent))
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(target)) from error
    try:
        temporary = folder / target.name
        yield temporary
        sync(temporary)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sync(target.parent)
