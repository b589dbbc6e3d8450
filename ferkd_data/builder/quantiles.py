"""Quantile thresholds: find them when every shard is labelled, and assign the buckets anew.

While shards are labelled, their buckets are provisional, since a quantile needs the confidence of all crops.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ferkd_data.augment.distribution import num_words
from ferkd_data.builder.plan import Plan
from ferkd_data.builder.settings import BuildSettings
from ferkd_data.builder.shard_files import ShardRecord
from ferkd_data.builder.state import BuildFolder
from ferkd_data.format import parquet, webdataset
from ferkd_data.format.manifest import BlockEntry
from ferkd_data.format.writers import write_shard
from ferkd_data.labels.buckets import NUM_FLOAT16, Thresholds, buckets_of, confidence_counts, confidences_of
from ferkd_data.labels.rows import ImageLabels, ShardLabels, concat_crops


def final_thresholds(folder: BuildFolder, plan: Plan, settings: BuildSettings, num_classes: int) -> Thresholds:
    """Return the thresholds as numbers; for quantiles, read the labels of every shard, one shard at a time."""
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
                confidences_of(labels.class_prob, labels.target_prob, settings.thresholds.confidence)
            )
    return settings.thresholds.resolve(counts)


def rewrite_buckets(
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
    # Filled by `rebucketed`, and so complete when `write_shard` has taken all of them.
    counts = np.zeros(4, np.int64)

    def rebucketed() -> Iterator[tuple[ImageLabels, bytes]]:
        for labels, image in _stored_rows(folder.out, record, settings, num_classes):
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
            rebucketed(),
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


def _stored_rows(
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
