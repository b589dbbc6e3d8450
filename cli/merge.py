"""`ferkd-data merge`"""

from __future__ import annotations

from pathlib import Path

import click

from ferkd_data.errors import UsageError
from ferkd_data.format.manifest import FILE_NAME

from .display import show_transfer
from .terminal import say

ADDED = {"teachers": "the same crops by all teachers", "crops": "all crops", "images": "all images"}


@click.command()
@click.argument("labels", nargs=-1, required=True)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--weights", metavar="W,W,…", help="Weight of each label set, where they hold the same crops.")
def command(labels: tuple[str, ...], out: Path, weights: str | None) -> int:
    """Merge the label sets LABELS... into a new one in the folder OUT (layout parquet).

    The same crops by other teachers become their ensemble; other crops of the same images (another seed) become more
    crops; other images become more images. Which of these it is, is seen from the label sets.
    """
    import ferkd_data as fd

    finished = (out / FILE_NAME).exists()
    numbers = None if weights is None else _numbers(weights)
    with show_transfer("merge") as on_progress:
        result = fd.merge(labels, out, weights=numbers, on_progress=on_progress)
    manifest = result.manifest
    if finished:
        say(f"{out}: was finished already; nothing was written")
    say(
        f"{out}: {ADDED[result.kind]}: {manifest.num_images:,} images with {manifest.num_crops} crops, "
        f"top-{manifest.top_k} of {len(manifest.teachers)} teachers"
    )
    if result.kind == "teachers":
        say(
            "a probability differs from that of a build with all teachers at once by at most "
            f"{result.mean_uncertain:.4f} on the mean crop, {result.max_uncertain:.4f} on the worst: the mass that the "
            "label sets cut off"
        )
    return 0


def _numbers(text: str) -> list[float]:
    try:
        return [float(piece) for piece in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--weights must be numbers such as 2,1, got {text!r}") from error
