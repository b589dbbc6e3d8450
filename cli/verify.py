"""`ferkd-data verify`"""

from __future__ import annotations

from pathlib import Path

import click

from .options import json_option, print_json
from .transfers import show_bytes


@click.command()
@click.argument("labels", type=click.Path(path_type=Path))
@click.option("--images", help="The images that were labelled: each must be there, with the digest that was labelled.")
@click.option("--workers", type=click.IntRange(min=1), help="Threads.  [default: one for each core]")
@click.option("--max-faults", type=click.IntRange(min=1), default=20, show_default=True, help="Faults printed.")
@json_option
def command(labels: Path, images: str | None, workers: int | None, max_faults: int, as_json: bool) -> int:
    """Check every file, row and count of the label set LABELS.

    One line for each fault: file, row, image, crop, field and what is wrong. Exit status 1 when there is any.
    """
    import ferkd_data as fd

    report = fd.verify(labels, images=images, workers=workers, max_faults=max_faults, on_progress=show_bytes())
    if as_json:
        print_json(report.to_dict())
        return 0 if report.ok else 1
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
    for fault in report.faults:
        click.echo(str(fault))
    hidden = report.faults_found - len(report.faults)
    if hidden:
        click.echo(f"... and {hidden:,} more faults (--max-faults)")
    verdict = "whole" if report.ok else f"{report.faults_found:,} faults"
    click.echo(
        f"{labels}: {verdict}: {report.files:,} files, {report.bytes / 1e6:,.1f} MB, {report.images:,} images, "
        f"{report.crops:,} crops"
    )
    return 0 if report.ok else 1
