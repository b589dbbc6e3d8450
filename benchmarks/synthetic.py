"""Label sets whose labels are made up: what the teachers said does not change the speed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ferkd_data.builder.rejects import RejectWriter
from ferkd_data.manifest import (
    CreatedBy,
    CropDistributionEntry,
    Manifest,
    RejectsEntry,
    ShardEntry,
    SourceEntry,
    TeacherEntry,
    ThresholdsEntry,
)
from ferkd_data.shards.columns import ImageLabels
from ferkd_data.shards.writers import write_shard
from ferkd_data.statistics import Statistics
from ferkd_data.storage import sha256_file

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
) -> None:
    """A label set of layout parquet, one crop block, with the rows of each shard."""
    entries = []
    for index, rows in enumerate(shards):
        count, files = write_shard(out, index, rows, layout="parquet", block_starts=[0])
        entries.append(ShardEntry(index=index, rows=count, files=files))
    with RejectWriter(out / "rejects.parquet") as rejects:
        pass
    path = out / "rejects.parquet"
    images = sum(entry.rows for entry in entries)
    manifest = Manifest(
        created_by=CreatedBy(name="benchmark", version="0"),
        layout="parquet",
        num_images=images,
        num_crops=num_crops,
        crops_per_block=num_crops,
        top_k=top_k,
        num_classes=num_classes,
        seed=0,
        crop_distribution=CropDistributionEntry(scale=(0.08, 1), ratio=(0.75, 4 / 3), hflip=0.5),
        teachers=(NO_TEACHER,),
        ensemble="mean",
        thresholds=ThresholdsEntry(low=0.15, mid=0.3, top=0.95, confidence="max"),
        source=SourceEntry(description="photos", images_seen=images, plan_sha256="0" * 64),
        shards=tuple(entries),
        rejects=RejectsEntry(path=path.name, rows=rejects.rows, bytes=path.stat().st_size, sha256=sha256_file(path)),
        statistics=Statistics(),
    )
    (out / "manifest.json").write_text(manifest.to_json())
