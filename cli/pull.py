"""`ferkd-data pull`"""

from __future__ import annotations

from pathlib import Path

import click

import ferkd_data as fd
from ferkd_data.errors import UsageError
from ferkd_data.format.manifest import FILE_NAME

from .display import show_transfer
from .options import GroupedCommand, default_of
from .terminal import say


@click.command(cls=GroupedCommand, renamed={"--workers": "--threads"})
@click.argument("url")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--crops", type=click.IntRange(min=1), metavar="N", help="Only the crop blocks that hold the first N crops."
)
@click.option("--shards", metavar="LIST", help="Only these image shards, such as 0-9,12.")
@click.option("--signed-by", type=click.Path(path_type=Path), help="A file of allowed signers, as OpenSSH has it.")
@click.option("--signer", help="With --signed-by: the one who must have signed.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=default_of(fd.pull, "threads"),
    show_default=True,
    help="Files fetched at once.",
)
def command(
    url: str,
    out: Path,
    crops: int | None,
    shards: str | None,
    signed_by: Path | None,
    signer: str | None,
    threads: int,
) -> int:
    """Copy the label set at URL (http(s)://, s3://, gs://, hf:// or a folder) into the folder OUT, all or a part.

    Each file is checked against the manifest; with --signed-by, the manifest against its signature before any of them
    is fetched. Run the same command again after an interruption: it resumes.
    """
    wanted = None if shards is None else parse_shards(shards)
    finished = (out / FILE_NAME).exists()
    with show_transfer("pull") as on_progress:
        result = fd.pull(
            url,
            out,
            crops=crops,
            shards=wanted,
            signed_by=signed_by,
            signer=signer,
            threads=threads,
            on_progress=on_progress,
        )
    size = sum(file.bytes for shard in result.manifest.shards for file in shard.files)
    fetched = f"{result.fetched} file{'' if result.fetched == 1 else 's'} fetched"
    say(
        f"{out}: {result.manifest.num_images:,} images with {result.manifest.num_crops} crops, {size / 1e6:,.2f} MB; "
        f"{'was complete already' if finished and not result.fetched else fetched}"
    )
    if result.signer:
        of = "the manifest of the whole" if "pulled_from" in (result.manifest.model_extra or {}) else "its manifest"
        say(f"{of} is signed by {result.signer}")
    return 0


def parse_shards(text: str) -> list[int]:
    """`0-9,12` -> [0, ..., 9, 12]. Raises UsageError."""
    shards: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UsageError(f"--shards must be numbers and ranges such as 0-9,12, got {text!r}")
        shards += range(int(first), int(last if dash else first) + 1)
    return shards
