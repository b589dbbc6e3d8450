"""`ferkd-data show`"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .options import json_option, print_json
from .terminal import say


@click.command()
@click.argument("labels")
@click.argument("key", required=False)
@click.option(
    "--crops",
    "num_crops",
    type=click.IntRange(min=1),
    metavar="N",
    default=8,
    show_default=True,
    help="Number of crops to show, at most 8 in a picture; of each kind, where there are crop kinds.",
)
@click.option(
    "--classes",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Class list with names, as for build, for a label set without class names.",
)
@click.option(
    "--image",
    "picture",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Write a picture of the image with its boxes, and of its least and most confident crops with their labels.",
)
@click.option("--images", metavar="SOURCE", help="With --image: the labelled images.")
@json_option
def command(
    labels: str,
    key: str | None,
    num_crops: int,
    classes: Path | None,
    picture: Path | None,
    images: str | None,
    as_json: bool,
) -> int:
    """Show the crops of one image of the label set LABELS, with their labels. KEY defaults to the first image.

    A box such as 104x88+12+30 is 104 pixels wide and 88 pixels high; its corner is 12 pixels from the left edge of the
    image and 30 from the top. Crops marked "flipped" are mirrored after they are cut.
    """
    import ferkd_data as fd
    from ferkd_data.errors import UsageError
    from ferkd_data.storage import local_path

    if picture is None and images is not None:
        raise UsageError("--images is for --image FILE.png, the picture to write")
    opened = fd.open_labels(labels)
    try:
        image = opened[0] if key is None else opened[key]
    except KeyError as error:
        raise UsageError(str(error.args[0])) from error
    names = _names(classes, opened)
    if picture is not None:
        picture = local_path(picture)
        _check_picture(picture, images, image.image_digest)
        # The picture grows with them; the table below has all that were asked for.
        shown = min(num_crops, 8)
        fd.show(opened, image.key, images=images, crops=shown, class_names=names).save(picture)
    crops = [describe_crop(opened, image, n, names) for n in shown_crops(opened, num_crops)]
    if as_json:
        content = {"key": image.key, "height": image.height, "width": image.width, "target": image.target}
        print_json({**content, "crops": crops})
        return 0
    print_image(opened, image, crops, names)
    return 0


def _check_picture(picture: Path, images: str | None, digest: bytes) -> None:
    """Raise UsageError where the picture would replace a photo: --image is easily taken for the image to show."""
    from ferkd_data.errors import UsageError
    from ferkd_data.storage import image_digest

    # Devices and FIFOs are refused by the writer.
    exists = picture.is_file()
    if picture.suffix.lower() != ".png" and (exists or not picture.exists()):
        raise UsageError(
            f"--image {picture}: is the PNG file to write, and must end in .png; --images names the photos"
        )
    inside = images is not None and picture.resolve().is_relative_to(Path(images).resolve())
    if exists and (inside or image_digest(picture.read_bytes()) == digest):
        raise UsageError(f"--image {picture}: is the file to write, and this is one of the photos; name another file")


def _names(classes: Path | None, labels: Any) -> Sequence[str] | None:
    """Choose the class names to show. Raises SourceError, and UsageError where their number is wrong."""
    from ferkd_data.errors import UsageError
    from ferkd_data.images import read_class_list

    if classes is None:
        found: Sequence[str] | None = labels.class_names
        return found
    names = read_class_list(classes).names
    if len(names) != labels.num_classes:
        raise UsageError(f"{classes}: names {len(names)} classes, the label set has {labels.num_classes}")
    return names


def shown_crops(labels: Any, num_crops: int) -> list[int]:
    """Return the numbers of the first crops, or of the first ones of each crop kind."""
    from ferkd_data.crop_kinds import kind_starts

    kinds = labels.crop_kinds
    if len(kinds) < 2:
        return list(range(min(num_crops, labels.num_crops)))
    starts = zip(kinds, kind_starts(kinds), strict=True)
    return [n for kind, start in starts for n in range(start, start + min(num_crops, kind.crops))]


def describe_crop(labels: Any, image: Any, n: int, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Describe a crop by plain values. `names` default to the label set's."""
    from ferkd_data.crop_kinds import kind_of_crop
    from ferkd_data.labels.buckets import BUCKETS

    names = names or labels.class_names
    kind = kind_of_crop(labels.crop_kinds, n)
    top = [
        {"class": int(i), "name": names[i] if names else str(i), "prob": round(float(p), 4)}
        for i, p in zip(image.class_index[n], image.class_prob[n], strict=True)
    ]
    return {
        "crop": n,
        **({"kind": kind.name} if kind else {}),
        "box": image.boxes[n].tolist(),
        "flip": bool(image.flip[n]),
        "bucket": BUCKETS[image.bucket[n]],
        "labels": top,
    }


def print_image(labels: Any, image: Any, crops: list[dict[str, Any]], names: Sequence[str] | None = None) -> None:
    """Print an image's crops as an aligned table with a head."""
    from ferkd_data.report.tables import short_names

    names = names or labels.class_names
    short = short_names(tuple(names)) if names else None
    target = "unlabelled" if image.target < 0 else (names[image.target] if names else f"class {image.target}")
    say(f"{image.key} ({image.width}x{image.height}, {target})")
    wide = max([4, *(len(crop["kind"]) for crop in crops if "kind" in crop)])
    with_kind = any("kind" in crop for crop in crops)
    head = f"{'kind':<{wide}}  " if with_kind else ""
    say(f"  {'crop':>4}  {head}{'width x height + left + top':<28} {'bucket':<14} most probable classes")
    for crop in crops:
        top, left, height, width = crop["box"]
        box = f"{width}x{height}+{left}+{top}{' flipped' if crop['flip'] else ''}"
        top3 = crop["labels"][:3]
        text = ", ".join(f"{short[one['class']] if short else one['name']} {one['prob']:.2f}" for one in top3)
        kind = f"{crop['kind']:<{wide}}  " if with_kind else ""
        say(f"  {crop['crop']:>4}  {kind}{box:<28} {crop['bucket']:<14} {text}")
