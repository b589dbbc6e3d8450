"""The end of a build: quantile thresholds where asked for, rejects, and last of all the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ferkd_data.augment.distribution import num_words
from ferkd_data.builder.plan import Plan
from ferkd_data.builder.settings import BuildSettings
from ferkd_data.builder.shard_files import ShardRecord
from ferkd_data.builder.state import BuildFolder, Facts
from ferkd_data.errors import BuildError
from ferkd_data.format import parquet, webdataset
from ferkd_data.format.manifest import (
    CROP_KINDS,
    RECORDED_OPERATIONS,
    BlockEntry,
    CreatedBy,
    CropDistributionEntry,
    CropKindEntry,
    Manifest,
    RejectsEntry,
    ShardEntry,
    SourceEntry,
    ThresholdsEntry,
    write_manifest,
)
from ferkd_data.format.rejects import REJECTS_NAME, RejectWriter, read_rejects, rejects_entry
from ferkd_data.format.writers import write_shard
from ferkd_data.labels import statistics
from ferkd_data.labels.buckets import (
    NUM_FLOAT16,
    Thresholds,
    buckets_of,
    confidence,
    confidence_counts,
)
from ferkd_data.labels.rows import ImageLabels, ShardLabels, concat_crops
from ferkd_data.labels.statistics import Statistics
from ferkd_data.storage import write_atomically


def seal(folder: BuildFolder, plan: Plan, settings: BuildSettings, facts: Facts, version: str) -> Manifest:
    """Write rejects.parquet and manifest.json of a build whose shards all have their record.

    Safe to run again after a kill. Raises BuildError where every image was rejected: then no label set is written, and
    the same command begins anew.
    """
    # Before anything is rewritten, so that starting over finds the build as its workers left it.
    if not any(folder.existing_record(shard).rows for shard in plan.shards):
        raise _start_over(folder, plan)
    thresholds = _final_thresholds(folder, plan, settings, facts.num_classes)
    # Each shard's record says with which thresholds it was written, so a run after a kill rewrites only the others.
    records = [_rewrite_buckets(folder, shard, settings, thresholds, facts.num_classes) for shard in plan.shards]
    manifest = manifest_of(
        settings,
        facts,
        plan,
        Contents(
            shards=tuple(ShardEntry(index=r.index, rows=r.rows, files=r.files) for r in records),
            rejects=write_rejects(folder, plan, REJECTS_NAME),
            images_seen=plan.summary.images + plan.summary.rejects,
            statistics=statistics.add(record.statistics for record in records),
            thresholds=thresholds,
        ),
        version,
    )
    write_manifest(folder.out, manifest)
    return manifest


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The contents of a label set, as its manifest counts them."""

    shards: tuple[ShardEntry, ...]
    rejects: RejectsEntry
    images_seen: int
    """Images of the source that were labelled or rejected."""
    statistics: Statistics
    thresholds: Thresholds
    """Thresholds of the stored buckets: numbers also where quantiles were asked for."""


def manifest_of(settings: BuildSettings, facts: Facts, plan: Plan, contents: Contents, version: str) -> Manifest:
    """Return the manifest of a build with these contents; `version` is that of ferkd-data. Does no I/O."""
    return Manifest(
        created_by=CreatedBy(name="ferkd-data", version=version),
        layout=settings.layout,
        num_images=sum(shard.rows for shard in contents.shards),
        num_crops=settings.crops,
        crops_per_block=settings.crops_per_block,
        top_k=settings.top_k,
        num_classes=facts.num_classes,
        class_names=facts.class_names,
        seed=settings.seed,
        crop_distribution=CropDistributionEntry.of(settings.distribution),
        crop_kinds=tuple(map(CropKindEntry.of, settings.kinds)) or None,
        augmentations=tuple(settings.augment) or None,
        requires=_requirements(settings),
        teachers=facts.teachers,
        ensemble=settings.ensemble,
        thresholds=ThresholdsEntry.of(contents.thresholds, settings.thresholds),
        max_pixels=settings.max_pixels,
        images_per_shard=settings.shard_images,
        source=SourceEntry(
            description=facts.source,
            images_seen=contents.images_seen,
            plan_sha256=plan.summary.sha256,
            place_sha256=facts.place_sha256,
            class_folders=facts.class_folders,
            left_out=facts.left_out,
        ),
        shards=contents.shards,
        rejects=contents.rejects,
        statistics=contents.statistics,
    )


def _requirements(settings: BuildSettings) -> tuple[str, ...] | None:
    used = {RECORDED_OPERATIONS: settings.augment, CROP_KINDS: settings.kinds}
    return tuple(name for name, value in used.items() if value) or None


def _start_over(folder: BuildFolder, plan: Plan) -> BuildError:
    """Forget a build in which every image was rejected, keep the list of rejects, and return the error to raise."""
    written = write_rejects(folder, plan, REJECTS_NAME)
    reasons = Counter(reject.reason for reject in read_rejects(folder.out / REJECTS_NAME))
    kept = folder.start_over(folder.out / REJECTS_NAME)
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return BuildError(
        f"{folder.location}: no label set was written, since every one of the {written.rows} images was rejected "
        f"({counts}); {kept} says why for each. Repair the images and run the same command again"
    )


def _final_thresholds(folder: BuildFolder, plan: Plan, settings: BuildSettings, num_classes: int) -> Thresholds:
    if isinstance(settings.thresholds, Thresholds):
        return settings.thresholds
    # float16 has 15,361 values in 0..1: counts of each give exact quantiles of any number of crops in bounded memory.
    counts = np.zeros(NUM_FLOAT16, np.int64)
    for shard in plan.shards:
        record = folder.existing_record(shard)
        if record.rows:
            with folder.files.at_hand(record):
                # A whole shard, but one at a time.
                labels = _read(folder.out, record, settings, num_classes)
            counts += confidence_counts(
                confidence(labels.class_prob, labels.target_prob, settings.thresholds.confidence)
            )
    return settings.thresholds.resolve(counts)


def _rewrite_buckets(
    folder: BuildFolder, shard: int, settings: BuildSettings, thresholds: Thresholds, num_classes: int
) -> ShardRecord:
    """Rewrite a shard's files with final buckets where they were provisional, and return its record.

    The record names the thresholds that its files were written with. The kind of confidence cannot differ: it is a
    setting of the build.
    """
    record = folder.existing_record(shard)
    final = (thresholds.low, thresholds.mid, thresholds.top)
    # Numbers that were asked for are in every record from the start: then no file is read.
    if record.thresholds == final or not record.rows:
        return record
    # Filled by `rows`, and so complete when `write_shard` has taken all of them.
    counts = np.zeros(4, np.int64)

    def rows() -> Iterator[tuple[ImageLabels, bytes]]:
        for labels, image in _rows(folder.out, record, settings, num_classes):
            bucket = buckets_of(labels.class_prob, labels.target_prob, thresholds)
            counts[:] += np.bincount(bucket, minlength=4)
            yield _with_bucket(labels, bucket), image

    def announce(files: tuple[BlockEntry, ...]) -> None:
        # A kill while files get their names must leave no shard that looks damaged.
        folder.files.announce(record.model_copy(update={"successors": files}))

    with folder.files.at_hand(record):
        _, files = write_shard(
            folder.out,
            shard,
            rows(),
            layout=settings.layout,
            block_starts=settings.block_starts,
            announce=announce,
        )
        # Probabilities are the same: of the statistics only the buckets change.
        changed = record.statistics.model_copy(update={"bucket_counts": tuple(counts.tolist())})
        final_record = record.model_copy(
            update={"files": files, "statistics": changed, "thresholds": final, "successors": ()}
        )
        folder.files.save(final_record)
    return final_record


def _with_bucket(labels: ImageLabels, bucket: object) -> ImageLabels:
    return ImageLabels(**{**labels.__dict__, "bucket": bucket})


def _rows(
    out: Path, record: ShardRecord, settings: BuildSettings, num_classes: int
) -> Iterator[tuple[ImageLabels, bytes]]:
    if settings.layout == "webdataset":
        yield from webdataset.read_rows(out / record.files[0].path)
    else:
        for labels in _read(out, record, settings, num_classes):
            yield labels, b""


def _read(out: Path, record: ShardRecord, settings: BuildSettings, num_classes: int) -> ShardLabels:
    if settings.layout == "webdataset":
        return ShardLabels.from_rows([labels for labels, _ in webdataset.read_rows(out / record.files[0].path)])
    blocks = []
    for file in record.files:
        start = file.block * settings.crops_per_block
        blocks.append(
            parquet.read_labels(
                out / file.path,
                rows=record.rows,
                num_crops=min(settings.crops_per_block, settings.crops - start),
                top_k=settings.top_k,
                num_classes=num_classes,
                operation_words=num_words(settings.augmentations),
            )
        )
    return concat_crops(blocks)


def write_rejects(folder: BuildFolder, plan: Plan, name: str) -> RejectsEntry:
    path = folder.out / name
    with write_atomically(path) as aside, RejectWriter(aside) as writer:
        # The listing's rejects, then those of the shards in their order: the same file from every run.
        writer.copy_from(plan.folder / "plan-rejects.parquet")
        for shard in plan.shards:
            writer.extend(folder.existing_record(shard).rejects)
    return rejects_entry(path, writer.rows)
