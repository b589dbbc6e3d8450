"""`ferkd-data info`"""

from __future__ import annotations

from typing import Any

import click

from ferkd_data.words import count

from .options import json_option, print_json
from .overview import left_out
from .terminal import say, say_table, size

NAME_WIDTH = 13
"""Characters of the column of names, where none is longer."""


@click.command()
@click.argument("labels")
@json_option
def command(labels: str, as_json: bool) -> int:
    """Print the size, settings and teachers of the label set LABELS, a folder or a URL."""
    import ferkd_data as fd

    manifest = fd.open_labels(labels).manifest
    if as_json:
        # Statistics have a command of their own, and hundreds of numbers.
        print_json(manifest.model_dump(mode="json", exclude={"statistics"}, exclude_none=True))
        return 0
    num_bytes = sum(file.bytes for shard in manifest.shards for file in shard.files)
    files = sum(len(shard.files) for shard in manifest.shards)
    thresholds = manifest.thresholds
    rows = {
        "layout": manifest.layout,
        "images": f"{manifest.num_images:,} ({manifest.rejects.rows:,} rejected)",
        "crops": f"{manifest.num_crops} per image"
        # A tar has all crops of its images.
        + (f" in blocks of {manifest.crops_per_block}" if manifest.layout == "parquet" else ""),
        "labels": f"top-{manifest.top_k} of {manifest.num_classes:,} classes",
        "size": f"{size(num_bytes)} in {count(files, 'file')}, "
        f"{num_bytes / max(manifest.statistics.crops, 1):.1f} bytes per crop",
        "source": manifest.source.description,
        **({"left out": left_out(manifest.source.left_out)} if manifest.source.left_out else {}),
        **_distributions(manifest),
        **({"augmented by": ", ".join(manifest.augmentations)} if manifest.augmentations else {}),
        "thresholds": f"{thresholds.low:g} {thresholds.mid:g} {thresholds.top:g} on "
        + ("p_max" if thresholds.confidence == "max" else "the ground truth's probability"),
        "ensemble": manifest.ensemble,
        "written by": f"{manifest.created_by.name} {manifest.created_by.version}, format version {manifest.version}",
    }
    width = max(NAME_WIDTH, *map(len, rows))
    for name, value in rows.items():
        say(f"{name:<{width}} {value}")
    say("")
    teachers = [
        [
            teacher.name,
            f"{teacher.size} px",
            teacher.interpolation,
            f"{teacher.weight:g}",
            f"{teacher.temperature:g}",
            teacher.precision,
            f"{teacher.digest[:12]}",
        ]
        for teacher in manifest.teachers
    ]
    say_table(["teacher", "input", "interpolation", "weight", "temperature", "precision", "weights"], teachers)
    return 0


def _distributions(manifest: Any) -> dict[str, str]:
    """Describe the distribution of all crops, or that of each kind, or of each label set that was merged."""
    from ferkd_data.exchange.origins import draws_in_words, seeds_in_words

    if not manifest.kinds:
        draws = draws_in_words(manifest, _told)
        if draws:
            return dict(draws)
        return {"distribution": f"{_told(manifest.crop_distribution)}, {seeds_in_words(manifest)}"}
    kinds = {f"kind {kind.name}": kind.summary for kind in manifest.kinds}
    return {**kinds, "seed": str(manifest.seed)}


def _told(crops: Any) -> str:
    return (
        f"scale {crops.scale[0]:g}..{crops.scale[1]:g}, ratio {crops.ratio[0]:.3g}..{crops.ratio[1]:.3g}, "
        f"hflip {crops.hflip:g}"
    )
