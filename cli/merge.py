"""`ferkd-data merge`"""

from __future__ import annotations

from pathlib import Path

import click

from ferkd_data.errors import UsageError
from ferkd_data.format.manifest_file import FILE_NAME
from ferkd_data.words import count

from .display import show_transfer
from .terminal import say

ADDED = {"teachers": "the same crops by all teachers", "crops": "all crops", "images": "all images"}


@click.command()
@click.argument("labels", nargs=-1, required=True)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--weights", metavar="W,W,…", help="Weight of each label set, if they hold the same crops by different teachers."
)
def command(labels: tuple[str, ...], out: Path, weights: str | None) -> int:
    """Merge the label sets LABELS... into a new one of layout parquet in the folder OUT.

    The command sees what to combine: the same crops labelled by different teachers become their ensemble; different
    crops of the same images (another seed) become more crops per image; different images become more images.
    """
    import ferkd_data as fd

    finished = (out / FILE_NAME).exists()
    numbers = None if weights is None else _numbers(weights)
    with show_transfer("merge") as on_progress:
        result = fd.merge(labels, out, weights=numbers, on_progress=on_progress)
    manifest = result.manifest
    if finished:
        say(f"{out}: already finished; nothing was written")
    say(
        f"{out}: {ADDED[result.kind]}: {count(manifest.num_images, 'image')} with "
        f"{count(manifest.num_crops, 'crop')}, top-{manifest.top_k} of {count(len(manifest.teachers), 'teacher')}"
    )
    if result.kind == "teachers":
        say(
            "probabilities differ from a build with all teachers at once by at most "
            f"{result.mean_uncertain:.4f} on average, {result.max_uncertain:.4f} on the worst crop: the mass outside "
            "the stored top-k"
        )
    return 0


def _numbers(text: str) -> list[float]:
    try:
        return [float(piece) for piece in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--weights must be numbers such as 2,1, got {text!r}") from error
