"""ReLabel's label maps (CVPR 2021): for each image the five best classes at each of 15 x 15 cells, FOLDER/KEY.pt.

A file is the `torch.save` of one tensor (2, 5, 15, 15): scores, then class numbers. It holds no crops: these are drawn
here. The scores under a crop are pooled by RoIAlign and put through a softmax over all classes, as the authors' loader
does.

Legend: N crops, C classes, k kept classes, P best classes of a cell, S side of the map, U classes that the map names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from ferkd_data.crops import CropDistribution, draw_crops
from ferkd_data.errors import ForeignFileError, UsageError, check_at_least
from ferkd_data.format import out_folder
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
from ferkd_data.importers.foreign_labels import ForeignLabels, foreign_teacher
from ferkd_data.importers.import_labels import run_import
from ferkd_data.storage import inside, local_path


@dataclass(frozen=True, kw_only=True)
class RelabelMaps:
    """A folder of ReLabel's files, and the crops that are drawn for them."""

    folder: Path
    num_classes: int
    top_k: int
    crops: int
    seed: int
    drawn: CropDistribution

    format: ClassVar[str] = "ReLabel"
    expected: ClassVar[str] = "FOLDER/KEY.pt"

    @property
    def distribution(self) -> CropDistributionEntry:
        return CropDistributionEntry.of(self.drawn)

    @property
    def teachers(self) -> tuple[TeacherEntry, ...]:
        """EfficientNet-L2 at 475 px, as the paper says; the files say nothing."""
        name = "efficientnet_l2 (ReLabel's label maps)"
        return (foreign_teacher("relabel:efficientnet_l2", name, num_classes=self.num_classes, size=475),)

    def read(self, key: str, size: tuple[int, int]) -> ForeignLabels:
        """Draw the crops of an image of (height, width) and pool their labels. Raises ForeignFileError."""
        path = inside(self.folder, f"{key}.pt")
        score, index = _label_map(path, load_arrays(path), self.num_classes)
        drawn = draw_crops(key, *size, seed=self.seed, count=self.crops, distribution=self.drawn)
        prob = pooled(score, index, drawn.boxes, *size, num_classes=self.num_classes)
        best = torch.from_numpy(prob).topk(self.top_k, dim=1)
        return ForeignLabels(
            boxes=drawn.boxes, flip=drawn.flip, class_index=best.indices.numpy(), class_prob=best.values.numpy()
        )


def _label_map(path: Path, content: Any, num_classes: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Split a label map into scores and class numbers, each (P, S, S). Raises ForeignFileError for anything else."""
    if not isinstance(content, np.ndarray) or content.ndim != 4 or content.shape[0] != 2 or not content.size:
        found = f"an array of shape {content.shape}" if isinstance(content, np.ndarray) else type(content).__name__
        raise ForeignFileError(f"{path}: is {found}; ReLabel's label maps are arrays of shape (2, 5, 15, 15)")
    if content.shape[2] != content.shape[3]:
        raise ForeignFileError(f"{path}: a label map of {content.shape[2]} x {content.shape[3]} cells is not square")
    with np.errstate(over="ignore"):
        whole = content.astype(np.float32)
    if not np.isfinite(whole).all():
        raise ForeignFileError(f"{path}: holds numbers that are not finite")
    index = whole[1].astype(np.int64)
    if index.min() < 0 or index.max() >= num_classes or (index != whole[1]).any():
        raise ForeignFileError(f"{path}: classes {whole[1].min():g} to {whole[1].max():g} of {num_classes} classes")
    return whole[0], index


def pooled(
    score: npt.NDArray[np.float32],
    index: npt.NDArray[np.int64],
    boxes: npt.NDArray[np.uint16],
    height: int,
    width: int,
    *,
    num_classes: int,
) -> npt.NDArray[np.float32]:
    """Return the distribution (N, C) of each box: softmax of the pooled scores; a class not named has the score 0.

    The authors' loader hands RoIAlign a box as (top, left, bottom, right) where it takes (x, y, x, y), so a box's rows
    run along the map's last axis. Their published maps are made for that loader, so the same is done here.
    """
    from torchvision.ops import roi_align

    # Pooling only the classes that the map names: a few dozen in place of a thousand.
    named, cell = np.unique(index, return_inverse=True)
    side = score.shape[-1]
    maps_US = torch.zeros(len(named), side, side)
    maps_US.scatter_(0, torch.from_numpy(cell.reshape(index.shape)), torch.from_numpy(score))
    corners = boxes.astype(np.float64)
    corners[:, 2:] += corners[:, :2]
    # Of the image's sides, so that they fit a map of any size.
    fractions = (corners / (height, width, height, width)).astype(np.float32)
    # RoIAlign puts the centre of a cell at its whole number, and a map's edge half a cell before the first centre.
    regions = torch.from_numpy(fractions) * side - 0.5
    # RoIAlign wants the number of the image in the batch in front of each box; here there is one.
    numbered = torch.cat([torch.zeros(len(boxes), 1), regions], dim=1)
    pooled_NU = roi_align(maps_US[None], numbered, output_size=(1, 1))[:, :, 0, 0]
    logits_NC = torch.zeros(len(boxes), num_classes)
    logits_NC[:, torch.from_numpy(named)] = pooled_NU
    prob: npt.NDArray[np.float32] = logits_NC.softmax(dim=1).numpy()
    return prob


def import_relabel(
    folder: str | Path,
    out: str | Path,
    *,
    images: str | Path,
    crops: int = 200,
    seed: int = 0,
    distribution: CropDistribution | None = None,
    num_classes: int = 1000,
    top_k: int = 5,
    crops_per_block: int = DEFAULT_CROPS_PER_BLOCK,
    images_per_shard: int = DEFAULT_IMAGES_PER_SHARD["parquet"],
    classes: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Make a label set of layout parquet from ReLabel's label maps, FOLDER/KEY.pt for each image, without a teacher.

    `crops` crops of each image are drawn as `build` draws them, and labelled by pooling the map under each.

    Raises SourceError; UsageError for numbers that cannot be right, and when nothing can be imported.

    >>> fd.import_relabel("relabel_imagenet", "labels", images="imagenet/train", crops=100)  # doctest: +SKIP
    """
    check_at_least(1, crops=crops, top_k=top_k, crops_per_block=crops_per_block, images_per_shard=images_per_shard)
    check_at_least(2, num_classes=num_classes)
    check_at_least(0, seed=seed)
    check_limits(crops=crops, top_k=top_k, crops_per_block=crops_per_block, num_classes=num_classes)
    # ReLabel's maps give a whole distribution, of which top_k classes are taken; the other formats cut at what they
    # have.
    if top_k > num_classes:
        raise UsageError(f"top_k {top_k} is more than the {num_classes} classes")
    files = RelabelMaps(
        folder=local_path(folder),
        num_classes=num_classes,
        top_k=top_k,
        crops=crops,
        seed=seed,
        drawn=distribution or CropDistribution(),
    )
    source = open_source(images, classes=None if classes is None else Path(classes))
    settings: out_folder.Settings = {"crops": crops, "seed": seed, "distribution": repr(files.drawn)}
    return run_import(
        files,
        source,
        local_path(out),
        images=images,
        classes=classes,
        crops_per_block=crops_per_block,
        images_per_shard=images_per_shard,
        settings=settings | {"num_classes": num_classes, "top_k": top_k},
        on_progress=on_progress,
    )
