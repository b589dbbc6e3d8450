"""`convert`: between layouts, and from and to FKD's files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import ferkd_data
from ferkd_data import statistics
from ferkd_data.buckets import Thresholds
from ferkd_data.builder.rejects import RejectWriter
from ferkd_data.errors import ForeignFileError, ImageError, LabelSetError, UsageError
from ferkd_data.exchange import fkd
from ferkd_data.images import ImageRef, Reject, image_size, open_source
from ferkd_data.label_set import LabelSet, open_labels
from ferkd_data.loader.image_table import ImageTable, join_images
from ferkd_data.manifest import (
    FILE_NAME,
    BlockEntry,
    CreatedBy,
    CropDistributionEntry,
    Layout,
    Manifest,
    RejectsEntry,
    ShardEntry,
    SourceEntry,
    TeacherEntry,
    ThresholdsEntry,
)
from ferkd_data.shards import webdataset
from ferkd_data.shards.columns import UNKNOWN_TARGET, ImageLabels, ShardLabels
from ferkd_data.shards.writers import Row, write_shard
from ferkd_data.statistics import shard_statistics
from ferkd_data.storage import image_digest, sha256_file, write_atomically

OnProgress = Callable[[int, int | None], None]
"""Gets (images done, images in all where that is known)."""
FKD_DISTRIBUTION = CropDistributionEntry(scale=(0.08, 0.936), ratio=(3 / 4, 4 / 3), hflip=0.5)
"""The defaults of FKD's generator; its files do not say."""


def convert(
    labels: str | Path,
    out: str | Path,
    *,
    layout: Layout,
    images: str | Path | None = None,
    crops_per_block: int | None = None,
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Write a label set anew in another layout (or with other crop blocks): the same rows in the same shards.

    Layout webdataset needs `images`, joined by key, each with the digest that was labelled. One shard is in memory at a
    time; the manifest is written last. Raises UsageError, LabelSetError for an image that is missing or another.
    """
    source = open_labels(labels)
    out = _new_folder(out)
    block = crops_per_block or source.manifest.crops_per_block
    if block < 1:
        raise UsageError(f"crops_per_block must be at least 1, got {block}")
    table = None
    if layout == "webdataset" and source.manifest.layout != "webdataset":
        if images is None:
            raise UsageError("layout webdataset holds the images too: say where they are with images=… (--images)")
        table = join_images(source, open_source(images), allow_missing=False)
    try:
        entries: list[ShardEntry] = []
        done = 0
        for shard in source.manifest.shards:
            rows = 0
            files: tuple[BlockEntry, ...] = ()
            if shard.rows:
                rows, files = write_shard(
                    out,
                    shard.index,
                    _rows(source, shard, table),
                    layout=layout,
                    block_starts=range(0, source.num_crops, block),
                )
            entries.append(ShardEntry(index=shard.index, rows=rows, files=files))
            done += rows
            if on_progress:
                on_progress(done, len(source))
    finally:
        if table is not None:
            shutil.rmtree(table.folder)
    rejects = source.manifest.rejects
    shutil.copyfile(source.file(rejects), out / rejects.path)
    changes = {"layout": layout, "crops_per_block": block, "shards": tuple(entries)}
    return _write_manifest(out, source.manifest.model_copy(update=changes))


def _rows(source: LabelSet, shard: ShardEntry, table: ImageTable | None) -> Iterator[Row]:
    if source.manifest.layout == "webdataset":
        yield from webdataset.read_rows(source.file(shard.files[0]))
        return
    first = int(source.first_row[shard.index])
    for row, labels in enumerate(source.shard(shard.index)):
        data = b"" if table is None else table.read(first + row)
        if table is not None and image_digest(data) != labels.image_digest:
            raise LabelSetError(f"image {labels.key!r} is not the one that was labelled (its digest differs)")
        yield labels, data


@dataclass(frozen=True, kw_only=True)
class FkdTeacher:
    """What FKD's files do not say of the teacher."""

    name: str
    size: int = 224
    """Pixels."""


def import_fkd(
    folder: str | Path,
    out: str | Path,
    *,
    images: str | Path,
    num_classes: int,
    teacher: FkdTeacher,
    top_k: int = 5,
    crops_per_block: int = 50,
    images_per_shard: int = 4096,
    classes: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> Manifest:
    """A label set of layout parquet from FKD's files: FOLDER/KEY.tar for each image of `images`, such as
    FOLDER/n01440764/n01440764_10026.tar.

    `top_k` applies to full distributions; FKD's other label types keep the k they have. An image without labels or with
    labels that cannot be read becomes a reject. Raises SourceError, UsageError when nothing can be imported.
    """
    folder, out = Path(folder), _new_folder(out)
    source = open_source(images, classes=None if classes is None else Path(classes))
    reader = _FkdReader(folder, num_classes, top_k)
    entries: list[ShardEntry] = []
    counted = []
    items = source.list_images()
    while group := list(islice(items, images_per_shard)):
        rows = list(reader.rows(source, group))
        if rows:
            starts = range(0, reader.num_crops, crops_per_block)
            count, files = write_shard(
                out, len(entries), ((row, b"") for row in rows), layout="parquet", block_starts=starts
            )
            entries.append(ShardEntry(index=len(entries), rows=count, files=files))
            counted.append(shard_statistics(ShardLabels.from_rows(rows)))
        if on_progress:
            on_progress(sum(entry.rows for entry in entries), None)
    if not entries:
        why = f"; the first: {reader.rejects[0].key}: {reader.rejects[0].detail}" if reader.rejects else ""
        raise UsageError(f"{folder}: no image of {source.description} has labels here; FOLDER/KEY.tar is expected{why}")
    num_images = sum(entry.rows for entry in entries)
    rejects = _write_rejects(out, reader.rejects)
    manifest = Manifest(
        created_by=CreatedBy(name="ferkd-data", version=ferkd_data.__version__),
        layout="parquet",
        num_images=num_images,
        num_crops=reader.num_crops,
        crops_per_block=crops_per_block,
        top_k=reader.top_k,
        num_classes=num_classes,
        seed=0,
        crop_distribution=FKD_DISTRIBUTION,
        teachers=(_teacher_entry(teacher, num_classes),),
        ensemble="mean",
        thresholds=ThresholdsEntry(**_fields(reader.thresholds)),
        source=SourceEntry(
            description=f"imported from FKD's files, images: {source.description}",
            images_seen=num_images + rejects.rows,
            plan_sha256="0" * 64,
        ),
        shards=tuple(entries),
        rejects=rejects,
        statistics=statistics.add(counted),
    )
    origin = {"format": "FKD", "crops_follow_seed": False}
    return _write_manifest(out, manifest.model_copy(update={"imported_from": origin}))


class _FkdReader:
    def __init__(self, folder: Path, num_classes: int, top_k: int) -> None:
        self.folder = folder
        self.num_classes = num_classes
        self.full_top_k = top_k
        self.thresholds = Thresholds()
        self.num_crops = 0
        self.top_k = 0
        self.rejects: list[Reject] = []

    def rows(self, source: Any, items: Iterable[ImageRef | Reject]) -> Iterator[ImageLabels]:
        refs = []
        for item in items:
            if isinstance(item, ImageRef):
                refs.append(item)
            else:
                self.rejects.append(item)
        for ref, data in zip(refs, source.read(refs), strict=True):
            try:
                if isinstance(data, ImageError):
                    raise data
                yield self._row(ref, data)
            except ImageError as error:
                self.rejects.append(Reject(key=ref.key, reason=error.reason, detail=error.detail))
            except (ForeignFileError, ValueError) as error:
                self.rejects.append(Reject(key=ref.key, reason="unreadable_labels", detail=str(error)))

    def _row(self, ref: ImageRef, data: bytes) -> ImageLabels:
        image = fkd.read_file(fkd.file_of(self.folder, ref.key), num_classes=self.num_classes, top_k=self.full_top_k)
        shape = image.class_index.shape
        if not self.num_crops:
            self.num_crops, self.top_k = shape
        if shape != (self.num_crops, self.top_k):
            raise ForeignFileError(f"{shape} crops and classes, the first image has {(self.num_crops, self.top_k)}")
        return fkd.to_labels(
            image,
            key=ref.key,
            digest=image_digest(data),
            size=image_size(data),
            target=UNKNOWN_TARGET if ref.target is None else ref.target,
            num_classes=self.num_classes,
            thresholds=self.thresholds,
        )


def export_fkd(labels: str | Path, out: str | Path, *, on_progress: OnProgress | None = None) -> str:
    """Write FKD's files, OUT/KEY.tar, for its own training script; returns the label type to give it.

    Raises UsageError where `out` is not empty.
    """
    source = open_labels(labels)
    out = _new_folder(out)
    for done, row in enumerate(source, start=1):
        fkd.write_file(fkd.file_of(out, row.key), row)
        if on_progress and done % 1000 == 0:
            on_progress(done, len(source))
    return f"marginal_smoothing_k{source.top_k}" if source.top_k in (5, 10) else "marginal_renorm"


def _new_folder(out: str | Path) -> Path:
    """Raises UsageError for a folder that holds something, but for what an interrupted conversion left."""
    out = Path(out)
    if (out / FILE_NAME).exists() or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out}: is there already; convert into a new folder")
    left = {path.name for path in out.iterdir()} - {"labels", "shards", "rejects.parquet"} if out.exists() else set()
    if left:
        raise UsageError(f"{out}: holds {sorted(left)[0]!r}; convert into a new folder")
    out.mkdir(parents=True, exist_ok=True)
    return out


def _write_manifest(out: Path, manifest: Manifest) -> Manifest:
    with write_atomically(out / FILE_NAME) as aside:
        aside.write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _write_rejects(out: Path, rejects: list[Reject]) -> RejectsEntry:
    path = out / "rejects.parquet"
    with write_atomically(path) as aside, RejectWriter(aside) as writer:
        writer.extend(rejects)
    return RejectsEntry(path=path.name, rows=writer.rows, bytes=path.stat().st_size, sha256=sha256_file(path))


def _teacher_entry(teacher: FkdTeacher, num_classes: int) -> TeacherEntry:
    return TeacherEntry(
        spec=f"fkd:{teacher.name}",
        name=teacher.name,
        digest="0" * 64,
        num_classes=num_classes,
        size=teacher.size,
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        weight=1,
        temperature=1,
        precision="fp32",
    )


def _fields(thresholds: Thresholds) -> dict[str, Any]:
    return {name: getattr(thresholds, name) for name in ("low", "mid", "top", "confidence")}
