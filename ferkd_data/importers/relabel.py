"""`verify --deep`: label a random sample of images again, and compare with what is stored.

Legend: S images of the sample, N crops per image, k kept classes.

ReLabel's label maps (CVPR 2021): for each image the five best classes at each of 15 x 15 places, FOLDER/KEY.pt.

A file is the `torch.save` of one tensor (2, 5, 15, 15): scores, then class numbers. It holds no crops: these are drawn
here. The scores under a crop are pooled by RoIAlign and put through a softmax over all classes, as the authors' loader
does.

Legend: N crops, C classes, k kept classes, P best classes of a place, S side of the map, U classes that the map names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from ferkd_data.builder.job import Job, open_tools
from ferkd_data.builder.labelling.counts import TeacherCounts
from ferkd_data.builder.labelling.crop_batches import Rejected
from ferkd_data.builder.labelling.label_shard import label_shard
from ferkd_data.builder.settings import BuildSettings, Resources
from ferkd_data.crops import CropDistribution, draw_crops
from ferkd_data.errors import ForeignFileError, UsageError
from ferkd_data.exchange.out_folder import check_at_least
from ferkd_data.format.manifest import CropDistributionEntry, TeacherEntry
from ferkd_data.images import ImageRef, Reject, read_class_list
from ferkd_data.importers.foreign_arrays import load_arrays
from ferkd_data.importers.foreign_labels import UNKNOWN_DIGEST, ForeignLabels
from ferkd_data.label_set import LabelSet, open_labels
from ferkd_data.labels.rows import ImageLabels
from ferkd_data.storage import inside
from ferkd_data.teachers import Teacher, TeacherSpec, load_teachers

SAMPLE = 100
VIEW_FIELDS = ("boxes", "flip", "operations")
"""What makes a crop the crop that it is."""


@dataclass(frozen=True, kw_only=True)
class RelabelReport:
    images: int
    crops: int
    other_crops: tuple[str, ...]
    """Keys of images whose stored crops are not those of the seed."""
    largest_difference: float
    """Of a probability that both have kept, or of one against the least that the other kept."""
    mean_difference: float
    """Mean over the crops of each crop's largest difference."""
    same_top1: float
    """Share of the crops whose most probable class is the same."""
    other_weights: tuple[str, ...]
    """Teachers whose weights are not those that the manifest names."""


def relabel(
    path: str | Path,
    *,
    images: str | Path,
    teachers: Sequence[str | TeacherSpec],
    classes: str | Path | None = None,
    sample: int = SAMPLE,
    seed: int = 0,
    precision: str = "auto",
    resources: Resources | None = None,
) -> RelabelReport:
    """Draw the crops of `sample` random images again, ask the teachers again, and compare.

    Differences of about 1e-3 come from float16 and other machines; more means other teachers, another preprocessing or
    other images. Raises UsageError for a label set that was merged or imported, whose crops no single seed gives.
    """
    check_at_least(1, sample=sample)
    check_at_least(0, seed=seed)
    labels = open_labels(path)
    extra = labels.manifest.model_extra or {}
    if "merged_from" in extra or "imported_from" in extra:
        raise UsageError(
            f"{path}: was merged or imported; only a label set as one build wrote it can be labelled again"
        )
    resources = resources or Resources()
    job = _job(labels, images, classes, teachers, precision, resources)
    device = resources.resolved_device()
    loaded = load_teachers(job.teachers, device=device, precision=precision)
    rejected, counts = Rejected(), TeacherCounts.zeros(len(loaded))
    with open_tools(job, device, loaded) as tools:
        refs = _sample(labels, tools.source.list_images(), sample, seed)
        rows = list(label_shard(refs, tools, rejected, counts, lambda *_: None))
    differences, same_top1, other_crops = [], [], []
    for fresh, _ in rows:
        stored = labels[fresh.key]
        if not all(np.array_equal(getattr(fresh, name), getattr(stored, name)) for name in VIEW_FIELDS):
            other_crops.append(fresh.key)
            continue
        differences.append(difference(stored, fresh))
        same_top1.append(stored.class_index[:, 0] == fresh.class_index[:, 0])
    worst = np.concatenate(differences) if differences else np.zeros(1)
    return RelabelReport(
        images=len(rows),
        crops=sum(len(part) for part in differences),
        other_crops=tuple(other_crops),
        largest_difference=float(worst.max()),
        mean_difference=float(worst.mean()),
        same_top1=float(np.concatenate(same_top1).mean()) if same_top1 else 0.0,
        other_weights=_other_weights(labels, loaded),
    )


def difference(a: ImageLabels, b: ImageLabels) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """(N,): each crop's largest difference of a probability; a class that one cut off had at most its least kept."""
    return np.maximum(_excess(a, b), _excess(b, a))


def _excess(a: ImageLabels, b: ImageLabels) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    found = a.class_index[:, :, None] == b.class_index[:, None, :]
    there = np.where(found, b.class_prob[:, None, :], 0).sum(axis=2, dtype=np.float32)
    prob = a.class_prob.astype(np.float32)
    least = b.class_prob[:, -1:].astype(np.float32)
    both = np.abs(prob - there)
    cut_off = np.maximum(prob - least, 0)
    largest: np.ndarray[tuple[int], np.dtype[np.float32]] = np.where(found.any(axis=2), both, cut_off).max(axis=1)
    return largest


def _job(
    labels: LabelSet,
    images: str | Path,
    classes: str | Path | None,
    teachers: Sequence[str | TeacherSpec],
    precision: str,
    resources: Resources,
) -> Job:
    manifest = labels.manifest
    crops = manifest.crop_distribution
    return Job(
        source=str(images),
        classes=None if classes is None else read_class_list(Path(classes)),
        out=Path(),
        teachers=tuple(spec if isinstance(spec, TeacherSpec) else TeacherSpec.parse(spec) for spec in teachers),
        precision=precision,
        settings=BuildSettings(
            crops=manifest.num_crops,
            top_k=manifest.top_k,
            seed=manifest.seed,
            distribution=CropDistribution(scale=crops.scale, ratio=crops.ratio, hflip=crops.hflip),
            augment=manifest.augmentations or (),
            ensemble=manifest.ensemble,
            thresholds=manifest.thresholds.absolute(),
        ),
        batch_size=resources.resolved_batch_size(),
        workers=resources.resolved_workers(),
        threads=resources.resolved_threads(),
    )


def _sample(labels: LabelSet, items: Iterable[ImageRef | Reject], sample: int, seed: int) -> list[ImageRef]:
    """References of random labelled images. Raises UsageError where the source has none of them."""
    rows = np.random.default_rng(seed).choice(len(labels), size=min(sample, len(labels)), replace=False)
    keys = set()
    for row in np.sort(rows).tolist():
        keys.add(labels[row].key)
    refs = [item for item in items if isinstance(item, ImageRef) and item.key in keys]
    if not refs:
        raise UsageError(f"{labels.location}: none of its images is in the source; is it the same data set?")
    return refs


def _other_weights(labels: LabelSet, loaded: Sequence[Teacher]) -> tuple[str, ...]:
    known = {teacher.digest for teacher in labels.manifest.teachers}
    return tuple(str(teacher.spec) for teacher in loaded if teacher.digest not in known)


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
        return CropDistributionEntry(scale=self.drawn.scale, ratio=self.drawn.ratio, hflip=self.drawn.hflip)

    @property
    def teachers(self) -> tuple[TeacherEntry, ...]:
        """EfficientNet-L2 at 475 px, as the paper says; the files say nothing."""
        entry = TeacherEntry(
            spec="relabel:efficientnet_l2",
            name="efficientnet_l2 (ReLabel's label maps)",
            digest=UNKNOWN_DIGEST,
            num_classes=self.num_classes,
            size=475,
            interpolation="bicubic",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            weight=1,
            temperature=1,
            precision="fp32",
        )
        return (entry,)

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
    """Scores and class numbers, each (P, S, S). Raises ForeignFileError for anything else."""
    if not isinstance(content, np.ndarray) or content.ndim != 4 or content.shape[0] != 2 or not content.size:
        told = f"an array of shape {content.shape}" if isinstance(content, np.ndarray) else type(content).__name__
        raise ForeignFileError(f"{path}: is {told}; ReLabel's label maps are arrays of shape (2, 5, 15, 15)")
    if content.shape[2] != content.shape[3]:
        raise ForeignFileError(f"{path}: a label map of {content.shape[2]} x {content.shape[3]} places is not square")
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
    """The distribution (N, C) of each box: softmax of the RoIAlign of the scores; a class not named has the score 0.

    The authors' loader hands RoIAlign a box as (top, left, bottom, right) where it takes (x, y, x, y), so a box's rows
    run along the map's last axis. Their published maps are made for that loader, so the same is done here.
    """
    from torchvision.ops import roi_align

    # Pooling only the classes that the map names: a few dozen in place of a thousand.
    named, place = np.unique(index, return_inverse=True)
    side = score.shape[-1]
    maps_US = torch.zeros(len(named), side, side)
    maps_US.scatter_(0, torch.from_numpy(place.reshape(index.shape)), torch.from_numpy(score))
    corners = boxes.astype(np.float64)
    corners[:, 2:] += corners[:, :2]
    fractions = (corners / (height, width, height, width)).astype(np.float32)
    regions = torch.from_numpy(fractions) * side - 0.5
    numbered = torch.cat([torch.zeros(len(boxes), 1), regions], dim=1)
    pooled_NU = roi_align(maps_US[None], numbered, output_size=(1, 1))[:, :, 0, 0]
    logits_NC = torch.zeros(len(boxes), num_classes)
    logits_NC[:, torch.from_numpy(named)] = pooled_NU
    prob: npt.NDArray[np.float32] = logits_NC.softmax(dim=1).numpy()
    return prob
