"""`ferkd-data verify`"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import ferkd_data as fd
from ferkd_data.errors import UsageError

from .display import show_transfer
from .options import GroupedCommand, default_of, json_option, print_json
from .terminal import say


@click.command(cls=GroupedCommand, renamed={"--workers": "--threads"})
@click.argument("labels")
@click.option("--images", help="The labelled images: each must be there, with the digest that was labelled.")
@click.option("--signed-by", type=click.Path(path_type=Path), help="A file of allowed signers, as OpenSSH has it.")
@click.option("--signer", help="With --signed-by: the one who must have signed.")
@click.option("--threads", type=click.IntRange(min=1), help="Files checked at a time.  [default: one for each core]")
@click.option(
    "--max-faults",
    type=click.IntRange(min=1),
    default=default_of(fd.verify, "max_faults"),
    show_default=True,
    help="Faults printed.",
)
@click.option("--deep", is_flag=True, help="Also label a sample again; needs --images and --teacher.")
@click.option("--teacher", "teachers", multiple=True, metavar="SPEC", help="With --deep: a teacher, as for build.")
@click.option("--classes", type=click.Path(path_type=Path), help="With --deep: one line per class, as for build.")
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    default=default_of(fd.relabel, "sample"),
    show_default=True,
    help="With --deep: images.",
)
@json_option
def command(
    labels: str,
    images: str | None,
    signed_by: Path | None,
    signer: str | None,
    threads: int | None,
    max_faults: int,
    deep: bool,
    as_json: bool,
    **relabelling: Any,
) -> int:
    """Check every file, row and count of the label set LABELS, a folder or a URL.

    One line for each fault: file, row, image, crop, field and what is wrong. Exit status 1 when there is any.
    """
    if deep and (images is None or not relabelling["teachers"]):
        raise UsageError("--deep needs --images (what was labelled) and --teacher (who labelled it)")
    with show_transfer("verify") as on_progress:
        report = fd.verify(
            labels,
            images=images,
            signed_by=signed_by,
            signer=signer,
            threads=threads,
            max_faults=max_faults,
            on_progress=on_progress,
        )
    again = None
    if deep and report.ok:
        again = fd.relabel(labels, images=str(images), **relabelling)
    if as_json:
        print_json({**report.to_dict(), **({"deep": asdict(again)} if again else {})})
        return 0 if report.ok else 1
    for warning in report.warnings:
        say(f"warning: {warning}", err=True)
    for fault in report.faults:
        say(str(fault))
    hidden = report.faults_found - len(report.faults)
    if hidden:
        say(f"... and {hidden:,} more faults (--max-faults)")
    verdict = "whole" if report.ok else f"{report.faults_found:,} faults"
    say(
        f"{labels}: {verdict}: {report.files:,} files, {report.bytes / 1e6:,.1f} MB, {report.images:,} images, "
        f"{report.crops:,} crops"
    )
    if report.signer:
        say(f"its manifest is signed by {report.signer}")
    if again:
        say(
            f"labelled again: {again.crops:,} crops of {again.images} images; largest difference of a probability "
            f"{again.largest_difference:.4f}, {again.mean_difference:.4f} on the mean crop; most probable class the "
            f"same for {again.same_top1:.1%}"
        )
        for key in again.other_crops[:max_faults]:
            say(f"image {key!r}: its crops are not those of the manifest's seed")
        for spec in again.other_weights:
            say(f"warning: {spec}: other weights than those of the manifest's teachers", err=True)
    return 0 if report.ok and not (again and again.other_crops) else 1
