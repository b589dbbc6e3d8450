"""`ferkd-data pull`"""

from __future__ import annotations

from pathlib import Path

import click

import ferkd_data as fd
from ferkd_data.errors import UsageError
from ferkd_data.format.manifest_file import FILE_NAME
from ferkd_data.words import count

from .display import show_transfer
from .options import GroupedCommand, default_of, signature_options
from .terminal import say, size

MAX_SHARDS = 10_000_000
"""More than any label set has: at 4,096 images in each, these would be 40 thousand million images."""


@click.command(cls=GroupedCommand, renamed={"--workers": "--threads"})
@click.argument("url")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--crops",
    type=click.IntRange(min=1),
    metavar="N",
    help="Fetch only the crop blocks with the first N crops of each image.",
)
@click.option("--crop-kind", metavar="NAME", help="Fetch only the crops of this kind, of a label set with crop kinds.")
@click.option("--shards", metavar="LIST", help="Fetch only these image shards, such as 0-9,12.")
@signature_options
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    default=default_of(fd.pull, "threads"),
    show_default=True,
    help="Number of files fetched at a time.",
)
def command(
    url: str,
    out: Path,
    crops: int | None,
    crop_kind: str | None,
    shards: str | None,
    signed_by: Path | None,
    signer: str | None,
    threads: int,
) -> int:
    """Copy the label set at URL, or a part of it, to the folder OUT. URL is https://, s3://, gs://, hf:// or a folder.

    Each file is checked against the manifest. With --signed-by, the signature of the manifest is checked before any
    other file is fetched. Run the same command again after an interruption: it resumes.
    """
    wanted = None if shards is None else parse_shards(shards)
    # Before the pull, which writes the manifest.
    finished = (out / FILE_NAME).exists()
    with show_transfer("pull") as on_progress:
        result = fd.pull(
            url,
            out,
            crops=crops,
            crop_kind=crop_kind,
            shards=wanted,
            signed_by=signed_by,
            signer=signer,
            threads=threads,
            on_progress=on_progress,
        )
    manifest = result.manifest
    num_bytes = sum(file.bytes for shard in manifest.shards for file in shard.files)
    say(
        f"{out}: {count(manifest.num_images, 'image')} with {count(manifest.num_crops, 'crop')}, {size(num_bytes)}; "
        f"{'already complete' if finished and not result.fetched else count(result.fetched, 'file') + ' fetched'}"
    )
    if result.signer:
        # A part has a manifest of its own, which nobody signed.
        partial = "pulled_from" in (manifest.model_extra or {})
        say(f"the manifest{' of the whole label set' if partial else ''} is signed by {result.signer}")
    return 0


def parse_shards(text: str) -> list[int]:
    """Read a list such as `0-9,12` as [0, ..., 9, 12]. Raises UsageError."""
    shards: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.partition("-")
        # Not isdigit, which is true of a superscript that int() refuses.
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(f"--shards must be numbers and ranges such as 0-9,12, got {text!r}")
        start, stop = int(first), int(last if dash else first) + 1
        if stop <= start:
            raise UsageError(f"--shards has the range {piece}, which ends before it begins; write {last}-{first}")
        # Before memory is taken for them.
        if stop > MAX_SHARDS:
            raise UsageError(f"--shards names shard {stop - 1:,}; no label set has as many")
        shards += range(start, stop)
    return shards
