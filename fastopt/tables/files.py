"""Files of a table: opened so that nothing outside its folder can be reached, and written whole."""

import errno
import os
import stat
from pathlib import Path

# Without the last, opening a pipe would wait for its other end.
_SAFE = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def open_file(path: Path, flags: int) -> int:
    """A descriptor of a regular file; close it.

    Raises:
        ValueError: it is a symbolic link, a folder, a pipe or a device, or has a second name elsewhere, in
            which what is written here would show.
        OSError: it can't be opened.
    """
    try:
        descriptor = os.open(path, flags | _SAFE, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _no_file(path) from error
        raise
    try:
        check_file(path, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_file(path: Path, found: os.stat_result) -> None:
    """Refuse what is no regular file with one name."""
    if not stat.S_ISREG(found.st_mode):
        raise _no_file(path)
    if found.st_nlink > 1:
        raise ValueError(
            f"{path} has {found.st_nlink} hard links: expected one, since writing to it changes the others "
            "too; copy it in its place"
        )


def _no_file(path: Path) -> ValueError:
    return ValueError(f"{path} is no regular file: expected one that open_table made, and no link")


def read_file(path: Path) -> bytes:
    with open(open_file(path, os.O_RDONLY), "rb") as file:
        return file.read()


def write_file(path: Path, content: bytes) -> None:
    """Write a new file, in place of what may be left there of an interrupted call, and sync it."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE, 0o666)
    try:
        write(descriptor, memoryview(content), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(descriptor: int, content: memoryview, at: int) -> None:
    """Write all of the content at a position."""
    while content:
        written = os.pwrite(descriptor, content, at)
        content, at = content[written:], at + written
