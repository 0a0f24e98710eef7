"""Files and folders that are written whole or not at all."""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

_TEMPORARY = ".tmp"  # ends the name of the folder in which a file or a folder is written


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

    The files in a folder are for the block to sync. Where it raises, what was at ``target`` stays. What is
    written lies in a folder beside ``target``, which is locked until it is gone: those that killed processes
    left are not, and are deleted now.

    Raises:
        OSError: it can't be written; it names ``target``.
    """
    folder = None
    try:
        _remove_stale(target)
        with _new_folder(target) as folder:
            temporary = folder / target.name
            yield temporary
            sync(temporary)
            os.replace(temporary, target)
        sync(target.parent)
    except OSError as error:
        foreign = folder is not None and error.filename is not None and str(folder) not in str(error.filename)
        if error.errno is None or foreign:  # of a file that the block reads, for example
            raise
        raise type(error)(error.errno, error.strerror, str(target)) from error


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A locked folder beside ``target``, deleted at the end."""
    while True:
        folder = target.parent / f".{target.name}.{secrets.token_hex(8)}{_TEMPORARY}"
        try:
            folder.mkdir(0o700)
            lock = _new_lock(_lock_path(folder, target))
            if lock is not None:
                with lock:
                    yield folder
                return
        finally:
            with contextlib.suppress(OSError):  # rmtree() raises one where an interrupt came in it
                shutil.rmtree(folder, ignore_errors=True)


def _new_lock(path: Path) -> FileIO | None:
    """A new file, locked until it is closed, which it is as soon as nobody refers to it, whatever exception
    came when. None if another process found the folder before it was locked, and deletes it as stale."""
    try:
        lock = open(path, "xb", buffering=0)  # noqa: SIM115
        with contextlib.suppress(OSError):  # a file system without locks, where no folder is taken for stale
            fcntl.flock(lock, fcntl.LOCK_EX)
        return lock if os.path.samestat(os.stat(path), os.fstat(lock.fileno())) else None
    except (FileExistsError, FileNotFoundError):
        return None


def _remove_stale(target: Path) -> None:
    """Delete the folders in which killed processes were writing ``target``."""
    own = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-z_]{{8,16}}{re.escape(_TEMPORARY)}")
    with os.scandir(target.parent) as entries:
        found = [Path(e.path) for e in entries if own.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    for folder in found:
        path = _lock_path(folder, target)
        # OSError: it is being written, another process deletes it, or this one may not.
        with contextlib.suppress(OSError), open(path, "ab", buffering=0, opener=_open_no_link) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if set(os.listdir(folder)) <= {target.name, path.name}:
                shutil.rmtree(folder)


def _lock_path(folder: Path, target: Path) -> Path:
    return folder / f"{target.name}.lock"


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
