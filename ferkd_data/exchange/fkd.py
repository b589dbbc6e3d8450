"""FKD's own files (ECCV 2022): one `torch.save([coords, flips, labels])` per image, in a tree of class folders.

`coords` are (N, 4) fractions of the image's height and width: top, left, height, width. `labels` are of one of FKD's
types.

Legend: N crops, C classes, k kept classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ferkd_data.buckets import Thresholds, assign_buckets, confidence
from ferkd_data.errors import ForeignFileError
from ferkd_data.exchange.foreign_arrays import load_arrays
from ferkd_data.labels import CLASS_BITS
from ferkd_data.shards.columns import UNKNOWN_TARGET, ImageLabels, class_index_dtype
from ferkd_data.storage import inside

HIGHEST_TOTAL = 1 + 1e-3


def file_of(folder: Path, key: str) -> Path:
    """Where FKD keeps the labels of an image."""
    return inside(folder, f"{key}.tar")


@dataclass(frozen=True, kw_only=True)
class FkdImage:
    """One file as arrays, checked."""

    coords: npt.NDArray[np.float64]
    """(N, 4)"""
    flip: npt.NDArray[np.bool_]
    """(N,)"""
    class_index: npt.NDArray[np.int64]
    """(N, k), in no order."""
    class_prob: npt.NDArray[np.float32]
    """(N, k)"""


def read_file(path: Path, *, num_classes: int, top_k: int) -> FkdImage:
    """Labels of any of FKD's types: `hard`, `smoothing`, `marginal_*`, or the full distribution, cut to its top-k.

    Raises ForeignFileError for a file that is none, or holds classes or probabilities that cannot be.
    """
    content = load_arrays(path)
    if not isinstance(content, (list, tuple)) or len(content) != 3:
        raise ForeignFileError(f"{path}: is not FKD's [coords, flips, labels]")
    coords, flip, labels = (np.asarray(part) for part in content)
    num_crops = len(labels)
    if coords.shape != (num_crops, 4) or flip.shape != (num_crops,) or not num_crops:
        raise ForeignFileError(
            f"{path}: coords {coords.shape}, flips {flip.shape} and labels {labels.shape} do not fit"
        )
    index, prob = _labels(path, labels, num_classes, top_k)
    if not np.isfinite(coords).all() or not np.isfinite(prob).all():
        raise ForeignFileError(f"{path}: holds numbers that are not finite")
    if index.min() < 0 or index.max() >= num_classes:
        raise ForeignFileError(f"{path}: class {int(index.max())} of {num_classes} classes")
    if prob.min() < 0 or prob.sum(axis=1).max() > HIGHEST_TOTAL:
        raise ForeignFileError(
            f"{path}: probabilities {prob.min():.4g} to {prob.sum(axis=1).max():.4g} in sum; not 0..1"
        )
    return FkdImage(coords=coords.astype(np.float64), flip=flip.astype(np.bool_), class_index=index, class_prob=prob)


def _labels(
    path: Path, labels: npt.NDArray[Any], num_classes: int, top_k: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """(N, k) classes and probabilities from any label type; told apart by their shapes."""
    if labels.ndim == 3 and labels.shape[1] == 2:
        return np.rint(labels[:, 0]).astype(np.int64), labels[:, 1].astype(np.float32)
    if labels.ndim == 2 and labels.shape[1] == num_classes and num_classes > 2:
        full = labels.astype(np.float32)
        best = np.argsort(-full, axis=1, kind="stable")[:, :top_k]
        return best, np.take_along_axis(full, best, axis=1)
    if labels.ndim == 2 and labels.shape[1] == 2:
        return np.rint(labels[:, :1]).astype(np.int64), labels[:, 1:].astype(np.float32)
    if labels.ndim == 1 or (labels.ndim == 2 and labels.shape[1] == 1):
        classes = labels.reshape(-1, 1).astype(np.int64)
        return classes, np.ones(classes.shape, np.float32)
    raise ForeignFileError(f"{path}: labels of shape {labels.shape} are of none of FKD's types")


def boxes_of(coords: npt.NDArray[np.float64], height: int, width: int) -> npt.NDArray[np.uint16]:
    """(N, 4) integer boxes: corners rounded as Pillow does when FKD's loader hands it fractions of pixels.

    Raises ValueError for a box that is not inside the image.
    """
    top, left = coords[:, 0] * height, coords[:, 1] * width
    bottom, right = top + coords[:, 2] * height, left + coords[:, 3] * width
    corners = np.rint(np.stack([top, left, bottom, right], axis=1)).astype(np.int64)
    boxes = np.stack([corners[:, 0], corners[:, 1], *(corners[:, 2:] - corners[:, :2]).T], axis=1)
    fits = (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > 0).all() and (corners[:, 2:] <= (height, width)).all()
    if not fits:
        raise ValueError("a crop is not inside the image; are these the images that were labelled?")
    return boxes.astype(np.uint16)


def to_labels(
    image: FkdImage,
    *,
    key: str,
    digest: bytes,
    size: tuple[int, int],
    target: int,
    num_classes: int,
    thresholds: Thresholds,
) -> ImageLabels:
    """A row of a label set. The ground truth's probability is unknown where it was cut off. Raises ValueError."""
    stored = image.class_prob.clip(0, 1).astype(np.float16)
    rank = stored.view(np.int16).astype(np.int64) << CLASS_BITS
    order = np.argsort(-(rank - image.class_index), axis=1, kind="stable")
    index = np.take_along_axis(image.class_index, order, axis=1)
    prob = np.take_along_axis(stored, order, axis=1)
    is_target = index == target
    known = is_target.any(axis=1) & (target != UNKNOWN_TARGET)
    target_prob = np.where(known, np.where(is_target, prob, 0).max(axis=1), np.float16(np.nan)).astype(np.float16)
    height, width = size
    return ImageLabels(
        key=key,
        image_digest=digest,
        height=height,
        width=width,
        target=target,
        boxes=boxes_of(image.coords, height, width),
        flip=image.flip,
        class_index=index.astype(class_index_dtype(num_classes)),
        class_prob=prob,
        target_prob=target_prob,
        bucket=assign_buckets(confidence(prob, target_prob, thresholds.confidence), thresholds),
    )


def write_file(path: Path, labels: ImageLabels) -> None:
    """As FKD's type `marginal_smoothing_kK`, which its training script reads: labels (N, 2, k) float32.

    All parts are tensors, which `torch.load` takes by itself; FKD's own NumPy arrays it refuses since PyTorch 2.6.
    """
    size = np.array([labels.height, labels.width] * 2, np.float64)
    coords = labels.boxes.astype(np.float64) / size
    soft = np.stack([labels.class_index.astype(np.float32), labels.class_prob.astype(np.float32)], axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    flip = np.ascontiguousarray(labels.flip)
    torch.save([torch.from_numpy(part) for part in (coords, flip, soft)], path)
