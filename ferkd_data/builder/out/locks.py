"""Who may work on a folder OUT: locks that the system releases when their process dies."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ferkd_data.builder.out.state import FOLDER, REJECTS_FILE, BuildFolder
from ferkd_data.builder.part import Part
from ferkd_data.errors import BuildError, BuildLockedError
from ferkd_data.file_lock import held
from ferkd_data.manifest import FILE_NAME
from ferkd_data.storage import remove_leftovers


@contextmanager
def open_build_folder(out: Path, *, overwrite: bool, extend: bool = False) -> Iterator[BuildFolder]:
    """Take OUT for this process, for as long as the context lasts.

    Raises BuildLockedError when a live process builds there, BuildError for a finished label set (without `overwrite`
    or `extend`) and for a folder that is not ours.
    """
    _check_ours(out)
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    with locked(out / FOLDER / "lock", out):
        folder = BuildFolder(out)
        if (out / FILE_NAME).exists() and not overwrite and not extend:
            _remove_if_only_a_lock(out / FOLDER)
            raise BuildError(
                f"{out} holds a finished label set; use another folder, --extend to add to it, or --overwrite to "
                "replace it"
            )
        if overwrite and not extend:
            _clear(out)
        remove_leftovers(out)
        yield folder


@contextmanager
def open_part_folder(out: Path, part: Part, *, extend: bool = False) -> Iterator[BuildFolder]:
    """Take one part of OUT for this process, beside processes that take other parts.

    Raises BuildLockedError when a live process builds the whole or this part, BuildError as `open_build_folder` does.
    """
    _check_ours(out)
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (
        locked(folder / "lock", out, shared=True),
        locked(folder / f"part-{part.number}-of-{part.of}", out),
    ):
        if (out / FILE_NAME).exists() and not extend:
            raise BuildError(f"{out} holds a finished label set; use another folder, or --extend to add to it")
        yield BuildFolder(out)


def check_unfinished(out: Path) -> None:
    """Raise BuildError when OUT holds no build that could be finished."""
    finished = (out / FILE_NAME).exists()
    if finished and (not (out / FOLDER / "state.json").exists() or BuildFolder(out).extends is None):
        raise BuildError(f"{out} holds a finished label set")
    for name in ("state.json", "plan.json", "facts.json"):
        if not (out / FOLDER / name).exists():
            raise BuildError(f"{out}: holds no unfinished build; begin one with ferkd-data build")


def locked(path: Path, out: Path | str, *, shared: bool = False) -> AbstractContextManager[None]:
    """Hold this file's lock. Raises BuildLockedError when another process has it; `out` is what that says."""
    return held(path, out, work="build", refusal=BuildLockedError, shared=shared)


def _check_ours(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise BuildError(f"{out}: is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / FOLDER).is_dir() and not (out / FILE_NAME).is_file():
        raise BuildError(f"{out}: is not empty and holds no label set; give a new or empty folder")


def _clear(out: Path) -> None:
    """Remove what a build wrote, the manifest first, and nothing else."""
    (out / FILE_NAME).unlink(missing_ok=True)
    for path in out.iterdir():
        if REJECTS_FILE.fullmatch(path.name):
            path.unlink()
    for name in ("labels", "shards"):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    for path in (out / FOLDER).iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove_if_only_a_lock(folder: Path) -> None:
    if [path.name for path in folder.iterdir()] == ["lock"]:
        shutil.rmtree(folder)
