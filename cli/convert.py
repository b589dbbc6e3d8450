"""`ferkd-data convert`"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

import ferkd_data as fd
from ferkd_data.calibration import PRESETS
from ferkd_data.errors import UsageError
from ferkd_data.format.manifest import Manifest
from ferkd_data.format.manifest_file import FILE_NAME
from ferkd_data.words import count, percent

from .display import show_transfer
from .options import DONE_WITH_REJECTS, default_of, given
from .terminal import say, size

IMAGENET_CLASSES = 1000
FOR_EVERY_IMPORT = ("images", "classes", "crops_per_block")
IMPORTS: dict[str, tuple[Callable[..., Manifest], tuple[str, ...]]] = {
    "fkd": (fd.import_fkd, ("num_classes", "top_k", "teacher", "teacher_size")),
    "dr": (fd.import_dr, ("num_classes", "ids", "teacher")),
    "relabel": (fd.import_relabel, ("num_classes", "top_k", "crops", "seed")),
}
"""The function for each value of --from, and the options that it takes besides those of every import."""
TAKEN = {
    "--layout": ("images", "crops_per_block"),
    "--to fkd": ("calibration", "min_crops"),
    **{f"--from {source}": (*FOR_EVERY_IMPORT, *names) for source, (_, names) in IMPORTS.items()},
}
"""The further options that each way to convert takes."""


@click.command()
@click.argument("labels")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layout", type=click.Choice(["parquet", "webdataset"]), help="Write the label set in this layout.")
@click.option(
    "--crops-per-block",
    type=click.IntRange(min=1),
    metavar="N",
    help="Crops per block file.  [default: unchanged; 50 with --from]",
)
@click.option(
    "--from",
    "source",
    type=click.Choice(["fkd", "dr", "relabel"]),
    help="Import: LABELS is a folder of FKD's, Dataset Reinforcement's or ReLabel's files, one per image.",
)
@click.option("--to", "target", type=click.Choice(["fkd"]), help="Export FKD's files, for its own training script.")
@click.option(
    "--calibration",
    type=click.Choice(list(PRESETS)),
    help="With --to fkd: write calibrated targets, as FerKD trains on.  [default: the stored labels]",
)
@click.option(
    "--min-crops",
    type=click.IntRange(min=1),
    metavar="N",
    default=default_of(fd.export_fkd, "min_crops"),
    show_default=True,
    help="With --calibration: least number of crops per file; the --num_crops of FKD's script.",
)
@click.option(
    "--images", metavar="SOURCE", help="The labelled images. Required for --layout webdataset and for --from."
)
@click.option(
    "--classes", type=click.Path(path_type=Path), metavar="FILE", help="With --from: class list, as for build."
)
@click.option(
    "--ids",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --from dr: text file with the images' keys, in the order of their IDs.",
)
@click.option(
    "--num-classes",
    type=click.IntRange(min=2),
    metavar="N",
    help="With --from: number of classes.  [default: 1000; with dr, from its files]",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    metavar="N",
    default=default_of(fd.import_fkd, "top_k"),
    show_default=True,
    help="With --from fkd (full distributions) and relabel: number of classes kept per crop.",
)
@click.option(
    "--crops",
    type=click.IntRange(min=1),
    metavar="N",
    default=default_of(fd.import_relabel, "crops"),
    show_default=True,
    help="With --from relabel: crops per image.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    metavar="N",
    default=default_of(fd.import_relabel, "seed"),
    show_default=True,
    help="With --from relabel: seed of the crops.",
)
@click.option(
    "--teacher",
    metavar="NAME",
    help="With --from fkd (required) and dr: name of the teacher.  [default: with dr, from its files]",
)
@click.option(
    "--teacher-size",
    type=int,
    metavar="N",
    default=default_of(fd.FkdTeacher, "size"),
    show_default=True,
    help="With --from fkd: input size of the teacher in pixels.",
)
def command(
    labels: str,
    out: Path,
    layout: Literal["parquet", "webdataset"] | None,
    source: str | None,
    target: str | None,
    **options: Any,
) -> int:
    """Convert LABELS and write the result to the folder OUT.

    Give one of --layout (write a label set in another layout), --from (import another project's files) and --to
    (export for FKD's training script).
    """
    if [layout, source, target].count(None) != 2:
        raise UsageError("give one of --layout LAYOUT, --from fkd, --from dr, --from relabel and --to fkd")
    way = "--layout" if layout else f"--from {source}" if source else f"--to {target}"
    _refuse_others(way, given(options))
    if source is not None and options["images"] is None:
        raise UsageError(f"--from {source} needs --images SOURCE, the labelled images")
    if source == "fkd" and options["teacher"] is None:
        raise UsageError("--from fkd needs --teacher NAME, the name of the teacher")
    if target is not None:
        return _export(labels, out, options["calibration"], options["min_crops"])
    # Looked at before: afterwards a finished set and one that was just written look the same.
    finished = (out / FILE_NAME).exists()
    with show_transfer("convert") as show:
        if source is not None:
            manifest = _import(source, labels, out, options, show)
        elif layout is not None:
            manifest = fd.convert(
                labels,
                out,
                layout=layout,
                images=options["images"],
                crops_per_block=options["crops_per_block"],
                on_progress=show,
            )
    if finished:
        say(f"{out}: already finished; nothing was written")
    _report(out, manifest, imported=source is not None)
    if source == "fkd" and "top_k" in given(options) and manifest.top_k != options["top_k"]:
        say(
            f"note: --top-k {options['top_k']} is for full distributions; these files hold {manifest.top_k} classes "
            "for each crop, and all were kept",
            err=True,
        )
    # A conversion copies the rejects of its source, which that build's status has told of.
    return DONE_WITH_REJECTS if source is not None and manifest.rejects.rows else 0


def _refuse_others(way: str, options: dict[str, Any]) -> None:
    """Raise UsageError for options that this way to convert would ignore."""
    if "calibration" in options and "calibration" not in TAKEN[way]:
        raise UsageError("--calibration is for --to fkd; a loader calibrates as it reads: CropLoader(calibration=…)")
    for name in options:
        if name not in TAKEN[way]:
            option = f"--{name.replace('_', '-')}"
            ways = [other for other, taken in TAKEN.items() if name in taken]
            raise UsageError(f"{option} has no effect with {way}; it is for {' and '.join(ways)}")
    if "min_crops" in options and "calibration" not in options:
        raise UsageError("--min-crops has no effect without --calibration: all crops are written then")


def _import(
    source: str, labels: str, out: Path, options: dict[str, Any], on_progress: Callable[[fd.TransferProgress], None]
) -> Manifest:
    """Import the files of `source`, with the options that are for it; the library knows the defaults of the others."""
    chosen = {name: options[name] for name in TAKEN[f"--from {source}"] if options[name] is not None}
    if source == "fkd":
        # The files of FKD do not say; those that people have are of ImageNet.
        chosen.setdefault("num_classes", IMAGENET_CLASSES)
        chosen["teacher"] = fd.FkdTeacher(name=chosen["teacher"], size=chosen.pop("teacher_size"))
    return IMPORTS[source][0](labels, out, **chosen, on_progress=on_progress)


def _export(labels: str, out: Path, calibration: str | None, min_crops: int) -> int:
    chosen = None if calibration is None else PRESETS[calibration]()
    with show_transfer("convert") as show:
        label_type = fd.export_fkd(labels, out, calibration=chosen, min_crops=min_crops, on_progress=show)
    say(f"{out}: written for FKD's training script; run it with --soft_label_type {label_type}")
    return 0


def _report(out: Path, manifest: Manifest, *, imported: bool) -> None:
    num_bytes = sum(file.bytes for shard in manifest.shards for file in shard.files)
    say(
        f"{out}: layout {manifest.layout}, {count(manifest.num_images, 'image')} with "
        f"{count(manifest.num_crops, 'crop')}, {size(num_bytes)}, {manifest.rejects.rows:,} rejected"
    )
    counted = manifest.statistics
    if imported and counted.crops_with_target:
        right = percent(counted.top1_matches_target / counted.crops_with_target)
        say(f"the ground truth is the most probable class of {right} of the crops")
