"""The finished label set that a build extends: what it fixes, and whether it can be extended at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ferkd_data.buckets import QuantileThresholds, Thresholds
from ferkd_data.builder.settings import DEFAULT_IMAGES_PER_SHARD, BuildSettings
from ferkd_data.crops import CropDistribution
from ferkd_data.differences import describe_differences
from ferkd_data.errors import SettingsMismatchError, UsageError
from ferkd_data.images import ClassList
from ferkd_data.manifest import FILE_NAME, Manifest, TeacherEntry, identity_of, parse_manifest, read_manifest_bytes

NOT_COMPARED = {"spec", "name"}
"""Of a teacher: how it was called."""


@dataclass(frozen=True, kw_only=True)
class Base:
    out: Path
    manifest: Manifest
    identity: str
    """SHA-256 of the manifest."""

    @property
    def specs(self) -> tuple[str, ...]:
        return tuple(teacher.spec for teacher in self.manifest.teachers)

    @property
    def precision(self) -> str:
        """Of all teachers; auto where they differ."""
        found = {teacher.precision for teacher in self.manifest.teachers}
        return found.pop() if len(found) == 1 else "auto"

    @property
    def classes(self) -> ClassList | None:
        """The classes as they were numbered, where the label set says by which folders or texts."""
        folders, names = self.manifest.source.class_folders, self.manifest.class_names
        if folders is None:
            return None
        return ClassList(str(self.out / FILE_NAME), folders, names if names and len(names) == len(folders) else folders)

    def settings(self, given: Mapping[str, Any]) -> BuildSettings:
        """Those of the extended label set. Only `crops`, `images_per_shard` and `max_pixels` are free.

        Raises SettingsMismatchError that names both values where one that is given contradicts the manifest,
        UsageError where the number of crops cannot be reached.
        """
        crops = int(given.get("crops", self.manifest.num_crops))
        fixed = {**self._stored(), "crops_per_block": self._crops_per_block(crops)}
        lines = [
            line
            for name in fixed
            if name in given
            for line in describe_differences(_plain(fixed[name]), _plain(self._comparable(given[name])), name)
        ]
        if lines:
            raise SettingsMismatchError(
                f"{self.out}: an extended label set keeps its settings: {'; '.join(lines)}. Leave these out, or build "
                "into another folder"
            )
        free = {"images_per_shard": self._images_per_shard()}
        if self.manifest.max_pixels is not None:
            free["max_pixels"] = self.manifest.max_pixels
        return BuildSettings(**{**free, **given, **fixed, "crops": crops})

    def check_teachers(self, entries: Sequence[TeacherEntry]) -> None:
        """Raises SettingsMismatchError that names both values where these would say something else."""
        saved, present = ([_compared(entry) for entry in each] for each in (self.manifest.teachers, entries))
        lines = describe_differences({"teachers": saved}, {"teachers": present})
        if lines:
            raise SettingsMismatchError(
                f"{self.out}: was labelled by other teachers than those given: {'; '.join(lines)}. Another teacher's "
                "labels go into a label set of their own; ferkd-data merge makes the ensemble"
            )

    def check_class_names(self, names: tuple[str, ...] | None) -> None:
        """Raises SettingsMismatchError where the source's class numbers mean something else."""
        saved = self.manifest.class_names
        if saved is None or names is None or saved == names:
            return
        lines = describe_differences({"class_names": list(saved)}, {"class_names": list(names)})
        raise SettingsMismatchError(f"{self.out}: the source has other classes than the label set: {lines[0]}")

    def _stored(self) -> dict[str, Any]:
        """Settings that the manifest decides."""
        manifest = self.manifest
        drawn = manifest.crop_distribution
        return {
            "top_k": manifest.top_k,
            "layout": manifest.layout,
            "seed": manifest.seed,
            "distribution": CropDistribution(scale=drawn.scale, ratio=drawn.ratio, hflip=drawn.hflip),
            "augment": manifest.augmentations or (),
            "ensemble": manifest.ensemble,
            "thresholds": manifest.thresholds.absolute(),
        }

    def _comparable(self, value: Any) -> Any:
        """Quantiles that are those of the manifest stand for the thresholds that were found with them."""
        stored = self.manifest.thresholds
        if isinstance(value, QuantileThresholds) and stored.quantile == (value.low, value.mid, value.top):
            return replace(stored.absolute(), confidence=value.confidence)
        return value

    def _crops_per_block(self, crops: int) -> int:
        """Raises UsageError where more crops would mean to write a file anew."""
        has, block = self.manifest.num_crops, self.manifest.crops_per_block
        if crops < has:
            raise UsageError(f"{self.out}: has {has} crops per image already, asked for {crops}; give {has} or more")
        if crops == has:
            return block
        if self.manifest.layout == "webdataset":
            raise UsageError(
                f"{self.out}: layout webdataset keeps all crops of an image in one file, so it cannot get more; turn "
                f"it into layout parquet first: ferkd-data convert {self.out} NEW --layout parquet"
            )
        if has < block:
            return has  # one short block for each shard: they are whole blocks of that size
        if has % block:
            raise UsageError(
                f"{self.out}: its {has} crops end within a crop block of {block}, whose files would have to be written "
                f"anew; cut it into blocks that divide {has} first, as with: ferkd-data convert {self.out} NEW "
                f"--layout parquet --crops-per-block {_largest_divisor(has, block)}"
            )
        return block

    def _images_per_shard(self) -> int:
        if self.manifest.images_per_shard is not None:
            return self.manifest.images_per_shard
        rows = [shard.rows for shard in self.manifest.shards]
        return max(rows) if len(rows) > 1 else max(rows[0], DEFAULT_IMAGES_PER_SHARD[self.manifest.layout])


def open_base(out: Path) -> Base:
    """Raises ManifestError where there is no finished label set, UsageError for one that no single build wrote."""
    text = read_manifest_bytes(out)
    manifest = parse_manifest(text, str(out / FILE_NAME))
    for mark, how in (("imported_from", "imported"), ("merged_from", "merged")):
        if mark in (manifest.model_extra or {}):
            raise UsageError(
                f"{out}: was {how}, so no seed and teachers give its crops again; only a label set as a build wrote it "
                "can be extended. Build the further crops or images into a folder of their own, and merge"
            )
    return Base(out=out, manifest=manifest, identity=identity_of(text))


def _compared(entry: TeacherEntry) -> dict[str, Any]:
    return {name: value for name, value in entry.model_dump(mode="json").items() if name in _COMPARED}


_COMPARED = set(TeacherEntry.model_fields) - NOT_COMPARED


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, (CropDistribution, Thresholds, QuantileThresholds)) else value


def _largest_divisor(number: int, at_most: int) -> int:
    return max(divisor for divisor in range(1, at_most + 1) if number % divisor == 0)
