"""`.build/`: what an unfinished build remembers, and who may work on it.

Without state.json, whatever else lies there belongs to no build, and the next one removes it.

lock            held by the process that builds, or shared by those that build a part each; the system releases it
                when that process dies
part-3-of-8     held by the process that builds this part
plan-lock       held for a moment by a part that makes the plan, or finds it made
state.json      the settings, to compare with those of the next run; of an extension, also which label set it extends
facts.json      what the manifest will say of teachers and source, so that `finish` needs neither
plan.*          what to label
shards/N.json   one record for each finished shard: written after its files, so it is the shard's commit point
sealed          SHA-256 of an extension's manifest, written just before the manifest: with that in place, all is done
rejects.parquet of a build in which every image was rejected, which writes no label set

While a finished label set is extended, its own manifest stays in place: OUT is that label set until the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ferkd_data.builder.plan import Part
from ferkd_data.builder.settings import BuildSettings
from ferkd_data.crops import CropDistribution
from ferkd_data.differences import describe_differences
from ferkd_data.errors import BuildError, SettingsMismatchError
from ferkd_data.format.manifest import (
    FILE_NAME,
    BlockEntry,
    Manifest,
    TeacherEntry,
    identity_of,
    read_manifest,
    read_manifest_bytes,
)
from ferkd_data.format.rejects import REJECTS_FILE, REJECTS_NAME
from ferkd_data.format.writers import SHARD_FILE
from ferkd_data.images import Reject
from ferkd_data.labels.buckets import QuantileThresholds, Thresholds
from ferkd_data.labels.statistics import Statistics
from ferkd_data.storage import sha256_file, write_atomically

STATE_VERSION = 1
FOLDER = ".build"
PART_LOCK = re.compile(r"part-(\d+)-of-(\d+)")
EXTENDS = "extends"
"""The setting in state.json that names the label set by its manifest's SHA-256."""


class ShardRecord(BaseModel):
    model_config = ConfigDict(frozen=True)

    version: int = STATE_VERSION
    index: int
    rows: int
    files: tuple[BlockEntry, ...]
    rejects: tuple[Reject, ...]
    statistics: Statistics
    thresholds: tuple[float, float, float]
    """Thresholds (low, mid, top) of the stored buckets."""
    successors: tuple[BlockEntry, ...] = ()
    """While the shard is written anew: the files that take the place of `files`, one for each of them. A kill leaves
    either under the same name; both hold the same probabilities."""

    def either(self) -> Iterator[tuple[BlockEntry, BlockEntry]]:
        """For each file, the entries one of which is true of what lies there."""
        return zip(self.files, self.successors or self.files, strict=True)


class Facts(BaseModel):
    """Statements of a manifest beyond the settings and the shards."""

    model_config = ConfigDict(frozen=True)

    version: int = STATE_VERSION
    teachers: tuple[TeacherEntry, ...]
    num_classes: int
    class_names: tuple[str, ...] | None
    source: str
    place_sha256: str | None = None
    class_folders: tuple[str, ...] | None = None
    left_out: dict[str, int] = {}


class BuildFolder:
    """The folder OUT while a build works in it."""

    def __init__(self, out: Path) -> None:
        self.out = out
        """Where this host writes the label set's files."""
        self.path = out / FOLDER

    @property
    def location(self) -> Path | str:
        """OUT as the user names it: a folder or a URL."""
        return self.out

    def join(self) -> None:
        """See what the driver has prepared, from any host. Raises BuildError where it is not to be seen."""
        if not self.path.is_dir():
            raise BuildError(
                f"node {platform.node()} does not see {self.out}; OUT has to be on a file system that all share, "
                "or in a store"
            )

    def share(self) -> None:
        """Let other hosts see the settings, the facts and the plan."""

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Save the settings, or compare them with those saved. Raises SettingsMismatchError naming both values."""
        path = self.path / "state.json"
        present = json.loads(json.dumps({"version": STATE_VERSION, "settings": settings}))
        if not path.exists():
            self.clear()
            with write_atomically(path) as aside:
                aside.write_text(json.dumps(present, indent=1))
            return
        try:
            saved = json.loads(path.read_bytes())
        except ValueError as error:
            raise BuildError(f"{path}: damaged ({error}); start afresh with --overwrite") from error
        differences = describe_differences(saved, present)
        if differences:
            what, afresh = ("extension", "--extend --overwrite") if EXTENDS in settings else ("build", "--overwrite")
            raise SettingsMismatchError(
                f"{self.location} holds an unfinished {what} with other settings: {'; '.join(differences)}. "
                f"Use the same settings to resume it, another folder, or {afresh}"
            )

    def drop_what_has_ended(self) -> None:
        """Clear what a build, or an extension, left that was killed after its last step."""
        if not (self.path / "state.json").exists():
            self.clear()
            return
        present = identity_of(read_manifest_bytes(self.out))
        sealed = self.path / "sealed"
        extends = self.extends
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
        """Whether the manifest is there, and all that is missing is that this folder goes away."""
        if not (self.out / FILE_NAME).exists():
            return False
        if not (self.path / "state.json").exists() or self.extends is None:
            return True
        sealed = self.path / "sealed"
        return sealed.exists() and sealed.read_text() == identity_of(read_manifest_bytes(self.out))

    def _remove_old_rejects(self) -> None:
        listed = read_manifest(self.out).rejects.path
        for path in self.out.iterdir():
            if REJECTS_FILE.fullmatch(path.name) and path.name != listed:
                path.unlink()

    @property
    def extends(self) -> str | None:
        """The identity of the label set that is being extended here."""
        state = json.loads((self.path / "state.json").read_bytes())
        found: str | None = state["settings"].get(EXTENDS)
        return found

    def discard_extension(self, manifest: Manifest) -> None:
        """Remove an unfinished extension with its shard files; never what `manifest` names."""
        listed = {file.path for shard in manifest.shards for file in shard.files}
        for name in ("labels", "shards"):
            for path in list((self.out / name).rglob("*")):
                if SHARD_FILE.fullmatch(path.name) and path.relative_to(self.out).as_posix() not in listed:
                    path.unlink()
        self.clear()

    def clear(self) -> None:
        """Forget everything but who works here."""
        # A kill in between must not leave a plan without the settings that it belongs to, or take an extension that
        # has ended for one that has not.
        for path in list(self.path.iterdir()):
            if path.name not in ("state.json", "sealed") and not is_lock(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in ("state.json", "sealed"):
            (self.path / name).unlink(missing_ok=True)

    def start_over(self, rejects: Path) -> Path:
        """Forget the build, all of whose images were rejected, so that the same command begins anew.

        `rejects` becomes `.build/rejects.parquet`, which says why.
        """
        self.clear()
        return rejects.replace(self.path / REJECTS_NAME)

    def saved_settings(self) -> BuildSettings:
        saved = json.loads((self.path / "state.json").read_bytes())["settings"]
        thresholds = QuantileThresholds if saved["quantile"] else Thresholds
        distribution = {name: _tuple(value) for name, value in saved["distribution"].items()}
        return BuildSettings(
            **{
                **{field.name: saved[field.name] for field in fields(BuildSettings)},
                "distribution": CropDistribution(**distribution),
                "thresholds": thresholds(**saved["thresholds"]),
            }
        )

    @property
    def is_begun(self) -> bool:
        """Its facts are there, which are saved when the plan is made and checked."""
        return (self.path / "facts.json").exists()

    def save_facts(self, facts: Facts) -> None:
        with write_atomically(self.path / "facts.json") as aside:
            aside.write_text(facts.model_dump_json(indent=1))

    def saved_facts(self) -> Facts:
        return Facts.model_validate_json((self.path / "facts.json").read_bytes())

    def parts(self) -> list[Part]:
        """Every part that was begun at some time."""
        found = [PART_LOCK.fullmatch(path.name) for path in self.path.glob("part-*")]
        return [Part(number=int(name[1]), of=int(name[2])) for name in found if name]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until no other part is inside."""
        with (self.path / "plan-lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def record(self, shard: int) -> ShardRecord | None:
        """The record of a finished shard whose files are all there; None where it has to be labelled."""
        path = self._record_path(shard)
        if not path.exists():
            return None
        record = ShardRecord.model_validate_json(path.read_bytes())
        whole = all(_size(self.out / old.path) in (old.bytes, new.bytes) for old, new in record.either())
        return record if whole else None

    def records(self, shards: Iterable[int]) -> Iterator[tuple[int, ShardRecord | None]]:
        """`record` of each."""
        return ((shard, self.record(shard)) for shard in shards)

    def existing_record(self, shard: int) -> ShardRecord:
        record = self.record(shard)
        if record is None:
            raise BuildError(f"{self.location}: the files of shard {shard} are gone; run the same command again")
        return record

    def save(self, record: ShardRecord) -> None:
        """Save the record of a shard whose files are written."""
        with write_atomically(self._record_path(record.index)) as aside:
            aside.write_text(record.model_dump_json())

    def announce(self, record: ShardRecord) -> None:
        """Save the record of a shard whose files are about to be replaced by their successors."""
        with write_atomically(self._record_path(record.index)) as aside:
            aside.write_text(record.model_dump_json())

    @contextmanager
    def at_hand(self, record: ShardRecord) -> Iterator[None]:
        """The files of a shard lie below `out` meanwhile, as they were written.

        Raises BuildError for a file that was damaged since: what is read here is written on under new digests.
        """
        self.files_now(record)
        yield

    def files_now(self, record: ShardRecord) -> tuple[BlockEntry, ...]:
        """The entries that are true of a shard's files as they lie there. Raises BuildError for a damaged file."""
        return tuple(self._entry_now(old, new) for old, new in record.either())

    def _entry_now(self, old: BlockEntry, new: BlockEntry) -> BlockEntry:
        path = self.out / old.path
        digest = sha256_file(path)
        for entry in (old, new):
            if entry.sha256 == digest:
                return entry
        raise BuildError(
            f"{path}: was damaged or changed since it was written (its SHA-256 differs); remove it and run the build "
            "command again, which labels this shard anew"
        )

    def look_again(self) -> None:
        """A network file system looks again for a name that it knows as missing when its folder is listed."""
        for path in (self.path / "shards", self.out / "labels", self.out / "shards"):
            list(path.rglob("*"))

    def commit(self, manifest: Manifest) -> None:
        """`out` holds the whole label set, with the manifest."""

    def remove(self) -> None:
        """Forget the build: it has ended."""
        self.clear()
        shutil.rmtree(self.path)

    def _record_path(self, shard: int) -> Path:
        return self.path / "shards" / f"{shard:05d}.json"


def digest_of_location(source: str) -> str:
    """Return the SHA-256 of where SOURCE is: of its absolute path, or of its URL."""
    location = source if "://" in source else str(Path(source).expanduser().absolute())
    return hashlib.sha256(location.encode("utf-8", "surrogateescape")).hexdigest()


def is_lock(name: str) -> bool:
    """Whether a file of `.build/` only says who works there."""
    return name in ("lock", "plan-lock") or PART_LOCK.fullmatch(name) is not None


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
