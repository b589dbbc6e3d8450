"""Label sets whose labels are made up: what the teachers said does not change the speed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ferkd_data.crops import CropDistribution, draw_crops
from ferkd_data.format.manifest import (
    CreatedBy,
    CropDistributionEntry,
    Layout,
    Manifest,
    ShardEntry,
    SourceEntry,
    TeacherEntry,
    ThresholdsEntry,
)
from ferkd_data.format.rejects import RejectWriter, rejects_entry
from ferkd_data.format.writers import write_shard
from ferkd_data.label_set import open_labels
from ferkd_data.labels.buckets import Thresholds, assign_buckets
from ferkd_data.labels.rows import ImageLabels
from ferkd_data.labels.statistics import Statistics, add, shard_statistics
from ferkd_data.storage import image_digest

NO_TEACHER = TeacherEntry(
    spec="none",
    name="none",
    digest="0" * 64,
    num_classes=1,
    size=224,
    interpolation="bilinear",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    weight=1,
    temperature=1,
    precision="fp32",
)


def write_label_set(
    out: Path,
    shards: Iterable[Iterable[tuple[ImageLabels, bytes]]],
    *,
    num_crops: int,
    top_k: int,
    num_classes: int,
    layout: Layout = "parquet",
    crops_per_block: int | None = None,
) -> None:
    """A label set with the rows of each shard, of one crop block where not said otherwise. Its statistics are empty."""
    per_block = crops_per_block or num_crops
    entries = []
    for index, rows in enumerate(shards):
        count, files = write_shard(out, index, rows, layout=layout, block_starts=range(0, num_crops, per_block))
        entries.append(ShardEntry(index=index, rows=count, files=files))
    with RejectWriter(out / "rejects.parquet") as rejects:
        pass
    path = out / "rejects.parquet"
    images = sum(entry.rows for entry in entries)
    manifest = Manifest(
        created_by=CreatedBy(name="benchmark", version="0"),
        layout=layout,
        num_images=images,
        num_crops=num_crops,
        crops_per_block=per_block,
        top_k=top_k,
        num_classes=num_classes,
        seed=0,
        crop_distribution=CropDistributionEntry(scale=(0.08, 1), ratio=(0.75, 4 / 3), hflip=0.5),
        teachers=(NO_TEACHER,),
        ensemble="mean",
        thresholds=ThresholdsEntry(low=0.15, mid=0.3, top=0.95, confidence="max"),
        source=SourceEntry(description="photos", images_seen=images, plan_sha256="0" * 64),
        shards=tuple(entries),
        rejects=rejects_entry(path, rejects.rows),
        statistics=Statistics(),
    )
    (out / "manifest.json").write_text(manifest.to_json())


def count_statistics(folder: Path) -> None:
    """Write into the manifest what the rows of the label set in `folder` say."""
    labels = open_labels(folder)
    counted = add(map(shard_statistics, labels.shards()))
    (folder / "manifest.json").write_text(labels.manifest.model_copy(update={"statistics": counted}).to_json())


def random_labels(
    key: str, generator: np.random.Generator, *, num_crops: int, top_k: int, num_classes: int, image: bytes
) -> ImageLabels:
    """Rows that `verify` finds nothing wrong with, for an image of 500x375 pixels."""
    prob = -np.sort(-generator.dirichlet([0.2] * (4 * top_k), num_crops)[:, :top_k], axis=1).astype(np.float16)
    index = generator.integers(0, num_classes // top_k, (num_crops, top_k)) * top_k + np.arange(top_k)
    order = np.lexsort((index, -prob.astype(np.float32)), axis=1)
    index = np.take_along_axis(index, order, axis=1)
    target = int(generator.integers(num_classes))
    hit = index == target
    said = np.where(hit.any(axis=1), np.where(hit, prob, 0).max(axis=1), prob[:, -1] / 2)
    crops = draw_crops(key, 375, 500, seed=0, count=num_crops, distribution=CropDistribution())
    return ImageLabels(
        key=key,
        image_digest=image_digest(image),
        height=375,
        width=500,
        target=target,
        boxes=crops.boxes,
        flip=crops.flip,
        class_index=index.astype(np.uint16),
        class_prob=prob,
        target_prob=said.astype(np.float16),
        bucket=assign_buckets(prob[:, 0], Thresholds()),
    )
