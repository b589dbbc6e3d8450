"""One at a time: a lock on a file, which the system releases when the process that holds it dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ferkd_data.errors import FerkdError


@contextmanager
def held(
    path: Path, place: Path | str, *, work: str, refusal: type[FerkdError], shared: bool = False
) -> Iterator[None]:
    """Hold this file's lock, for as long as the context lasts.

    Raises `refusal` when another has it, which names the `place` and the `work` that is done there (such as "build").
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 64).decode(errors="replace").strip()
            who = f" (process {owner})" if owner else ""
            raise refusal(f"{place}: another {work} works here{who}; wait for it to end") from error
        except OSError as error:
            raise refusal(f"{place}: its file system gives no locks ({error.strerror}); use another folder") from error
        if not is_still_there(path, descriptor):
            raise refusal(f"{place}: another {work} has just ended here; run the command again")
        os.ftruncate(descriptor, 0)
        if not shared:
            os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)


def is_still_there(path: Path, descriptor: int) -> bool:
    """Whether `path` is still this open file.

    Its last holder may have removed it after it was opened here; the next one then makes another.
    """
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
