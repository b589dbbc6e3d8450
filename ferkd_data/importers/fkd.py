"""FKD's own files (ECCV 2022): one `torch.save([coords, flips, labels])` per image, in a tree of class folders.

`coords` are (N, 4) fractions of the image's height and width: top, left, height, width. `labels` are of one of FKD's
types.

Legend: N crops, C classes, k kept classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from ferkd_data.errors import ForeignFileError, check_at_least
from ferkd_data.format.manifest import (
    DEFAULT_CROPS_PER_BLOCK,
    DEFAULT_IMAGES_PER_SHARD,
    CropDistributionEntry,
    Manifest,
    TeacherEntry,
    check_limits,
)
from ferkd_data.format.progress import OnProgress
from ferkd_data.images import open_source
from ferkd_data.importers.foreign_arrays import load_arrays
from ferkd_data.importers.foreign_labels import (
    ForeignLabels,
    check_boxes,
    check_foreign_labels,
    foreign_teacher,
    whole_class_numbers,
)
from ferkd_data.importers.import_labels import run_import
from ferkd_data.labels.rows import ImageLabels
from ferkd_data.storage import inside, local_path

NUMERIC = "biuf"
"""Kinds of NumPy types that are numbers: bool, integers and floats."""


@dataclass(frozen=True, kw_only=True)
class FkdTeacher:
    """The teacher of FKD's label files, which do not name it.

    >>> fd.FkdTeacher(name="efficientnet_l2", size=475).size
    475
    """

    name: str
    size: int = 224
    """Side of the input in pixels."""

    def __post_init__(self) -> None:
        check_at_least(1, size=self.size)


@dataclass(frozen=True, kw_only=True)
class FkdFiles:
    """A folder of FKD's files."""

    folder: Path
    num_classes: int
    top_k: int
    """Classes kept of full distributions; the other label types keep what they have."""
    teacher: FkdTeacher

    format: ClassVar[str] = "FKD"
    seed: ClassVar[None] = None
    expected: ClassVar[str] = "FOLDER/KEY.tar"
    distribution: ClassVar[CropDistributionEntry] = CropDistributionEntry(
        scale=(0.08, 0.936), ratio=(3 / 4, 4 / 3), hflip=0.5
    )
    """The defaults of FKD's generator; its files do not state them."""

    @property
    def teachers(self) -> tuple[TeacherEntry, ...]:
        name, size = self.teacher.name, self.teacher.size
        return (foreign_teacher(f"fkd:{name}", name, num_classes=self.num_classes, size=size),)

    def read(self, key: str, size: tuple[int, int]) -> ForeignLabels:
        """Read labels of any of FKD's types: `hard`, `smoothing`, `marginal_*`, or full distributions, cut to top-k.

        Raises ForeignFileError for a malformed file, or one with classes or probabilities that cannot be; ValueError
        for a crop that is not inside the image.
        """
        path = file_of(self.folder, key)
        # The file may be anybody's: this never runs code in it, where torch.load of old versions did.
        content = load_arrays(path)
        if not isinstance(content, (list, tuple)) or len(content) != 3:
            raise ForeignFileError(f"{path}: is not FKD's [coords, flips, labels]")
        coords, flip, labels = (np.asarray(part) for part in content)
        # Texts and None would pass as flips, and end the import at the first sum.
        if any(part.dtype.kind not in NUMERIC or not part.ndim for part in (coords, flip, labels)):
            raise ForeignFileError(f"{path}: holds something else than arrays of numbers")
        num_crops = len(labels)
        if coords.shape != (num_crops, 4) or flip.shape != (num_crops,) or not num_crops:
            raise ForeignFileError(
                f"{path}: coords {coords.shape}, flips {flip.shape} and labels {labels.shape} do not fit"
            )
        if not np.isfinite(coords).all():
            raise ForeignFileError(f"{path}: holds numbers that are not finite")
        with np.errstate(over="ignore"):
            # What float32 cannot hold becomes infinite, which the check refuses.
            index, prob = _labels(path, labels, self.num_classes, self.top_k)
        check_foreign_labels(path, index, prob, self.num_classes)
        boxes = boxes_of(coords.astype(np.float64), *size)
        return ForeignLabels(boxes=boxes, flip=flip.astype(np.bool_), class_index=index, class_prob=prob)


def file_of(folder: Path, key: str) -> Path:
    """Return the path of an image's labels in FKD's tree."""
    return inside(folder, f"{key}.tar")


def _labels(
    path: Path, labels: npt.NDArray[Any], num_classes: int, top_k: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return (N, k) classes and probabilities from any label type; the types differ in their shapes."""
    # marginal_smoothing and marginal_renorm: classes and probabilities, both as floats.
    if labels.ndim == 3 and labels.shape[1] == 2:
        return whole_class_numbers(path, labels[:, 0], num_classes), labels[:, 1].astype(np.float32)
    # Full distributions. With two classes they have the shape of `smoothing`, which is the likelier one.
    if labels.ndim == 2 and labels.shape[1] == num_classes and num_classes > 2:
        full = labels.astype(np.float32)
        best = np.argsort(-full, axis=1, kind="stable")[:, :top_k]
        return best, np.take_along_axis(full, best, axis=1)
    # smoothing: the first class and its probability.
    if labels.ndim == 2 and labels.shape[1] == 2:
        return whole_class_numbers(path, labels[:, :1], num_classes), labels[:, 1:].astype(np.float32)
    # hard: the class alone, to which all of the probability goes.
    if labels.ndim == 1 or (labels.ndim == 2 and labels.shape[1] == 1):
        classes = whole_class_numbers(path, labels.reshape(-1, 1), num_classes)
        return classes, np.ones(classes.shape, np.float32)
    raise ForeignFileError(f"{path}: labels of shape {labels.shape} are of none of FKD's types")


def boxes_of(coords: npt.NDArray[np.float64], height: int, width: int) -> npt.NDArray[np.uint16]:
    """Return (N, 4) integer boxes: corners rounded as Pillow does when FKD's loader gives it fractions of pixels.

    Raises ValueError for a box that is not inside the image.
    """
    top, left = coords[:, 0] * height, coords[:, 1] * width
    bottom, right = top + coords[:, 2] * height, left + coords[:, 3] * width
    # Corners are rounded, not sizes: rint rounds halves to even, as Pillow's crop does.
    corners = np.rint(np.stack([top, left, bottom, right], axis=1))
    boxes = np.stack([corners[:, 0], corners[:, 1], *(corners[:, 2:] - corners[:, :2]).T], axis=1)
    return check_boxes(boxes, height, width)


def write_file(path: Path, labels: ImageLabels) -> None:
    """Write FKD's type `marginal_smoothing_kK`, which its training script reads: labels (N, 2, k) float32."""
    # Class numbers as float32, as FKD has them: exact up to 2**24.
    soft = np.stack([labels.class_index.astype(np.float32), labels.class_prob.astype(np.float32)], axis=1)
    write_arrays(path, coords_of(labels), np.ascontiguousarray(labels.flip), soft)


def coords_of(labels: ImageLabels) -> npt.NDArray[np.float64]:
    """Return (N, 4): boxes as fractions of the image's height and width."""
    return labels.boxes.astype(np.float64) / np.array([labels.height, labels.width] * 2, np.float64)


def write_arrays(
    path: Path, coords: npt.NDArray[np.float64], flip: npt.NDArray[np.bool_], soft: npt.NDArray[np.float32]
) -> None:
    """Write one of FKD's files.

    All parts are tensors, which `torch.load` takes by itself; FKD's own NumPy arrays it refuses since PyTorch 2.6.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save([torch.from_numpy(part) for part in (coords, flip, soft)], path)


def import_fkd(
    folder: str | Path,
    out: str | Path,
    *,
    images: str | Path,
    num_classes: int,
    teacher: FkdTeacher,
    top_k: int = 5,
    crops_per_block: int = DEFAULT_CROPS_PER_BLOCK,
    images_per_shard: int = DEFAULT_IMAGES_PER_SHARD["parquet"],
    classes: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Make a label set of layout parquet from FKD's files: FOLDER/KEY.tar for each image of `images`, such as
    FOLDER/n01440764/n01440764_10026.tar.

    `top_k` applies to full distributions; FKD's other label types keep the k they have. An image without labels or with
    labels that cannot be read becomes a reject.

    >>> teacher = fd.FkdTeacher(name="efficientnet_l2", size=475)
    >>> fd.import_fkd("FKD", "labels", images="imagenet/train", num_classes=1000, teacher=teacher)  # doctest: +SKIP

    Raises SourceError; UsageError for numbers that cannot be right, and when nothing can be imported.
    """
    check_at_least(1, top_k=top_k, crops_per_block=crops_per_block, images_per_shard=images_per_shard)
    check_at_least(2, num_classes=num_classes)
    check_limits(top_k=top_k, crops_per_block=crops_per_block, num_classes=num_classes)
    files = FkdFiles(folder=local_path(folder), num_classes=num_classes, top_k=top_k, teacher=teacher)
    source = open_source(images, classes=None if classes is None else Path(classes))
    return run_import(
        files,
        source,
        local_path(out),
        images=images,
        classes=classes,
        crops_per_block=crops_per_block,
        images_per_shard=images_per_shard,
        settings={"teacher": f"{teacher.name} {teacher.size}", "num_classes": num_classes, "top_k": top_k},
        on_progress=on_progress,
    )
