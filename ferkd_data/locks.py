"""Locks on files, which the system releases when the process that holds them ends, however it ends.

`held` refuses at once when another process has the lock; `locked_for_cache` waits for it. Both work between processes
and between threads, since each opens the file anew.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ferkd_data.errors import FerkdError, LoaderError
from ferkd_data.storage import refuse_too_many_files

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
"""Errors of file systems without locks: Lustre without its option flock, NFS without its lock server. NFS refuses an
exclusive lock on a file that is open for reading only, too."""


@contextmanager
def locked_for_cache(path: Path) -> Iterator[bool]:
    """Wait for this lock file and hold it; yields False, without a lock, where the file system has none.

    Without a lock, other processes may be doing the same work: then nothing of theirs may be removed.

    Raises LoaderError where the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # For writing: NFS has an exclusive lock only for a descriptor that may write. There is no content to lose.
        lock_file = path.open("w")
    except OSError as error:
        refuse_too_many_files(path, error)
        raise LoaderError(
            f"{path.parent}: labels cannot be kept there ({error.strerror}); give cache_dir=, or set FERKD_DATA_CACHE"
        ) from error
    # Closing the file lets the lock go. The file stays: removed here, a process that waits for it and one that comes
    # later would lock two different files.
    with lock_file:
        yield lock(lock_file.fileno(), fcntl.LOCK_EX)


def lock(descriptor: int, kind: int) -> bool:
    """Take a lock, as `fcntl.flock`; False where the file system has none. Raises BlockingIOError with LOCK_NB."""
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        # An OSError too, but an answer: somebody else has the lock.
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


@contextmanager
def held(
    path: Path, location: Path | str, *, work: str, refusal: type[FerkdError], shared: bool = False
) -> Iterator[None]:
    """Hold this file's lock for as long as the context lasts, alone or, with `shared`, beside others that share it.

    Raises `refusal` when another process has it; the error names the `location` and the `work` that is done there, such
    as "build". The number of the process that holds the lock alone is in the file.
    """
    # Not truncated: until the lock is ours, the file holds the number of the process that has it.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 64).decode(errors="replace").strip()
            who = f" (process {owner})" if owner else ""
            raise refusal(f"{location}: another {work} works here{who}; wait for it to end") from error
        except OSError as error:
            raise refusal(
                f"{location}: its file system gives no locks ({error.strerror}); use another folder"
            ) from error
        # After the lock, not before: its last holder may have removed the file until the moment it let go.
        if not is_still_there(path, descriptor):
            raise refusal(f"{location}: another {work} has just ended here; run the command again")
        os.ftruncate(descriptor, 0)
        # There may be many shared holders; a single number would blame one of them.
        if not shared:
            os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        # Closing lets the lock go, whatever happened above.
        os.close(descriptor)


def is_still_there(path: Path, descriptor: int) -> bool:
    """Return whether `path` is still this open file.

    The last holder of a lock may have removed the file after it was opened here. Then the next process makes another
    file and locks that, so a lock on this one protects nothing.
    """
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
