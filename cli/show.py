"""`ferkd-data show`"""

from __future__ import annotations

from typing import Any

import click

from .options import json_option, print_json
from .say import say


@click.command()
@click.argument("labels")
@click.argument("key", required=False)
@click.option("--crops", "num_crops", type=int, default=8, show_default=True, help="Crops shown.")
@json_option
def command(labels: str, key: str | None, num_crops: int, as_json: bool) -> int:
    """Show crops of the image KEY (by default the first one) of the label set LABELS with their labels."""
    import ferkd_data as fd
    from ferkd_data.errors import UsageError

    opened = fd.open_labels(labels)
    try:
        image = opened[0] if key is None else opened[key]
    except KeyError as error:
        first = next(opened.keys(), "")
        raise UsageError(f"{labels}: no image has the key {key!r}; keys look like {first!r}") from error
    crops = [describe_crop(opened, image, n) for n in range(min(num_crops, opened.num_crops))]
    if as_json:
        content = {"key": image.key, "height": image.height, "width": image.width, "target": image.target}
        print_json({**content, "crops": crops})
        return 0
    print_image(opened, image, crops)
    return 0


def describe_crop(labels: Any, image: Any, n: int) -> dict[str, Any]:
    from ferkd_data.buckets import BUCKETS

    names = labels.class_names
    top = [
        {"class": int(i), "name": names[i] if names else str(i), "prob": round(float(p), 4)}
        for i, p in zip(image.class_index[n], image.class_prob[n], strict=True)
    ]
    return {
        "crop": n,
        "box": image.boxes[n].tolist(),
        "flip": bool(image.flip[n]),
        "bucket": BUCKETS[image.bucket[n]],
        "labels": top,
    }


def print_image(labels: Any, image: Any, crops: list[dict[str, Any]]) -> None:
    names = labels.class_names
    target = "unlabelled" if image.target < 0 else (names[image.target] if names else f"class {image.target}")
    say(f"{image.key} ({image.width}x{image.height}, {target})")
    for crop in crops:
        top, left, height, width = crop["box"]
        place = f"{width}x{height}+{left}+{top}{' flipped' if crop['flip'] else ''}"
        text = ", ".join(f"{label['name'].split(',')[0]} {label['prob']:.2f}" for label in crop["labels"][:3])
        say(f"  {crop['crop']:>3}  {place:<24} {crop['bucket']:<14} {text}")
