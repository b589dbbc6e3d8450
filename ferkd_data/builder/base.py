"""The label set that an extension starts from: the settings that it fixes, and whether it can be extended at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ferkd_data.builder.settings import BuildSettings, stored_settings
from ferkd_data.crop_kinds import CropKind, make_crop_kinds
from ferkd_data.crops import CropDistribution
from ferkd_data.errors import SettingsMismatchError, UsageError, describe_differences
from ferkd_data.format.manifest import DEFAULT_IMAGES_PER_SHARD, Manifest, TeacherEntry
from ferkd_data.format.manifest_file import FILE_NAME, identity_of, parse_manifest, read_manifest_bytes
from ferkd_data.images import ClassList
from ferkd_data.labels.buckets import QuantileThresholds, Thresholds


@dataclass(frozen=True, kw_only=True)
class Base:
    """A finished label set that is to be extended."""

    out: Path
    manifest: Manifest
    identity: str
    """SHA-256 of the manifest."""

    @property
    def specs(self) -> tuple[str, ...]:
        return tuple(teacher.spec for teacher in self.manifest.teachers)

    @property
    def precision(self) -> str:
        """The precision of all teachers; auto where they differ."""
        found = {teacher.precision for teacher in self.manifest.teachers}
        return found.pop() if len(found) == 1 else "auto"

    @property
    def classes(self) -> ClassList | None:
        """The classes as they were numbered, where the manifest has their folders or texts."""
        folders, names = self.manifest.source.class_folders, self.manifest.class_names
        if folders is None:
            return None
        return ClassList(str(self.out / FILE_NAME), folders, names if names and len(names) == len(folders) else folders)

    def settings(self, given: Mapping[str, Any]) -> BuildSettings:
        """Return the settings of the extension.

        Free are `images_per_shard`, `max_pixels` and the number of crops: `crops` or, in a label set with crop kinds,
        the last kind's number and further kinds in `crop_kinds`.

        Raises SettingsMismatchError that names both values where one that is given contradicts the manifest,
        UsageError where the number of crops cannot be reached.
        """
        kinds = self._kinds(given.get("crop_kinds") or ())
        asked = given.get("crops")
        crops = sum(kind.crops for kind in kinds) or int(self.manifest.num_crops if asked is None else asked)
        if kinds and asked not in (None, crops):
            raise UsageError(
                f"{self.out}: has the crop kinds {self._kinds_in_words()}, so crops (--crops) cannot say which "
                "kind gets more; give crop_kinds (--crop-kinds) with a larger n for the last kind, or a further kind"
            )
        fixed = {**stored_settings(self.manifest), "crops_per_block": self._crops_per_block(crops)}
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
        free: dict[str, Any] = {"images_per_shard": self._images_per_shard()}
        if self.manifest.max_pixels is not None:
            free["max_pixels"] = self.manifest.max_pixels
        settings = BuildSettings(**{**free, **given, **fixed, "crops": crops, "crop_kinds": kinds})
        if settings.crops_per_block != fixed["crops_per_block"]:
            raise UsageError(
                f"{self.out}: has crop blocks of {fixed['crops_per_block']}, and one of them would hold crops of two "
                f"kinds; give the kind {kinds[-2].name!r} a number of crops with which the next kind begins at a "
                f"multiple of {fixed['crops_per_block']}"
            )
        return settings

    def _kinds_in_words(self) -> str:
        return ", ".join(f"{kind.name}:n={kind.crops}" for kind in self.manifest.kinds)

    def _kinds(self, given: Sequence[str | CropKind]) -> tuple[CropKind, ...]:
        """Return the crop kinds of the extension: more crops of the last kind, or further kinds, and no other change.

        Raises SettingsMismatchError for anything else.
        """
        old = self.manifest.kinds
        if not given:
            return old
        if not old:
            raise SettingsMismatchError(
                f"{self.out}: was built without crop kinds, so its crops belong to none, and none can be added; build "
                "a label set with crop kinds into another folder"
            )
        kinds = make_crop_kinds(given, distribution=self.manifest.crop_distribution.settings(), known=old)
        what = (
            f"{self.out}: has the crop kinds {self._kinds_in_words()}; an extension gives them all in this order, with "
            "more crops of the last one, further kinds after it, or both"
        )
        if [kind.name for kind in kinds[: len(old)]] != [kind.name for kind in old]:
            raise SettingsMismatchError(f"{what}; asked for {', '.join(kind.name for kind in kinds)}")
        for number, (before, now) in enumerate(zip(old, kinds, strict=False)):
            more = number == len(old) - 1 and now.crops >= before.crops
            if before != (replace(now, crops=before.crops) if more else now):
                raise SettingsMismatchError(f"{what}; {before.name!r}: saved {before}, now {now}")
        return kinds

    def check_teachers(self, entries: Sequence[TeacherEntry]) -> None:
        """Raise SettingsMismatchError, which names both values, where these teachers would give other labels."""
        saved, present = ([entry.identity() for entry in each] for each in (self.manifest.teachers, entries))
        lines = describe_differences({"teachers": saved}, {"teachers": present})
        if lines:
            raise SettingsMismatchError(
                f"{self.out}: was labelled by other teachers than those given: {'; '.join(lines)}. Another teacher's "
                "labels go into a label set of their own; ferkd-data merge makes the ensemble"
            )

    def check_class_names(self, names: tuple[str, ...] | None) -> None:
        """Raise SettingsMismatchError where the source's class numbers have another meaning."""
        saved = self.manifest.class_names
        if saved is None or names is None or saved == names:
            return
        lines = describe_differences({"class_names": list(saved)}, {"class_names": list(names)})
        raise SettingsMismatchError(f"{self.out}: the source has other classes than the label set: {lines[0]}")

    def _comparable(self, value: Any) -> Any:
        """Replace quantiles that are those of the manifest by the thresholds that were derived from them."""
        stored = self.manifest.thresholds
        if isinstance(value, QuantileThresholds) and stored.quantile == (value.low, value.mid, value.top):
            return replace(stored.absolute(), confidence=value.confidence)
        return value

    def _crops_per_block(self, crops: int) -> int:
        """Return the block size. Raises UsageError where more crops would mean to rewrite a file."""
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
    """Open the label set in `out`.

    Raises ManifestError where there is no finished one, UsageError for one that was imported or merged.
    """
    text = read_manifest_bytes(out)
    manifest = parse_manifest(text, str(out / FILE_NAME))
    if manifest.origin == "later kind":
        raise UsageError(
            f"{out}: holds one kind of crops that was pulled alone, and further crops would not be those of the label "
            "set that it comes from; pull and extend the whole"
        )
    if manifest.origin != "build":
        how = {"import": "imported", "merge": "merged"}[manifest.origin]
        raise UsageError(
            f"{out}: was {how}, so no seed and teachers give its crops again; only a label set as a build wrote it "
            "can be extended. Build the further crops or images into a folder of their own, and merge"
        )
    return Base(out=out, manifest=manifest, identity=identity_of(text))


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, (CropDistribution, Thresholds, QuantileThresholds)) else value


def _largest_divisor(number: int, at_most: int) -> int:
    return max(divisor for divisor in range(1, at_most + 1) if number % divisor == 0)
