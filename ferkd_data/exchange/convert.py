"""`convert`: write a label set in another layout, or with other crop blocks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from ferkd_data import rng
from ferkd_data.crop_kinds import block_of_kinds, fits_blocks
from ferkd_data.errors import LabelSetError, UsageError, check_at_least
from ferkd_data.exchange.checks import check_as_verify_does
from ferkd_data.format import out_folder, webdataset
from ferkd_data.format.manifest import BlockEntry, Layout, Manifest, ShardEntry, check_limits
from ferkd_data.format.progress import OnProgress, TransferProgress, with_files
from ferkd_data.format.rejects import check_rejects
from ferkd_data.format.writers import Row, write_shard
from ferkd_data.images import open_source
from ferkd_data.label_set import LabelSet, open_labels
from ferkd_data.label_set.joined_images import ImageTable, join_images
from ferkd_data.storage import image_digest


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

    Layout webdataset needs `images`, joined by key, each with the digest that was labelled; a label set that is of this
    layout already has them. One shard is in memory at a time; the manifest is written last. An interrupted conversion
    is begun again; one that has ended is left as it is.

    Raises UsageError where `out` holds anything else, for blocks that would hold crops of two kinds, and for an
    argument that would have no effect; LabelSetError for an image that is missing or another.

    >>> fd.convert(LABELS, "out", layout="parquet", crops_per_block=5).num_blocks
    1
    >>> fd.convert("out", "tars", layout="webdataset", images="imagenet/train")  # doctest: +SKIP
    """
    check_at_least(1, crops_per_block=crops_per_block)
    check_limits(crops_per_block=crops_per_block)
    if layout not in get_args(Layout):
        raise UsageError(f"layout must be one of {', '.join(get_args(Layout))}, got {layout!r}")
    source = open_labels(labels)
    _check_effect(source.manifest.layout, layout, images, crops_per_block)
    block = _block_size(source, layout, crops_per_block)
    there = out_folder.finished(out)
    # The same command again after it has ended, so that a batch system may start a job twice.
    if there is not None and _is_of(there, source.manifest, layout, block):
        out_folder.clean(out)
        return there
    table = None
    if layout == "webdataset" and source.manifest.layout != "webdataset":
        if images is None:
            raise UsageError("layout webdataset contains the images: give them with images= (--images SOURCE)")
        table = join_images(source, open_source(images), missing="raise")[1]
    try:
        settings: out_folder.Settings = {"command": "convert", "labels": source.identity}
        out = out_folder.begin(out, settings | {"layout": layout, "crops_per_block": block})
        entries = tuple(_write_shards(source, out, layout, block, table, on_progress))
    finally:
        if table is not None:
            # Now and not with the last reference: an error that somebody keeps would keep the table too.
            shutil.rmtree(table.folder)
    rejects = source.manifest.rejects
    with source.open(rejects) as opened:
        # A stranger's file: copied only where its rows can be read.
        check_rejects(opened.path, rejects.rows)
        shutil.copyfile(opened.path, out / rejects.path)
    # Everything else stays, statistics too: they are counted over the same rows.
    changes = {"layout": layout, "crops_per_block": block, "shards": entries}
    return out_folder.finish(out, source.manifest.model_copy(update=changes))


def _check_effect(now: Layout, wanted: Layout, images: str | Path | None, crops_per_block: int | None) -> None:
    """Raise UsageError for an argument that this conversion would not use."""
    if wanted == "webdataset" and crops_per_block is not None:
        raise UsageError(
            "crops_per_block (--crops-per-block) is for layout parquet: a tar of layout webdataset holds all crops of "
            "its images; leave it out"
        )
    if images is not None and wanted == "parquet":
        raise UsageError("layout parquet holds labels only, so images (--images) would not be read; leave them out")
    if images is not None and now == "webdataset":
        raise UsageError(
            "the label set is of layout webdataset already: its own images are copied, and images (--images) would not "
            "be read; leave them out"
        )


def _block_size(source: LabelSet, layout: Layout, asked: int | None) -> int:
    """Return the crops of a block. Raises UsageError where blocks of the size asked for would hold two crop kinds."""
    block, kinds = asked or source.manifest.crops_per_block, source.crop_kinds
    if layout == "webdataset" or fits_blocks(kinds, block):
        return block
    fitting = block_of_kinds(kinds, block)
    if asked is None:
        return fitting
    raise UsageError(
        f"{source.location}: crop blocks of {asked} would hold crops of two kinds "
        f"({', '.join(f'{kind.name}:n={kind.crops}' for kind in kinds)}); blocks of {fitting} "
        "do not"
    )


def _is_of(there: Manifest, source: Manifest, layout: Layout, block: int) -> bool:
    """Return whether a finished label set is this conversion: the same in all but its files."""
    rows = [shard.rows for shard in there.shards] == [shard.rows for shard in source.shards]
    changes = {"layout": layout, "crops_per_block": block, "shards": there.shards}
    return rows and source.model_copy(update=changes) == there


def _write_shards(
    source: LabelSet, out: Path, layout: Layout, block: int, table: ImageTable | None, on_progress: OnProgress | None
) -> Iterator[ShardEntry]:
    """Write the shards in order, and yield what the manifest says of each."""
    starts = range(0, source.num_crops, block)
    files_of_shard = len(starts) if layout == "parquet" else 1
    num_files = files_of_shard * sum(shard.rows > 0 for shard in source.manifest.shards)
    progress = TransferProgress(files_total=num_files, images=0, images_total=len(source))
    report = on_progress or (lambda progress: None)
    report(progress)
    done = 0
    for shard in source.manifest.shards:
        rows = 0
        files: tuple[BlockEntry, ...] = ()
        if shard.rows:
            contents = _rows(source, shard, layout, table)
            rows, files = write_shard(out, shard.index, contents, layout=layout, block_starts=starts)
        done += rows
        progress = with_files(progress, files, done)
        report(progress)
        yield ShardEntry(index=shard.index, rows=rows, files=files)


def _rows(source: LabelSet, shard: ShardEntry, layout: Layout, table: ImageTable | None) -> Iterator[Row]:
    """Yield the rows of a shard, with their images where `layout` needs them. Raises LabelSetError for a fault."""
    labels = source.shard(shard.index)
    check_as_verify_does(labels, source.manifest, f"{source.location}: shard {shard.index}")
    if layout == "parquet":
        yield from ((row, b"") for row in labels)
    # From tars to tars: the images lie beside their labels, in the same order.
    elif table is None:
        with source.open(shard.files[0]) as opened:
            for row, (_, image) in zip(labels, webdataset.read_rows(opened.path), strict=True):
                yield row, image
    else:
        for row in labels:
            # Keys join, digests decide: an image of the same key may be another version.
            image = table.read_key(rng.hash64(row.key))
            if image_digest(image) != row.image_digest:
                raise LabelSetError(f"image {row.key!r} is not the one that was labelled (its digest differs)")
            yield row, image
