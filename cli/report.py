"""`ferkd-data report`"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from ferkd_data.words import count

from .display import show_images
from .options import json_option, print_json
from .terminal import say, size


@click.command()
@click.argument("labels")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--images", metavar="SOURCE", help="The labelled images, so that the page shows pictures.")
@click.option(
    "--csv",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write a CSV file of images whose ground truth is doubtful, at most 1,000.",
)
@click.option(
    "--log-json",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Log written by `build --log-json`, so that the report says how long the build took.",
)
@json_option
def command(labels: str, file: Path, images: str | None, csv: Path | None, log_json: Path | None, as_json: bool) -> int:
    """Write a report on the label set LABELS, a folder or a URL, to the HTML file FILE.

    The page needs no network and no other file. LABELS may be a build that is running or was interrupted; the report
    then covers its finished shards.
    """
    from ferkd_data.report import write_report

    with show_images("report") as on_progress:
        result = write_report(labels, file, images=images, csv=csv, log_json=log_json, on_progress=on_progress)
    if as_json:
        print_json({**asdict(result), "path": str(result.path)})
        return 0
    say(
        f"{file}: {count(result.images, 'image')} with {count(result.crops, 'crop')}, {size(result.bytes)}; "
        f"{count(result.suspects, 'image')} with doubtful ground truth"
    )
    if result.pictures:
        say(f"warning: {result.pictures}", err=True)
    return 0
