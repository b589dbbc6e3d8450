"""`convert`: between layouts, and to FKD's files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

from ferkd_data import rng
from ferkd_data.builder.out.state import REJECTS_NAME
from ferkd_data.errors import LabelSetError, UsageError
from ferkd_data.exchange import fkd
from ferkd_data.exchange.arguments import check_at_least
from ferkd_data.exchange.file_checks import check_as_verify_does
from ferkd_data.images import open_source
from ferkd_data.label_set import LabelSet, open_labels
from ferkd_data.loader.image_table import ImageTable, join_images
from ferkd_data.manifest import (
    FILE_NAME,
    BlockEntry,
    Layout,
    Manifest,
    ShardEntry,
    parse_manifest,
)
from ferkd_data.shards import webdataset
from ferkd_data.shards.writers import Row, write_shard
from ferkd_data.storage import image_digest, write_atomically

OnProgress = Callable[[int, int | None], None]
"""Gets (images done, images in all where that is known)."""


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
    check_at_least(1, crops_per_block=crops_per_block)
    if layout not in get_args(Layout):
        raise UsageError(f"layout must be one of {', '.join(get_args(Layout))}, got {layout!r}")
    source = open_labels(labels)
    out = new_folder(out)
    block = crops_per_block or source.manifest.crops_per_block
    table = None
    if layout == "webdataset" and source.manifest.layout != "webdataset":
        if images is None:
            raise UsageError("layout webdataset holds the images too: say where they are with images=… (--images)")
        table = join_images(source, open_source(images), missing="raise")[1]
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
                    _rows(source, shard, layout, table),
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
    with source.open(rejects) as opened:
        shutil.copyfile(opened.path, out / rejects.path)
    changes = {"layout": layout, "crops_per_block": block, "shards": tuple(entries)}
    return write_manifest(out, source.manifest.model_copy(update=changes))


def _rows(source: LabelSet, shard: ShardEntry, layout: Layout, table: ImageTable | None) -> Iterator[Row]:
    """The rows of a shard, with their images where `layout` needs them. Raises LabelSetError for a fault."""
    labels = source.shard(shard.index)
    check_as_verify_does(labels, source.manifest, f"{source.location}: shard {shard.index}")
    if layout == "parquet":
        yield from ((row, b"") for row in labels)
    elif table is None:
        with source.open(shard.files[0]) as opened:
            for row, (_, image) in zip(labels, webdataset.read_rows(opened.path), strict=True):
                yield row, image
    else:
        for row in labels:
            image = table.read_key(rng.hash64(row.key))
            if image_digest(image) != row.image_digest:
                raise LabelSetError(f"image {row.key!r} is not the one that was labelled (its digest differs)")
            yield row, image


def export_fkd(labels: str | Path, out: str | Path, *, on_progress: OnProgress | None = None) -> str:
    """Write FKD's files, OUT/KEY.tar, for its own training script; returns the label type to give it.

    Raises UsageError where `out` is not empty, and for crops with recorded augmentations.
    """
    source = open_labels(labels)
    if source.manifest.augmentations:
        raise UsageError(
            f"{source.location}: its crops have recorded augmentations ({', '.join(source.manifest.augmentations)}); "
            "FKD's files have no place for them: its script would show the student other pixels than the teachers saw"
        )
    out = new_folder(out)
    for done, row in enumerate(source, start=1):
        fkd.write_file(fkd.file_of(out, row.key), row)
        if on_progress and (done % 1000 == 0 or done == len(source)):
            on_progress(done, len(source))
    return f"marginal_smoothing_k{source.top_k}" if source.top_k in (5, 10) else "marginal_renorm"


def new_folder(out: str | Path) -> Path:
    """Raises UsageError for a folder that holds something, but for what an interrupted conversion left."""
    out = Path(out)
    if (out / FILE_NAME).exists() or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out}: is there already; convert into a new folder")
    left = {path.name for path in out.iterdir()} - {"labels", "shards", REJECTS_NAME} if out.exists() else set()
    if left:
        raise UsageError(f"{out}: holds {sorted(left)[0]!r}; convert into a new folder")
    out.mkdir(parents=True, exist_ok=True)
    return out


def write_manifest(out: Path, manifest: Manifest) -> Manifest:
    """Write what makes the folder a label set. Raises ManifestError for a manifest that no reader would accept."""
    text = manifest.to_json()
    parse_manifest(text, str(out / FILE_NAME))
    with write_atomically(out / FILE_NAME) as aside:
        aside.write_text(text, encoding="utf-8")
    return manifest
