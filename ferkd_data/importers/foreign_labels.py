"""Labels of other projects' files, checked and turned into rows of a label set.

Legend: N crops, k kept classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ferkd_data.errors import ForeignFileError
from ferkd_data.format.manifest import UNKNOWN_SHA256, CropDistributionEntry, TeacherEntry
from ferkd_data.labels.buckets import Thresholds, buckets_of
from ferkd_data.labels.rows import UNKNOWN_TARGET, ImageLabels, class_index_dtype, rank_of
from ferkd_data.normalization import IMAGENET_MEAN, IMAGENET_STD

HIGHEST_TOTAL = 1 + 1e-3
"""Largest sum of a crop's probabilities that rounding explains."""


@dataclass(frozen=True, kw_only=True)
class ForeignLabels:
    """The labels of one image in a foreign file."""

    boxes: npt.NDArray[np.uint16]
    """(N, 4): top, left, height, width."""
    flip: npt.NDArray[np.bool_]
    """(N,)"""
    class_index: npt.NDArray[np.int64]
    """(N, k), in no order."""
    class_prob: npt.NDArray[np.float32]
    """(N, k)"""


class LabelFiles(Protocol):
    """A folder of label files of one foreign format."""

    @property
    def format(self) -> str: ...

    @property
    def folder(self) -> Path: ...

    @property
    def expected(self) -> str:
        """The path of an image's labels, in words."""

    @property
    def num_classes(self) -> int: ...

    @property
    def distribution(self) -> CropDistributionEntry: ...

    @property
    def teachers(self) -> tuple[TeacherEntry, ...]: ...

    @property
    def seed(self) -> int | None:
        """The seed of the crops; None where another program drew them."""

    def read(self, key: str, size: tuple[int, int]) -> ForeignLabels:
        """Read the labels of an image of (height, width). Raises ForeignFileError, ValueError for impossible crops."""


def foreign_teacher(
    spec: str,
    name: str,
    *,
    num_classes: int,
    size: int,
    interpolation: Literal["bilinear", "bicubic"] = "bicubic",
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> TeacherEntry:
    """Record a teacher that is known by name only; its weights, and so their digest, are not."""
    return TeacherEntry(
        spec=spec,
        name=name,
        # Zeros, which no digest is: readers show such weights as unknown.
        digest=UNKNOWN_SHA256,
        num_classes=num_classes,
        size=size,
        interpolation=interpolation,
        mean=mean,
        std=std,
        weight=1,
        temperature=1,
        precision="fp32",
    )


def check_foreign_labels(
    path: Path, index: npt.NDArray[np.int64], prob: npt.NDArray[np.float32], num_classes: int
) -> None:
    """Raise ForeignFileError for impossible classes (N, k) or probabilities (N, k)."""
    if not np.isfinite(prob).all():
        raise ForeignFileError(f"{path}: holds numbers that are not finite")
    if index.min() < 0 or index.max() >= num_classes:
        raise ForeignFileError(f"{path}: class {int(index.max())} of {num_classes} classes")
    if prob.min() < 0 or prob.sum(axis=1).max() > HIGHEST_TOTAL:
        raise ForeignFileError(
            f"{path}: probabilities {prob.min():.4g} to {prob.sum(axis=1).max():.4g} in sum; not 0..1"
        )


def whole_class_numbers(path: Path, values: npt.NDArray[Any], num_classes: int) -> npt.NDArray[np.int64]:
    """Return class numbers that other formats keep as floats. Raises ForeignFileError for other than 0 .. C - 1.

    Compared before they are cast: of NaN or 1e30, NumPy would make any number, and of 1.5 class 1.
    """
    whole = np.rint(values)
    if not ((values == whole) & (whole >= 0) & (whole < num_classes)).all():
        raise ForeignFileError(f"{path}: classes {values.min():g} to {values.max():g} of {num_classes} classes")
    numbers: npt.NDArray[np.int64] = whole.astype(np.int64)
    return numbers


def check_boxes(boxes: npt.NDArray[Any], height: int, width: int) -> npt.NDArray[np.uint16]:
    """Return (N, 4) boxes as they are stored. Raises ValueError for one that is not inside the image, or not whole."""
    if (boxes != np.rint(boxes)).any():
        raise ValueError("the box of a crop is not in whole pixels")
    fits = (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > 0).all()
    if not fits or (boxes[:, :2] + boxes[:, 2:] > (height, width)).any():
        raise ValueError("a crop is not inside the image; are these the images that were labelled?")
    return boxes.astype(np.uint16)


def to_row(
    labels: ForeignLabels,
    *,
    key: str,
    digest: bytes,
    size: tuple[int, int],
    target: int,
    num_classes: int,
    thresholds: Thresholds,
) -> ImageLabels:
    """Make a row of a label set. The ground truth's probability is unknown where it was cut off."""
    # Rounded first and sorted after: two probabilities that float16 makes equal must be in the order of their classes.
    stored = labels.class_prob.clip(0, 1).astype(np.float16)
    order = np.argsort(-rank_of(stored, labels.class_index), axis=1, kind="stable")
    index = np.take_along_axis(labels.class_index, order, axis=1)
    prob = np.take_along_axis(stored, order, axis=1)
    is_target = index == target
    known = is_target.any(axis=1) & (target != UNKNOWN_TARGET)
    # A foreign file does not say what the ground truth had where it was cut off: null, not 0 (docs/format.md).
    target_prob = np.where(known, np.where(is_target, prob, 0).max(axis=1), np.float16(np.nan)).astype(np.float16)
    height, width = size
    return ImageLabels(
        key=key,
        image_digest=digest,
        height=height,
        width=width,
        target=target,
        boxes=labels.boxes,
        flip=labels.flip,
        class_index=index.astype(class_index_dtype(num_classes)),
        class_prob=prob,
        target_prob=target_prob,
        bucket=buckets_of(prob, target_prob, thresholds),
    )
