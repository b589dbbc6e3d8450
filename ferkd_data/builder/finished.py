"""Recognise a finished build: the same command run again after its end does nothing, and succeeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ferkd_data.builder.locks import clean_up_after_end
from ferkd_data.builder.plan import digest_of_listing
from ferkd_data.builder.prepare import Request
from ferkd_data.builder.shard_files import FOLDER
from ferkd_data.builder.state import EMPTY_OUT, digest_of_location
from ferkd_data.builder.store_files import StoreFiles
from ferkd_data.errors import BuildError, RemoteError, SettingsMismatchError, describe_differences
from ferkd_data.format.manifest import Manifest, TeacherEntry
from ferkd_data.format.manifest_file import FILE_NAME, MAX_MANIFEST_BYTES, parse_manifest, read_manifest
from ferkd_data.images import ImageSource
from ferkd_data.labels.buckets import QuantileThresholds
from ferkd_data.remote import open_remote
from ferkd_data.storage import expanded
from ferkd_data.teachers import TeacherSpec

WAY_OUT = "use another folder, --extend to add to it, or --overwrite to replace it"
WAY_OUT_OF_PARTS = f"use another folder, or {EMPTY_OUT}"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished label set whose settings are those that are asked for."""

    location: Path | str
    manifest: Manifest
    teachers_are_sure: bool
    """True where the teachers must be the same, so that their weights need not be looked at."""
    source_is_sure: bool
    """True where the images and their classes must be the same, so that they need not be listed."""
    was_interrupted: bool
    """Its build was killed after the manifest, and has been cleaned up now."""
    way_out: str
    """Advice for a message about a difference."""

    def check_source(self, images: ImageSource) -> None:
        """List the images, and raise SettingsMismatchError where they, or their classes, are others than then."""
        if digest_of_listing(images) != self.manifest.source.plan_sha256:
            saved, now = self.manifest.source.description, images.description
            raise SettingsMismatchError(
                f"{self.location} holds a finished label set of other images, or of other classes of these: {saved}, "
                f"and SOURCE is {now}; {self.way_out}"
            )
        names = images.class_names
        # A source with names for some of the classes gives way to the teachers' names.
        if names is not None and len(names) == self.manifest.num_classes:
            saved_names = self.manifest.class_names
            self._compare("class_names", saved_names and list(saved_names), list(names))

    def check_teachers(self, entries: Sequence[TeacherEntry], *, precision: str) -> None:
        """Raise SettingsMismatchError where teachers of these entries would give other labels.

        With the precision `auto`, that of the label set is right, whatever this host would choose.
        """
        saved, present = ([entry.identity() for entry in each] for each in (self.manifest.teachers, entries))
        if precision == "auto":
            for then, now in zip(saved, present, strict=True):
                now["precision"] = then["precision"]
        self._compare("teachers", saved, present)

    def _compare(self, name: str, saved: Any, present: Any) -> None:
        _raise_if_different(self.location, {name: saved}, {name: present}, self.way_out)


def find_finished(asked: Request, *, in_parts: bool = False) -> Finished | None:
    """Return the label set in OUT, if there is one, and clean up what its build left behind.

    `in_parts` says that OUT is to be built part by part, for the advice in messages.

    Raises SettingsMismatchError that names the settings that differ, BuildError for one that no single build wrote.
    """
    location = asked.out
    way_out = WAY_OUT_OF_PARTS if in_parts else WAY_OUT
    manifest = _manifest_at(location)
    if manifest is None:
        return None
    if manifest.origin != "build":
        how = {"import": "imported", "merge": "merged", "later kind": "pulled as one of several crop kinds"}
        raise BuildError(f"{location} holds a finished label set that was {how[manifest.origin]}, not built; {way_out}")
    # The cheapest comparison first: nothing is opened, listed or loaded for a build of other settings.
    _raise_if_different(location, _saved(manifest), _asked(asked, manifest), way_out)
    _check_files(location, manifest, EMPTY_OUT if in_parts else "use --overwrite to build it again")
    specs = [str(spec) for spec in asked.teachers]
    return Finished(
        location=location,
        manifest=manifest,
        teachers_are_sure=[entry.spec for entry in manifest.teachers] == specs
        and not any(map(_is_on_this_host, asked.teachers)),
        source_is_sure=manifest.source.place_sha256 == digest_of_location(asked.source)
        # Label sets of an earlier version do not say whether they were given a list of classes.
        and (asked.classes is None or manifest.source.classes_sha256 is not None),
        # Last, when nothing is left that could be refused: it removes what the build left.
        was_interrupted=_clean_up(location),
        way_out=way_out,
    )


def _manifest_at(location: Path | str) -> Manifest | None:
    if isinstance(location, Path):
        return read_manifest(location) if (location / FILE_NAME).is_file() else None
    try:
        text = StoreFiles(location).remote.read(FILE_NAME, max_bytes=MAX_MANIFEST_BYTES)
    except RemoteError as error:
        if error.status == 404:
            return None
        raise
    return parse_manifest(text, f"{location}/{FILE_NAME}")


def _check_files(location: Path | str, manifest: Manifest, again: str) -> None:
    """Raise BuildError where shard files are missing; their bytes are for `verify`."""
    if not isinstance(location, Path):
        return
    files = [file for shard in manifest.shards for file in shard.files]
    missing = [file.path for file in files if not (location / file.path).is_file()]
    if missing:
        raise BuildError(
            f"{location} holds the manifest of a finished label set, but {len(missing)} of its {len(files)} files are "
            f"gone, such as {missing[0]}; bring them back, or {again}"
        )


def _clean_up(location: Path | str) -> bool:
    if isinstance(location, Path):
        return clean_up_after_end(location)
    remote = open_remote(location)
    # The manifest is there, so whatever lies in .build/ is the rest of a build that has ended.
    if not any(name.startswith(f"{FOLDER}/") for name in remote.sizes()):
        return False
    remote.remove(FOLDER)
    return True


def _saved(manifest: Manifest) -> dict[str, Any]:
    """Return what a manifest says of the settings, under the names that a message uses."""
    stored = manifest.thresholds
    return {
        "crops": manifest.num_crops,
        "crops_per_block": manifest.crops_per_block,
        "top_k": manifest.top_k,
        "layout": manifest.layout,
        "seed": manifest.seed,
        "scale": list(manifest.crop_distribution.scale),
        "ratio": list(manifest.crop_distribution.ratio),
        "hflip": manifest.crop_distribution.hflip,
        "crop_kinds": list(map(str, manifest.kinds)),
        "augment": list(manifest.augmentations or ()),
        "ensemble": manifest.ensemble,
        "thresholds": list(stored.quantile or (stored.low, stored.mid, stored.top)),
        "quantile": stored.quantile is not None,
        "confidence": stored.confidence,
        "max_pixels": manifest.max_pixels,
        "images_per_shard": manifest.images_per_shard,
        "number of teachers": len(manifest.teachers),
        "precision": sorted({teacher.precision for teacher in manifest.teachers}),
        "classes": None if manifest.source.class_folders is None else list(manifest.source.class_folders),
        "digest of --classes": manifest.source.classes_sha256,
    }


def _asked(asked: Request, manifest: Manifest) -> dict[str, Any]:
    """Return the request in the form of `_saved`. Values that one side cannot know are taken from the manifest."""
    settings, thresholds = asked.settings, asked.settings.thresholds
    given = {
        **asdict(settings),
        "scale": list(settings.distribution.scale),
        "ratio": list(settings.distribution.ratio),
        "hflip": settings.distribution.hflip,
        "crop_kinds": list(map(str, settings.kinds)),
        "augment": list(settings.augment),
        "thresholds": [thresholds.low, thresholds.mid, thresholds.top],
        "quantile": isinstance(thresholds, QuantileThresholds),
        "confidence": thresholds.confidence,
        "images_per_shard": settings.shard_images,
        "number of teachers": len(asked.teachers),
    }
    saved = _saved(manifest)
    # A manifest may lack these two (docs/format.md).
    unknown = {name for name in ("max_pixels", "images_per_shard") if saved[name] is None}
    # `auto` depends on the device. The build that is there decided it, and is right.
    if asked.precision != "auto":
        given["precision"] = [asked.precision]
    if asked.classes is not None and saved["classes"] is not None:
        given["classes"] = list(asked.classes.folders)
    # Without it, the listing decides (`Finished.check_source`).
    if saved["digest of --classes"] is not None:
        given["digest of --classes"] = None if asked.classes is None else asked.classes.sha256
    return {name: saved[name] if name in unknown else given.get(name, saved[name]) for name in saved}


def _raise_if_different(location: Path | str, saved: dict[str, Any], present: dict[str, Any], way_out: str) -> None:
    lines = describe_differences(saved, present)
    if lines:
        raise SettingsMismatchError(
            f"{location} holds a finished label set with other settings: {'; '.join(lines[:4])}; {way_out}"
        )


def _is_on_this_host(spec: TeacherSpec) -> bool:
    """Return whether a teacher is the user's own code, or the spec names a file or folder that exists here.

    Its text does not tell such a teacher: a relative path means another file in another working folder, a label set is
    copied to a host with other files, and a file that was put in place of another may be older than the label set.
    """
    # Names of models are looked at too: libraries prefer a folder of that name.
    names = (spec.name, spec.name.removeprefix("local-dir:"), spec.checkpoint, spec.names, spec.templates)
    return spec.kind == "python" or any(expanded(name).exists() for name in names if name)
