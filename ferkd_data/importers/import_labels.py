"""Make a label set of layout parquet from another project's label files and their images, whatever the format."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ferkd_data
from ferkd_data.errors import ForeignFileError, ImageError, ShardError, UsageError
from ferkd_data.format import out_folder
from ferkd_data.format.manifest import (
    UNKNOWN_SHA256,
    CreatedBy,
    Manifest,
    RejectsEntry,
    ShardEntry,
    SourceEntry,
    ThresholdsEntry,
)
from ferkd_data.format.progress import OnProgress, TransferProgress, with_files
from ferkd_data.format.rejects import REJECTS_NAME, RejectWriter, rejects_entry
from ferkd_data.format.writers import write_shard
from ferkd_data.images import (
    DEFAULT_MAX_PIXELS,
    ImageRef,
    ImageSource,
    Reject,
    image_size,
    in_groups,
)
from ferkd_data.importers.foreign_labels import LabelFiles, to_row
from ferkd_data.labels import statistics
from ferkd_data.labels.buckets import Thresholds
from ferkd_data.labels.checks import check_rows
from ferkd_data.labels.rows import UNKNOWN_TARGET, ImageLabels, ShardLabels
from ferkd_data.labels.statistics import Statistics, shard_statistics
from ferkd_data.scratch import Scratch
from ferkd_data.storage import image_digest, local_path, sha256_file, write_atomically
from ferkd_data.teachers.probe import check_class_count


def run_import(
    files: LabelFiles,
    source: ImageSource,
    out: Path,
    *,
    images: str | Path,
    classes: str | Path | None,
    crops_per_block: int,
    images_per_shard: int,
    settings: out_folder.Settings,
    on_progress: OnProgress | None,
) -> Manifest:
    """Write the label set `out` from another project's label files and their images; go on where a run was killed.

    `settings` are the format's own that a finished or interrupted import must share with this one. `images` and
    `classes` are what the user gave for `source`. Raises SourceError; UsageError where no image has labels, and where
    the images' classes cannot be those of the labels.
    """
    # All that decides what is written: another value must not go on with, or take for done, what lies in OUT.
    shared = {"folder": str(files.folder.absolute()), "images": str(images), "classes": content_of(classes)}
    work = _Import(
        files=files,
        source=source,
        crops_per_block=crops_per_block,
        images_per_shard=images_per_shard,
        settings={**shared, **settings},
        classes_given=classes is not None,
    )
    return work.run(out, on_progress)


def content_of(path: str | Path | None) -> str:
    """Return what tells one text file of settings from another: its digest, since its name stays when it is edited."""
    return str(path) if path is None or not local_path(path).is_file() else sha256_file(local_path(path))


@dataclass(kw_only=True)
class _Import:
    """One import: its settings, and what the first images decide for all."""

    files: LabelFiles
    source: ImageSource
    crops_per_block: int
    images_per_shard: int
    settings: out_folder.Settings
    """Settings that a finished or interrupted import must share with this one, besides the format and shapes."""
    classes_given: bool
    """Class numbers come from a list that the user gave."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    shape: tuple[int, int] = (0, 0)
    """(N crops, k classes) of the first image."""
    first_reject: Reject | None = None
    most_pixels: int = 0
    """Pixels of the largest image so far."""

    def __post_init__(self) -> None:
        shapes = {"crops_per_block": self.crops_per_block, "images_per_shard": self.images_per_shard}
        self.settings = {"command": f"import of {self.files.format}'s files", **self.settings, **shapes}

    def run(self, out: Path, on_progress: OnProgress | None) -> Manifest:
        there = out_folder.finished(out)
        if there is not None and self._is_of(there):
            out_folder.clean(out)
            return there
        out = out_folder.begin(out, self.settings)
        path = out / REJECTS_NAME
        # Written elsewhere until the end, so that a kill leaves no half-written rejects in OUT.
        with Scratch("import") as scratch:
            written = scratch / REJECTS_NAME
            with RejectWriter(written) as rejects:
                shards, counted = self._write_shards(out, rejects, on_progress)
            with write_atomically(path) as aside:
                shutil.copyfile(written, aside)
        return out_folder.finish(out, self._manifest(shards, rejects_entry(path, rejects.rows), counted))

    def _is_of(self, there: Manifest) -> bool:
        origin = (there.model_extra or {}).get("imported_from")
        return isinstance(origin, dict) and origin.get("settings") == out_folder.settings_digest(self.settings)

    def _write_shards(
        self, out: Path, rejects: RejectWriter, on_progress: OnProgress | None
    ) -> tuple[tuple[ShardEntry, ...], Statistics]:
        """Raises UsageError where no image has labels."""
        entries: list[ShardEntry] = []
        counted = []
        progress = TransferProgress(images=0)
        report = on_progress or (lambda progress: None)
        report(progress)
        # Empty groups make no shard, so shards are numbered by those that are written.
        for group in in_groups(self.source.list_images(), self.images_per_shard):
            # Here and not in `run`: a Parquet file tells its classes while it is listed.
            self._check_targets(group)
            # Before the shard is begun, since the first image decides how many crops, and so blocks, there are.
            rows = self._sound(list(self._rows(group, rejects)), rejects)
            if rows:
                starts = range(0, self.shape[0], self.crops_per_block)
                count, files = write_shard(
                    out, len(entries), ((row, b"") for row in rows), layout="parquet", block_starts=starts
                )
                entries.append(ShardEntry(index=len(entries), rows=count, files=files))
                counted.append(shard_statistics(ShardLabels.from_rows(rows)))
                progress = with_files(progress, files, sum(entry.rows for entry in entries))
            report(progress)
        if not entries:
            raise UsageError(self._nothing())
        return tuple(entries), statistics.add(counted)

    def _check_targets(self, items: Iterable[ImageRef | Reject]) -> None:
        """Raise UsageError where the images' class numbers cannot be those of the label files."""
        known = [item.target for item in items if isinstance(item, ImageRef) and item.target is not None]
        try:
            check_class_count(
                self.files.num_classes,
                class_names=self.source.class_names,
                max_target=max(known, default=-1),
                classes_given=self.classes_given,
            )
        except UsageError as error:
            raise UsageError(
                f"{error}; where the labels have another number of classes than {self.files.num_classes}, give that "
                "(--num-classes)"
            ) from error

    def _rows(self, items: Iterable[ImageRef | Reject], rejects: RejectWriter) -> Iterator[ImageLabels]:
        # Rejects of the listing first: reading wants images alone, and in order.
        refs = []
        for item in items:
            if isinstance(item, ImageRef):
                refs.append(item)
            else:
                self._reject(item, rejects)
        for ref, data in zip(refs, self.source.read(refs), strict=True):
            try:
                if isinstance(data, ImageError):
                    raise data
                yield self._row(ref, data)
            except ImageError as error:
                self._reject(Reject(key=ref.key, reason=error.reason, detail=error.detail), rejects)
            # One damaged or missing file of labels costs its image, not the import.
            except (ForeignFileError, ValueError) as error:
                self._reject(Reject(key=ref.key, reason="unreadable_labels", detail=str(error)), rejects)

    def _sound(self, rows: list[ImageLabels], rejects: RejectWriter) -> list[ImageLabels]:
        """Return the rows that readers accept, and make rejects of the others: one would spoil the whole shard."""
        if not rows or self._refused(rows) is None:
            return rows
        sound = []
        for row in rows:
            why = self._refused([row])
            if why is None:
                sound.append(row)
            else:
                self._reject(Reject(key=row.key, reason="unreadable_labels", detail=why), rejects)
        return sound

    def _refused(self, rows: list[ImageLabels]) -> str | None:
        """Return why readers refuse these rows; None where they do not."""
        try:
            check_rows(self.files.format, ShardLabels.from_rows(rows), self.files.num_classes)
        except ShardError as error:
            return str(error)
        return None

    def _reject(self, reject: Reject, rejects: RejectWriter) -> None:
        self.first_reject = self.first_reject or reject
        rejects.add(reject)

    def _row(self, ref: ImageRef, data: bytes) -> ImageLabels:
        # From the header: an import needs no pixels, and decoding would take most of its time.
        size = image_size(data)
        self.most_pixels = max(self.most_pixels, size[0] * size[1])
        labels = self.files.read(ref.key, size)
        shape = labels.class_index.shape
        # The first image decides: a label set has one N and one k.
        if self.shape == (0, 0):
            self.shape = shape
        if shape != self.shape:
            raise ForeignFileError(f"{shape} crops and classes, the first image has {self.shape}")
        return to_row(
            labels,
            key=ref.key,
            digest=image_digest(data),
            size=size,
            target=UNKNOWN_TARGET if ref.target is None else ref.target,
            num_classes=self.files.num_classes,
            thresholds=self.thresholds,
        )

    def _nothing(self) -> str:
        first = self.first_reject
        why = f"; the first: {first.key}: {first.detail}" if first else ""
        here = f"{self.files.folder}: no image of {self.source.description} has labels here"
        return f"{here}; {self.files.expected} is expected{why}"

    def _manifest(self, shards: tuple[ShardEntry, ...], rejects: RejectsEntry, counted: Statistics) -> Manifest:
        num_crops, top_k = self.shape
        num_images = sum(shard.rows for shard in shards)
        origin: dict[str, Any] = {
            "format": self.files.format,
            "crops_follow_seed": self.files.seed is not None,
            "settings": out_folder.settings_digest(self.settings),
        }
        manifest = Manifest(
            created_by=CreatedBy(name="ferkd-data", version=ferkd_data.__version__),
            layout="parquet",
            num_images=num_images,
            num_crops=num_crops,
            crops_per_block=self.crops_per_block,
            top_k=top_k,
            num_classes=self.files.num_classes,
            # Of crops that were drawn elsewhere no seed is known; `crops_follow_seed` says so.
            seed=self.files.seed or 0,
            crop_distribution=self.files.distribution,
            teachers=self.files.teachers,
            ensemble="mean",
            thresholds=ThresholdsEntry.of(self.thresholds),
            # Readers refuse what is above the default, unless the manifest allows it.
            max_pixels=self.most_pixels if self.most_pixels > DEFAULT_MAX_PIXELS else None,
            source=SourceEntry(
                description=f"imported from {self.files.format}'s files, images: {self.source.description}",
                images_seen=num_images + rejects.rows,
                # There was no plan. Zeros match no build's, so that nothing is taken for an extension of this set.
                plan_sha256=UNKNOWN_SHA256,
            ),
            shards=shards,
            rejects=rejects,
            statistics=counted,
        )
        return manifest.model_copy(update={"imported_from": origin})
