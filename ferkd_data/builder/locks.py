"""Locks of OUT: which processes may work on it. The system releases a lock when its process dies."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from ferkd_data.builder.plan import Part
from ferkd_data.builder.shard_files import FOLDER
from ferkd_data.builder.state import PART_LOCK, BuildFolder, is_lock
from ferkd_data.errors import BuildError, BuildLockedError
from ferkd_data.format.manifest_file import FILE_NAME
from ferkd_data.format.rejects import REJECTS_FILE
from ferkd_data.format.writers import SHARD_FILE
from ferkd_data.locks import held
from ferkd_data.storage import remove_leftovers


@contextmanager
def open_build_folder(out: Path, *, overwrite: bool, extend: bool = False) -> Iterator[BuildFolder]:
    """Lock OUT for this process while the context lasts.

    Raises BuildLockedError when a live process builds there; BuildError for a finished label set (without `overwrite`
    or `extend`), for a folder that is not ours, and where nothing can be written.
    """
    check_out(out)
    folder = BuildFolder(out)
    with ExitStack() as stack:
        with explain_unwritable(out):
            folder.path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder.path / "lock", out))
        # The stack unwinds backwards: this still runs under the lock.
        stack.callback(_remove_if_only_locks, folder.path)
        if (out / FILE_NAME).exists() and not overwrite and not extend:
            raise BuildError(
                f"{out} holds a finished label set; use another folder, --extend to add to it, or --overwrite to "
                "replace it"
            )
        if overwrite and not extend:
            _clear(folder)
        # With neither, shard files are of a build that was killed while it was cleared away: no build vouches for them.
        if not (out / FILE_NAME).exists() and not (folder.path / "state.json").exists():
            _remove_shard_files(out)
        # The lock says that no other process of a build writes below OUT.
        remove_leftovers(out)
        yield folder


@contextmanager
def open_part_folder(out: Path, part: Part, *, extend: bool = False) -> Iterator[BuildFolder]:
    """Lock one part of OUT for this process, beside processes that lock other parts.

    Raises BuildLockedError when a live process builds the whole or this part, BuildError as `open_build_folder` does.
    """
    check_out(out)
    folder = out / FOLDER
    with explain_unwritable(out):
        folder.mkdir(parents=True, exist_ok=True)
    # Parts share the lock of the whole, which keeps out a build of the whole, and each has one of its own, which keeps
    # out the same part.
    with (
        locked(folder / "lock", out, shared=True),
        locked(folder / f"part-{part.number}-of-{part.of}", out),
    ):
        if (out / FILE_NAME).exists() and not extend:
            raise BuildError(f"{out} holds a finished label set; use another folder, or --extend to add to it")
        yield BuildFolder(out)


def check_unfinished(out: Path) -> None:
    """Raise BuildError when OUT holds no build that could be finished."""
    for name in ("state.json", "plan.json", "facts.json"):
        if not (out / FOLDER / name).exists():
            raise BuildError(f"{out}: holds no unfinished build; begin one with ferkd-data build")


def clean_up_after_end(out: Path) -> bool:
    """Remove what a build left that was killed after it wrote the manifest; return whether there was anything.

    An unfinished extension stays, and so does the state of a process that is alive.
    """
    folder = BuildFolder(out)
    # A user who may only read OUT cannot clean up, and need not: the label set is finished.
    with suppress(BuildLockedError, PermissionError, FileNotFoundError), locked(folder.path / "lock", out):
        if not folder.has_ended:
            return False
        was_interrupted = not _only_locks(folder.path)
        # `has_ended` was read under the lock, so the state that is removed belongs to nobody.
        folder.drop_what_has_ended()
        folder.remove()
        remove_leftovers(out)
        return was_interrupted
    return False


def locked(path: Path, out: Path | str, *, shared: bool = False) -> AbstractContextManager[None]:
    """Hold the lock of a file. Raises BuildLockedError, which names `out`, when another process has it."""
    return held(path, out, work="build", refusal=BuildLockedError, shared=shared)


@contextmanager
def explain_unwritable(out: Path | str, *, only_if_named: bool = False) -> Iterator[None]:
    """Turn an OSError into a BuildError that says what to do about OUT.

    With `only_if_named`, only an OSError that names OUT: others may come from the source or a teacher.
    """
    try:
        yield
    except OSError as error:
        if only_if_named and str(out) not in str(error):
            raise
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in (errno.ENOENT, errno.ESTALE):
            what = f"{error.filename or out} is gone; was OUT removed or unmounted? Run the same command again"
        else:
            what = "choose a writable folder, or fix the cause, and run the same command again"
        raise BuildError(f"{out}: cannot be written to ({reason}); {what}") from error


def check_out(out: Path) -> None:
    """Raise BuildError for a folder that is not ours or cannot be written to, before the teachers are loaded."""
    if out.exists() and not out.is_dir():
        raise BuildError(f"{out}: is a file; give a folder as OUT (a pattern in SOURCE needs quotes)")
    if out.is_dir() and any(out.iterdir()) and not (out / FOLDER).is_dir() and not (out / FILE_NAME).is_file():
        raise BuildError(f"{out}: is not empty and holds no label set; give a new or empty folder")
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        is_read_only = bool(os.statvfs(there).f_flag & os.ST_RDONLY)
        reason = os.strerror(errno.EROFS if is_read_only else errno.EACCES)
        raise BuildError(f"{out}: cannot be written to ({reason}); choose a writable folder, or fix the cause")


def _clear(folder: BuildFolder) -> None:
    """Remove what a build wrote, and nothing else.

    The state goes first and the manifest second: a kill in between leaves a whole label set, or no build at all.
    """
    folder.clear()
    (folder.out / FILE_NAME).unlink(missing_ok=True)
    _remove_shard_files(folder.out)
    for path in folder.path.iterdir():
        # `finish` reads from these names which divisions into parts were begun, and the old build's are of no concern.
        if PART_LOCK.fullmatch(path.name):
            path.unlink()


def _remove_shard_files(out: Path) -> None:
    """Remove rejects and shard files of a label set that has no manifest any more."""
    for path in out.iterdir():
        if REJECTS_FILE.fullmatch(path.name):
            path.unlink()
    for name in ("labels", "shards"):
        # Backwards, what lies in a folder comes before the folder, which is empty when its turn comes.
        below = sorted((out / name).rglob("*"), reverse=True)
        for path in below:
            if SHARD_FILE.fullmatch(path.name) and path.is_file():
                path.unlink()
        for folder in [path for path in below if path.is_dir()] + [out / name]:
            with suppress(OSError):  # not there, or holds what is not ours
                folder.rmdir()


def _only_locks(folder: Path) -> bool:
    return all(is_lock(path.name) for path in folder.iterdir())


def _remove_if_only_locks(folder: Path) -> None:
    """Remove `.build/` where no build began, and an empty OUT that was made for it.

    It stays where it is all that says that OUT is ours: beside a README.md of a label set that was cleared away.
    """
    out = folder.parent
    with suppress(OSError):
        is_alone = all(path == folder for path in out.iterdir())
        if _only_locks(folder) and (is_alone or (out / FILE_NAME).exists()):
            shutil.rmtree(folder)
            out.rmdir()
