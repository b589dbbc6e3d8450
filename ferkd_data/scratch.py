"""Folders in the temporary folder for what a process needs while it runs.

A process that is killed cannot remove its folders. Each is therefore locked by its owner, and the system releases the
lock with the process: whoever makes a folder next removes those that nobody has locked.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

from ferkd_data import rng
from ferkd_data.errors import LoaderError
from ferkd_data.locks import is_still_there

LOCK_NAME = "lock"
PREFIX = "ferkd-data-"


class Scratch:
    """A new folder, `path`, which is removed with this object, at the end of its process, or by the next process.

    As a context, it gives the path and is removed at the end. The file `lock` in it is in use. A forked copy of the
    object removes nothing. Cannot be pickled: give other processes the path.

        with Scratch("keys") as folder:
            (folder / "keys.txt").write_text("...")
    """

    def __init__(self, kind: str) -> None:
        """Make a folder with `kind` in its name. Raises OSError where the temporary folder cannot be written."""
        _sweep()
        self.path, lock = _locked_folder(kind)
        self._finalizer = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def remove(self) -> None:
        """Remove the folder now."""
        self._finalizer()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *details: object) -> None:
        self.remove()

    def __reduce__(self) -> str:
        raise TypeError("a scratch folder belongs to one process; pickle its path")


def owner_is_gone(path: Path) -> LoaderError:
    """Return the error for a copy of something that needs a scratch folder after that folder was removed."""
    return LoaderError(
        f"{path}: is gone. The loader or data set that made it removed it when it ended, or somebody cleared the "
        "temporary folder. A copy works only as long as the original exists, on the same machine: keep the original, "
        "or make one in each process"
    )


def _host() -> str:
    """Name this machine: where machines share a temporary folder, locks may not reach from one to another."""
    return f"{rng.hash64(socket.gethostname()):016x}"


def _locked_folder(kind: str) -> tuple[Path, int]:
    """Make a folder; return it with the descriptor that holds its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{kind}-{_host()}-"))
        try:
            lock = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            # Another process took it for a folder that was left behind, as it does in the next two cases.
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        except OSError:
            # This file system has no locks: then nobody can lock the folder, and so nobody removes it.
            return path, lock
        if is_still_there(path / LOCK_NAME, lock):
            return path, lock
        os.close(lock)


def _sweep() -> None:
    """Remove the folders of this user's processes that have ended on this machine."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-{_host()}-*"):
        # A folder that goes meanwhile, or that cannot be removed, is none of this process's concern.
        with suppress(OSError):
            if path.lstat().st_uid == os.getuid():
                _remove_if_left(path)


def _remove_if_left(path: Path) -> None:
    """Remove a folder if its owner is gone. Raises OSError when it is locked, or cannot be removed."""
    # The temporary folder is everybody's: a link is not followed, and a FIFO of this name is not waited for.
    try:
        lock = os.open(path / LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        # Its owner was killed before it made the lock, or is about to make it and then takes another folder.
        path.rmdir()
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove_folder(path)
    finally:
        os.close(lock)


def _remove_folder(path: Path) -> None:
    """Remove the lock last: without it, what a kill leaves here could not be told from a folder just made."""
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != LOCK_NAME:
            entry.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path, lock: int, owner: int) -> None:
    # A forked child inherits the finalizer, and its parent still works in the folder.
    if os.getpid() != owner:
        return
    # Somebody may have emptied the temporary folder.
    with suppress(OSError):
        _remove_folder(path)
    os.close(lock)
