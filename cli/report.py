"""`ferkd-data report`"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from .display import show_images
from .options import json_option, print_json
from .terminal import say


@click.command()
@click.argument("labels")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--images", metavar="SOURCE", help="The images that were labelled, to show with their crops.")
@click.option(
    "--csv",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also list the images with a doubtful ground truth, at most 1,000, in this file.",
)
@click.option(
    "--log-json",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The log that `build --log-json` wrote, so that the report states how long the build took.",
)
@json_option
def command(labels: str, file: Path, images: str | None, csv: Path | None, log_json: Path | None, as_json: bool) -> int:
    """Write the label set LABELS, a folder or a URL, as one HTML file FILE to look at in a browser.

    The file needs no network and no other file. LABELS may be a build that still runs, or was interrupted; the report
    then covers its finished shards.
    """
    from ferkd_data.report import write_report

    with show_images("report") as on_progress:
        result = write_report(labels, file, images=images, csv=csv, log_json=log_json, on_progress=on_progress)
    if as_json:
        print_json({**asdict(result), "path": str(result.path)})
        return 0
    say(
        f"{file}: {result.images:,} images with {result.crops:,} crops, {result.bytes / 1e6:,.2f} MB; "
        f"{result.suspects:,} images have a doubtful ground truth"
    )
    if result.pictures:
        say(f"warning: {result.pictures}", err=True)
    return 0
