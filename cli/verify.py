"""`ferkd-data verify`"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import ferkd_data as fd
from ferkd_data.errors import UsageError
from ferkd_data.words import count, percent

from .display import show_transfer
from .options import GroupedCommand, default_of, given, json_option, named, print_json, signature_options
from .terminal import say, size

if TYPE_CHECKING:
    from ferkd_data.relabelling import RelabelReport


@click.command(cls=GroupedCommand, renamed={"--workers": "--threads"})
@click.argument("labels")
@click.option("--images", metavar="SOURCE", help="Also check that each labelled image is in this source, unchanged.")
@signature_options
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of files checked at a time.  [default: one per core]",
)
@click.option(
    "--max-faults",
    type=click.IntRange(min=1),
    metavar="N",
    default=default_of(fd.verify, "max_faults"),
    show_default=True,
    help="Number of faults to print.",
)
@click.option("--deep", is_flag=True, help="Also label a sample of images again. Needs --images and --teacher.")
@click.option("--teacher", "teachers", multiple=True, metavar="SPEC", help="With --deep: a teacher, as for build.")
@click.option(
    "--classes", type=click.Path(path_type=Path), metavar="FILE", help="With --deep: class list, as for build."
)
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    metavar="N",
    default=default_of(fd.relabel, "sample"),
    show_default=True,
    help="With --deep: number of images to label again.",
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

    Prints one line per fault: file, row, image, crop, field and what is wrong. The exit status is 1 if there are any.
    """
    # Before the files are checked, which may take an hour.
    if not deep and (useless := given(relabelling)):
        raise UsageError(f"{named(useless)} would have no effect without --deep, which labels images again")
    if deep and (images is None or not relabelling["teachers"]):
        raise UsageError("--deep needs --images SOURCE (the labelled images) and each --teacher SPEC of the build")
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
    # Teachers are not asked about labels that are damaged already.
    if deep and report.ok:
        again = fd.relabel(labels, images=str(images), **relabelling)
    if as_json:
        print_json({**report.to_dict(), **({"deep": {"ok": again.ok, **asdict(again)}} if again else {})})
        return 0 if report.ok and (again is None or again.ok) else 1
    for warning in report.warnings:
        say(f"warning: {warning}", err=True)
    for fault in report.faults:
        say(str(fault))
    hidden = report.faults_found - len(report.faults)
    if hidden:
        say(f"... and {hidden:,} more faults (--max-faults)")
    verdict = "no faults" if report.ok else count(report.faults_found, "fault")
    say(
        f"{labels}: {verdict} in {count(report.files, 'file')}, {size(report.bytes)}, {count(report.images, 'image')}, "
        f"{count(report.crops, 'crop')}"
    )
    if report.signer:
        say(f"the manifest is signed by {report.signer}")
    if deep and again is None:
        say("not labelled again: the label set has faults already", err=True)
    if again:
        _print_again(again, max_faults)
    return 0 if report.ok and (again is None or again.ok) else 1


def _print_again(again: RelabelReport, max_faults: int) -> None:
    where = f" ({again.furthest})" if again.is_too_far else ""
    say(
        f"labelled again: {count(again.crops, 'crop')} of {count(again.images, 'image')}; probabilities differ by "
        f"at most {again.largest_difference:.4f}{where}, {again.mean_difference:.4f} on average; same most probable "
        f"class for {percent(again.same_top1)} of the crops"
    )
    for text in again.not_labelled[:max_faults]:
        say(f"not labelled again: {text}")
    for key in again.other_crops[:max_faults]:
        say(f"image {key!r}: the manifest's seed gives other crops")
    for key in again.other_targets[:max_faults]:
        say(f"image {key!r}: its ground truth is another class here; is --classes that of the build?")
    for text in again.other_settings[:max_faults]:
        say(text)
    if again.is_too_far:
        say(
            f"no machine makes such differences (at most {again.limit.largest:g}, {again.limit.mean:g} on average, at "
            "these precisions): the teachers, their input or the labels are others than the manifest says"
        )
    for spec in again.other_weights:
        say(f"warning: {spec}: its weights are not those of the manifest's teachers", err=True)
