"""`ferkd-data publish`"""

from __future__ import annotations

from pathlib import Path

import click

import ferkd_data as fd

from .display import show_transfer
from .options import GroupedCommand, default_of
from .terminal import say


@click.command(cls=GroupedCommand, renamed={"--workers": "--threads"})
@click.argument("labels", type=click.Path(path_type=Path))
@click.argument("url")
@click.option("--name", help="Title of the label set.  [default: as published before, or the folder's name]")
@click.option("--license", help="Licence of the labels, such as cc-by-4.0, or other.  [needed the first time]")
@click.option("--license-name", help="With --license other: the licence's name.")
@click.option("--license-link", help="With --license other: its URL.  [default: the file LICENSE in LABELS]")
@click.option("--image-license", help="Licence of the images, where the label set holds them (layout webdataset).")
@click.option("--author", help="Person or group that publishes it.")
@click.option("--homepage", help="URL of a page to read more.")
@click.option("--citation", help="BibTeX entry or sentence to cite it by.")
@click.option(
    "--source-dataset",
    "source_datasets",
    multiple=True,
    metavar="NAME",
    help="Name on the hub of a data set that the images come from, such as imagenet-1k. Can be repeated.",
)
@click.option("--sign", "sign_with", type=click.Path(path_type=Path), help="An OpenSSH key to sign the manifest with.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=default_of(fd.publish, "threads"),
    show_default=True,
    help="Files sent at once.",
)
@click.option("--overwrite", is_flag=True, help="Replace another label set that lies at URL.")
@click.option("--dry-run", is_flag=True, help="Print what would be sent.")
def command(
    labels: Path,
    url: str,
    sign_with: Path | None,
    threads: int,
    overwrite: bool,
    dry_run: bool,
    source_datasets: tuple[str, ...],
    **fields: str | None,
) -> int:
    """Send the label set in the folder LABELS to URL: a folder, s3://BUCKET/PATH, gs://BUCKET/PATH, or
    hf://datasets/ORG/NAME, which is created if it does not exist.

    The label set is verified first. The digest of every file that arrived is compared; the manifest is sent last. Run
    the same command again after an interruption: what arrived is not sent again. Fields of the card that are not given
    keep their published values.
    """
    card = fd.CardFields(source_datasets=source_datasets or None, **fields)
    with show_transfer("publish") as on_progress:
        result = fd.publish(
            labels,
            url,
            card=card,
            sign_with=sign_with,
            threads=threads,
            overwrite=overwrite,
            dry_run=dry_run,
            on_progress=on_progress,
        )
    if dry_run:
        for file in result.sent:
            say(f"{file.bytes:>14,}  {file.name}")
    if not result.sent:
        say(f"{url}: is published already, all of its {result.skipped} files")
        return 0
    verb = "would be sent" if dry_run else "sent"
    files = f"{len(result.sent)} file{'' if len(result.sent) == 1 else 's'}"
    say(f"{url}: {files}, {result.bytes / 1e6:,.2f} MB {verb}, {result.skipped} were there already")
    return 0
