"""`.build/`: the state of an unfinished build, and the locks of those who work on it.

Without state.json, the other files there belong to no build, and the next build removes them.

lock            locked by the process that builds, or shared by processes that build a part each; the system releases
                it when the process dies
part-3-of-8     locked by the process that builds this part
plan-lock       locked for a moment by a process that makes the plan, or finds it made
state.json      the settings, to compare with those of the next run; in an extension, also which label set it extends
facts.json      the manifest's statements on teachers and source, so that `finish` needs neither
plan.*          which images go into which shard
shards/N.json   a record for each finished shard: written after its files, so it is the shard's commit point
sealed          SHA-256 of an extension's manifest, written just before that: where both agree, the extension has ended
rejects.parquet left by a build in which every image was rejected, and which wrote no label set

While a finished label set is extended, its old manifest stays in place, and OUT is the old label set until the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ferkd_data.builder.plan import Part
from ferkd_data.builder.settings import BuildSettings
from ferkd_data.builder.shard_files import FOLDER, STATE_VERSION, DiskFiles, ShardFiles, ShardRecord
from ferkd_data.crop_kinds import CropKind
from ferkd_data.crops import CropDistribution
from ferkd_data.errors import BuildError, SettingsMismatchError, describe_differences
from ferkd_data.format.manifest import Manifest, TeacherEntry
from ferkd_data.format.manifest_file import FILE_NAME, identity_of, read_manifest, read_manifest_bytes
from ferkd_data.format.rejects import REJECTS_FILE, REJECTS_NAME
from ferkd_data.format.writers import SHARD_FILE
from ferkd_data.labels.buckets import QuantileThresholds, Thresholds
from ferkd_data.storage import expanded, write_atomically

PART_LOCK = re.compile(r"part-(\d+)-of-(\d+)")
EMPTY_OUT = "empty OUT before the first part begins"
"""Advice to a build in parts, where --overwrite would remove the work of other parts."""
EXTENDS = "extends"
"""The setting in state.json that names the label set by its manifest's SHA-256."""


class Facts(BaseModel):
    """Statements of the manifest that come neither from the settings nor from the shards."""

    model_config = ConfigDict(frozen=True)

    version: int = STATE_VERSION
    teachers: tuple[TeacherEntry, ...]
    num_classes: int
    class_names: tuple[str, ...] | None
    source: str
    place_sha256: str | None = None
    class_folders: tuple[str, ...] | None = None
    classes_sha256: str | None = None
    left_out: dict[str, int] = {}


class BuildFolder:
    """OUT while a build works in it: the state in `.build/` on this host's disk, and the files of the shards."""

    def __init__(self, out: Path, files: ShardFiles | None = None) -> None:
        """Take a folder, and the files of the shards where these are not on the disk below it."""
        self.out = out
        """The folder in which this host writes the label set's files."""
        self.path = out / FOLDER
        self.files = DiskFiles(out) if files is None else files

    @property
    def location(self) -> Path | str:
        """OUT as the user names it: a folder or a URL."""
        return self.files.location

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Save the settings, or compare them with those saved. Raises SettingsMismatchError that names both values."""
        path = self.path / "state.json"
        # Through JSON, as the saved ones went: tuples become lists.
        present = json.loads(json.dumps({"version": STATE_VERSION, "settings": settings}))
        if not path.exists():
            # What is there without state.json belongs to no build (see above).
            self.clear()
            with write_atomically(path) as aside:
                aside.write_text(json.dumps(present, indent=1))
            return
        try:
            saved = json.loads(path.read_bytes())
        except ValueError as error:
            afresh = EMPTY_OUT if self.parts() else "start afresh with --overwrite"
            raise BuildError(f"{path}: damaged ({error}); {afresh}") from error
        differences = describe_differences(saved, present)
        if differences:
            extends, in_parts = EXTENDS in settings, bool(self.parts())
            what, afresh = ("extension", "--extend --overwrite") if extends else ("build", "--overwrite")
            if in_parts:
                afresh = f"{afresh} without --part" if extends else EMPTY_OUT
            raise SettingsMismatchError(
                f"{self.location} holds an unfinished {what} with other settings: {'; '.join(differences)}. "
                f"Use the same settings to resume it, another folder, or {afresh}"
            )

    def drop_what_has_ended(self) -> None:
        """Clear what a build, or an extension, left that was killed after its last step.

        Raises BuildError where the manifest is not the one that an unfinished extension began with.
        """
        if not (self.path / "state.json").exists():
            self.clear()
            return
        present = identity_of(read_manifest_bytes(self.out))
        sealed = self.path / "sealed"
        extends = self.extends
        # A state beside a manifest has ended, unless it is of an extension that has not written its own manifest yet.
        if extends is None or (sealed.exists() and sealed.read_text() == present):
            self._remove_old_rejects()
            self.clear()
        elif extends != present:
            raise BuildError(
                f"{self.out}: {FILE_NAME} is not the one that an unfinished extension began with; bring it back, or "
                "start the extension anew with --extend --overwrite"
            )

    @property
    def has_ended(self) -> bool:
        """True where the manifest is there, and only this folder is left to be removed."""
        if not (self.out / FILE_NAME).exists():
            return False
        if not (self.path / "state.json").exists() or self.extends is None:
            return True
        sealed = self.path / "sealed"
        return sealed.exists() and sealed.read_text() == identity_of(read_manifest_bytes(self.out))

    @property
    def extends(self) -> str | None:
        """The identity of the label set that is being extended here; None for an ordinary build."""
        state = json.loads((self.path / "state.json").read_bytes())
        found: str | None = state["settings"].get(EXTENDS)
        return found

    def discard_extension(self, manifest: Manifest) -> None:
        """Remove an unfinished extension with its shard files, but nothing that `manifest` names."""
        listed = {file.path for shard in manifest.shards for file in shard.files}
        for name in ("labels", "shards"):
            for path in list((self.out / name).rglob("*")):
                if SHARD_FILE.fullmatch(path.name) and path.relative_to(self.out).as_posix() not in listed:
                    path.unlink()
        self.clear()

    def clear(self) -> None:
        """Remove all state but the locks."""
        clear_state(self.path)

    def remove(self) -> None:
        """Remove the state of a build that has ended."""
        self.clear()
        self.files.remove()

    def start_over(self, rejects: Path) -> Path:
        """Forget the build, all of whose images were rejected, so that the same command begins anew.

        Returns where `rejects` is moved to, in `.build/`.
        """
        # In a store first, where its state decides: the next run clears whatever a kill leaves on this host.
        self.files.forget()
        self.clear()
        return rejects.replace(self.path / REJECTS_NAME)

    def saved_settings(self) -> BuildSettings:
        saved = json.loads((self.path / "state.json").read_bytes())["settings"]
        # Both have the same fields, so that `_fingerprint` has to say which they were.
        thresholds = QuantileThresholds if saved["quantile"] else Thresholds
        distribution = {name: _tuple(value) for name, value in saved["distribution"].items()}
        return BuildSettings(
            **{
                **{field.name: saved[field.name] for field in fields(BuildSettings) if field.name in saved},
                "distribution": CropDistribution(**distribution),
                "crop_kinds": [CropKind.from_plain(kind) for kind in saved.get("crop_kinds", ())],
                "thresholds": thresholds(**saved["thresholds"]),
            }
        )

    @property
    def is_begun(self) -> bool:
        """True where the facts are there, which are saved when the plan is made and checked."""
        return (self.path / "facts.json").exists()

    def save_facts(self, facts: Facts) -> None:
        with write_atomically(self.path / "facts.json") as aside:
            aside.write_text(facts.model_dump_json(indent=1))

    def saved_facts(self) -> Facts:
        return Facts.model_validate_json((self.path / "facts.json").read_bytes())

    def parts(self) -> list[Part]:
        """Return every part that was begun at some time."""
        found = [PART_LOCK.fullmatch(path.name) for path in self.path.glob("part-*")]
        return [Part(number=int(name[1]), of=int(name[2])) for name in found if name]

    def alone(self) -> AbstractContextManager[None]:
        """Wait until no other process of this host is inside."""
        return alone_in(self.path)

    def existing_record(self, shard: int) -> ShardRecord:
        """Return the record of a finished shard. Raises BuildError where it is gone."""
        record = self.files.record(shard)
        if record is None:
            raise BuildError(f"{self.location}: the files of shard {shard} are gone; run the same command again")
        return record

    def _remove_old_rejects(self) -> None:
        # An extension that was killed after its manifest has left the rejects of the manifest before.
        listed = read_manifest(self.out).rejects.path
        for path in self.out.iterdir():
            if REJECTS_FILE.fullmatch(path.name) and path.name != listed:
                path.unlink()


def clear_state(path: Path) -> None:
    """Remove everything in `.build/` but the locks, which say who works here."""
    # A kill in between must not leave a plan without its settings, nor an ended extension that looks unfinished:
    # state.json goes after everything that it vouches for, and `sealed` after state.json.
    for entry in list(path.iterdir()):
        if entry.name not in ("state.json", "sealed") and not is_lock(entry.name):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for name in ("state.json", "sealed"):
        (path / name).unlink(missing_ok=True)


@contextmanager
def alone_in(path: Path) -> Iterator[None]:
    """Hold the lock of those who make the plan, or wait for it. The system releases it when its process dies."""
    with (path / "plan-lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def digest_of_location(source: str) -> str:
    """Return the SHA-256 of where SOURCE is: of its absolute path, or of its URL."""
    location = source if "://" in source else str(expanded(source).absolute())
    return hashlib.sha256(location.encode("utf-8", "surrogateescape")).hexdigest()


def is_lock(name: str) -> bool:
    """Return whether a file of `.build/` is a lock."""
    return name in ("lock", "plan-lock") or PART_LOCK.fullmatch(name) is not None


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
