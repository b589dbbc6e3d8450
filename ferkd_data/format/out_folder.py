"""The folder that a command writes a label set to: taken, resumed after a kill, and recognised when finished.

A file `.ferkd-data-work.json` says what is written there. It is made in an empty folder before anything else, and
removed when the manifest is there, so nothing that was not written by the same command is ever overwritten.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ferkd_data.errors import ManifestError, UsageError
from ferkd_data.format.manifest import Manifest
from ferkd_data.format.manifest_file import FILE_NAME, parse_manifest, read_manifest, write_manifest
from ferkd_data.format.rejects import REJECTS_FILE
from ferkd_data.format.writers import SHARD_FILE
from ferkd_data.storage import LEFTOVER, label_folder, remove_leftovers, write_atomically

WORK = ".ferkd-data-work.json"
MAX_WORK_BYTES = 2**20

Settings = dict[str, Any]
"""Settings that must be equal for a command to go on where it stopped: plain JSON values."""


def begin(out: str | Path, settings: Settings) -> Path:
    """Take `out`: a new or empty folder, or one where a command of these settings was interrupted.

    Raises UsageError for any other folder, and for a file or a URL.
    """
    out = label_folder(out)
    # Nothing is written before all refusals: a folder that is refused stays as it was.
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; give a new folder")
    work = read_work(out)
    if (out / FILE_NAME).exists():
        raise UsageError(f"{out}: holds another label set; give a new folder")
    there = _names(out)
    # Only the work file, or nothing: the folder is ours to take.
    if not there:
        out.mkdir(parents=True, exist_ok=True)
        write_work(out, settings)
    elif work is None:
        raise UsageError(f"{out}: holds {there[0]!r}; give a new or empty folder")
    elif work != settings:
        raise UsageError(
            f"{out}: an interrupted command with other settings was writing here ({_in_words(work)}; now "
            f"{_in_words(settings)}); "
            "give a new folder, or remove this one"
        )
    # Only one command works here, so these are of a killed one. What it finished is written anew.
    remove_leftovers(out)
    return out


def begin_pull(out: Path, *, lock: str) -> None:
    """Take `out`, an existing folder, for a pull: an empty one, or one where any pull was interrupted.

    Files of an interrupted pull that are not wanted now, or are damaged, may be replaced; nobody else's are. The file
    `lock` counts as nothing. Raises UsageError for any other folder.
    """
    work = read_work(out)
    there = [name for name in _names(out) if name != lock]
    if there and (work is None or work.get("command") != "pull"):
        raise UsageError(f"{out}: holds {there[0]!r}; give a new or empty folder")
    write_work(out, {"command": "pull"})


def _names(out: Path) -> list[str]:
    """Return the sorted names of what is in `out`, but for the work file, whole or half written."""
    if not out.exists():
        return []
    names = sorted(path.name for path in out.iterdir())
    return [name for name in names if name != WORK and not (WORK in name and LEFTOVER.fullmatch(name))]


def finish(out: Path, manifest: Manifest) -> Manifest:
    """Write the manifest, which makes the folder a label set, and remove what an interrupted attempt left over.

    Raises ManifestError for a manifest that no reader would accept.
    """
    # As a reader would, before it becomes the commit point.
    parse_manifest(manifest.to_json(), str(out / FILE_NAME))
    # An attempt with other block sizes leaves files of ours that this manifest does not list.
    listed = {file.path for shard in manifest.shards for file in shard.files} | {manifest.rejects.path}
    for path in [*(out / "labels").rglob("*"), *(out / "shards").rglob("*"), *out.glob("rejects*")]:
        ours = SHARD_FILE.fullmatch(path.name) or REJECTS_FILE.fullmatch(path.name)
        if ours and path.relative_to(out).as_posix() not in listed:
            path.unlink()
    # After unlisted files are gone, before the work file is: a kill at any point leaves a folder that `begin` takes
    # again, or a whole label set.
    write_manifest(out, manifest)
    (out / WORK).unlink(missing_ok=True)
    return manifest


def finished(out: str | Path) -> Manifest | None:
    """Return the manifest of the label set in `out`; None where there is none. Raises ManifestError."""
    folder = label_folder(out)
    return read_manifest(folder) if (folder / FILE_NAME).is_file() else None


def settings_digest(settings: Settings) -> str:
    """Return 16 hexadecimal digits by which a finished folder is recognised; they reveal no path."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def write_work(out: Path, settings: Settings) -> None:
    with write_atomically(out / WORK) as aside:
        aside.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def clean(out: str | Path) -> None:
    """Remove the work file of a command that has ended."""
    (label_folder(out) / WORK).unlink(missing_ok=True)


def read_work(out: Path) -> Settings | None:
    """Return the settings of the command that works in `out`, or was interrupted there; None where there is none."""
    path = out / WORK
    if not path.is_file():
        return None
    try:
        # Settings take some hundred bytes: a larger file is not ours.
        if path.stat().st_size > MAX_WORK_BYTES:
            raise ValueError("too large")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: cannot be read ({error}); give a new folder, or remove this one") from error
    return content


def _in_words(settings: Settings) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(settings.items()))
