"""`ferkd-data pull`"""

from __future__ import annotations

from pathlib import Path

import click

from ferkd_data.errors import UsageError

from .say import say
from .transfers import show_bytes


@click.command()
@click.argument("url")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--crops", type=click.IntRange(min=1), help="Only the crop blocks that hold the first so many crops.")
@click.option("--shards", metavar="LIST", help="Only these image shards, such as 0-9,12.")
@click.option("--workers", type=click.IntRange(min=1), default=4, show_default=True, help="Files fetched at once.")
def command(url: str, out: Path, crops: int | None, shards: str | None, workers: int) -> int:
    """Copy the label set at URL (http(s)://, s3://, gs://, hf:// or a folder) into the folder OUT, all or a part.

    Each file is checked against the manifest. Run the same command again after an interruption: it goes on.
    """
    import ferkd_data as fd

    wanted = None if shards is None else parse_shards(shards)
    result = fd.pull(url, out, crops=crops, shards=wanted, workers=workers, on_progress=show_bytes())
    size = sum(file.bytes for shard in result.manifest.shards for file in shard.files)
    say(
        f"{out}: {result.manifest.num_images:,} images with {result.manifest.num_crops} crops, {size / 1e6:,.2f} MB; "
        f"{result.fetched} files fetched"
    )
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
