"""`ferkd-data publish`"""

from __future__ import annotations

from pathlib import Path

import click

import ferkd_data as fd
from ferkd_data.words import count

from .display import show_transfer
from .options import GroupedCommand, default_of
from .terminal import say, size


@click.command(cls=GroupedCommand, renamed={"--workers": "--threads"})
@click.argument("labels", type=click.Path(path_type=Path))
@click.argument("url")
@click.option(
    "--name", metavar="NAME", help="Title of the label set.  [default: as published before, else the folder's name]"
)
@click.option(
    "--license", metavar="NAME", help="Licence of the labels, such as cc-by-4.0; or `other`.  [required the first time]"
)
@click.option("--license-name", metavar="NAME", help="With --license other: name of the licence.")
@click.option(
    "--license-link",
    metavar="URL",
    help="With --license other: URL of the licence.  [default: the file LICENSE in LABELS]",
)
@click.option(
    "--image-license", metavar="NAME", help="Licence of the images, if the label set contains them (layout webdataset)."
)
@click.option("--author", metavar="NAME", help="Person or group that publishes the label set.")
@click.option("--homepage", metavar="URL", help="URL of a page about the label set.")
@click.option("--citation", help="BibTeX entry, or a sentence, with which to cite the label set.")
@click.option(
    "--source-dataset",
    "source_datasets",
    multiple=True,
    metavar="NAME",
    help="Name on the hub of the data set with the images, such as imagenet-1k. May be repeated.",
)
@click.option(
    "--sign",
    "sign_with",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="OpenSSH key with which to sign the manifest.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    default=default_of(fd.publish, "threads"),
    show_default=True,
    help="Number of files sent at a time.",
)
@click.option("--overwrite", is_flag=True, help="Replace another label set at URL.")
@click.option("--dry-run", is_flag=True, help="Print what would be sent, and send nothing.")
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
    hf://datasets/ORG/NAME (created, and public, if it does not exist).

    The label set is verified first. The digest of every file is compared on arrival; the manifest is sent last. Run the
    same command again after an interruption: files that arrived are not sent again. Fields of the card that you leave
    out keep their published values.
    """
    # None, not an empty tuple, stands for "as published before".
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
        say(f"{url}: already published, all {count(result.skipped, 'file')}")
        return 0
    verb = "would be sent" if dry_run else "sent"
    say(f"{url}: {count(len(result.sent), 'file')}, {size(result.bytes)} {verb}, {result.skipped:,} were there already")
    return 0
