"""The end of a build: final thresholds, rejects, and last of all the manifest."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ferkd_data.builder.plan import Plan
from ferkd_data.builder.quantiles import final_thresholds, rewrite_buckets
from ferkd_data.builder.settings import BuildSettings
from ferkd_data.builder.state import BuildFolder, Facts
from ferkd_data.errors import BuildError
from ferkd_data.format.manifest import (
    CROP_KINDS,
    RECORDED_OPERATIONS,
    CreatedBy,
    CropDistributionEntry,
    CropKindEntry,
    Manifest,
    RejectsEntry,
    ShardEntry,
    SourceEntry,
    ThresholdsEntry,
)
from ferkd_data.format.manifest_file import write_manifest
from ferkd_data.format.rejects import REJECTS_NAME, RejectWriter, read_rejects, rejects_entry
from ferkd_data.labels import statistics
from ferkd_data.labels.buckets import Thresholds
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
    thresholds = final_thresholds(folder, plan, settings, facts.num_classes)
    # Each shard's record says with which thresholds it was written, so a run after a kill rewrites only the others.
    records = [rewrite_buckets(folder, shard, settings, thresholds, facts.num_classes) for shard in plan.shards]
    manifest = manifest_of(
        settings,
        facts,
        plan,
        SealedContents(
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
class SealedContents:
    """The contents of a label set, as its manifest counts them."""

    shards: tuple[ShardEntry, ...]
    rejects: RejectsEntry
    images_seen: int
    """Images of the source that were labelled or rejected."""
    statistics: Statistics
    thresholds: Thresholds
    """Thresholds of the stored buckets: numbers also where quantiles were asked for."""


def manifest_of(settings: BuildSettings, facts: Facts, plan: Plan, contents: SealedContents, version: str) -> Manifest:
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
            classes_sha256=facts.classes_sha256,
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


def write_rejects(folder: BuildFolder, plan: Plan, name: str) -> RejectsEntry:
    path = folder.out / name
    with write_atomically(path) as aside, RejectWriter(aside) as writer:
        # The listing's rejects, then those of the shards in their order: the same file from every run.
        writer.copy_from(plan.folder / "plan-rejects.parquet")
        for shard in plan.shards:
            writer.extend(folder.existing_record(shard).rejects)
    return rejects_entry(path, writer.rows)
