"""`ferkd-data convert`"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from ferkd_data.errors import UsageError
from ferkd_data.format.manifest import FILE_NAME

from .display import show_images
from .terminal import say


@click.command()
@click.argument("labels", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layout", type=click.Choice(["parquet", "webdataset"]), help="Write the label set in this layout.")
@click.option(
    "--crops-per-block", type=click.IntRange(min=1), help="Of layout parquet.  [default: as it is; import: 50]"
)
@click.option(
    "--from",
    "source",
    type=click.Choice(["fkd", "dr", "relabel"]),
    help="LABELS is a folder of FKD's, Dataset Reinforcement's or ReLabel's files, one per image.",
)
@click.option("--to", "target", type=click.Choice(["fkd"]), help="Write FKD's files, for its own training script.")
@click.option(
    "--calibration",
    type=click.Choice(["fkd", "ferkd"]),
    help="With --to fkd: write calibrated targets, as FerKD trains on.  [default: the labels as they are]",
)
@click.option(
    "--min-crops",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="With --calibration: crops that a file holds at least, the --num_crops of FKD's script.",
)
@click.option("--images", help="The images: needed for layout webdataset and for --from.")
@click.option("--classes", type=click.Path(path_type=Path), help="With --from: one line per class, as for build.")
@click.option(
    "--ids", type=click.Path(path_type=Path), help="With --from dr: the images' keys in the order of their IDs."
)
@click.option(
    "--num-classes", type=click.IntRange(min=2), help="With --from.  [default: fkd, relabel 1000; dr: as its files say]"
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="With --from fkd: classes kept of full labels. With --from relabel: classes kept.",
)
@click.option(
    "--crops",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="With --from relabel: crops of each image.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="With --from relabel: decides the crops."
)
@click.option("--teacher", help="With --from: the teacher's name.  [default: dr as it says]")
@click.option("--teacher-size", type=int, default=224, show_default=True, help="With --from fkd: its input size.")
def command(
    labels: Path,
    out: Path,
    layout: Literal["parquet", "webdataset"] | None,
    crops_per_block: int | None,
    source: str | None,
    target: str | None,
    calibration: str | None,
    min_crops: int,
    images: str | None,
    classes: Path | None,
    ids: Path | None,
    num_classes: int | None,
    top_k: int,
    crops: int,
    seed: int,
    teacher: str | None,
    teacher_size: int,
) -> int:
    """Write the label set LABELS anew into the folder OUT: in another layout, from others' files, or as FKD's."""
    import ferkd_data as fd
    from ferkd_data.calibration import calibration_at

    if [layout, source, target].count(None) != 2:
        raise UsageError("give one of --layout LAYOUT, --from fkd, --from dr, --from relabel, --to fkd")
    if calibration is not None and target is None:
        raise UsageError("--calibration is for --to fkd; a loader calibrates what it reads: CropLoader(calibration=…)")
    if source is not None and images is None:
        raise UsageError(f"--from {source} needs --images (the labelled images)")
    if source == "fkd" and teacher is None:
        raise UsageError("--from fkd needs --teacher (its name)")
    if target is not None:
        with show_images("convert") as show:
            chosen = None if calibration is None else calibration_at(calibration, 0)
            label_type = fd.export_fkd(labels, out, calibration=chosen, min_crops=min_crops, on_progress=show)
        say(f"{out}: written for FKD's training script; its --soft_label_type is {label_type}")
        return 0
    finished = (out / FILE_NAME).exists()
    with show_images("convert") as show:
        if source == "fkd":
            manifest = fd.import_fkd(
                labels,
                out,
                images=str(images),
                num_classes=num_classes or 1000,
                teacher=fd.FkdTeacher(name=str(teacher), size=teacher_size),
                top_k=top_k,
                crops_per_block=crops_per_block or 50,
                classes=classes,
                on_progress=lambda done: show(done, None),
            )
        elif source == "dr":
            manifest = fd.import_dr(
                labels,
                out,
                images=str(images),
                ids=ids,
                num_classes=num_classes,
                teacher=teacher,
                crops_per_block=crops_per_block or 50,
                classes=classes,
                on_progress=lambda done: show(done, None),
            )
        elif source == "relabel":
            manifest = fd.import_relabel(
                labels,
                out,
                images=str(images),
                crops=crops,
                seed=seed,
                num_classes=num_classes or 1000,
                top_k=top_k,
                crops_per_block=crops_per_block or 50,
                classes=classes,
                on_progress=lambda done: show(done, None),
            )
        elif layout is not None:
            manifest = fd.convert(
                labels, out, layout=layout, images=images, crops_per_block=crops_per_block, on_progress=show
            )
    size = sum(file.bytes for shard in manifest.shards for file in shard.files)
    if finished:
        say(f"{out}: was finished already; nothing was written")
    say(
        f"{out}: layout {manifest.layout}, {manifest.num_images:,} images with {manifest.num_crops} crops, "
        f"{size / 1e6:,.2f} MB, {manifest.rejects.rows:,} rejected"
    )
    counted = manifest.statistics
    if source is not None and counted.crops_with_target:
        share = counted.top1_matches_target / counted.crops_with_target
        say(f"the ground truth is the most probable class of {share:.1%} of the crops")
    return 3 if source is not None and manifest.rejects.rows else 0
