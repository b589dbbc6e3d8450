"""`verify --deep`: label a random sample of images again with the teachers, and compare with the stored labels.

This is the one reader of label sets that needs the builder's labelling, so it stands above both.

Legend: S images of the sample, N crops per image, k kept classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ferkd_data.builder.labelling.job import Job, open_tools
from ferkd_data.builder.labelling.label_shard import LabelledBatch, label_shard
from ferkd_data.builder.settings import BuildSettings, Resources, stored_settings
from ferkd_data.errors import UsageError, check_at_least
from ferkd_data.images import ImageRef, Reject, read_class_list
from ferkd_data.label_set import LabelSet, open_labels
from ferkd_data.labels.rows import ImageLabels
from ferkd_data.teachers import Teacher, TeacherSpec, load_teachers
from ferkd_data.teachers.spec import parse_specs

SAMPLE = 100
CROP_IDENTITY = ("boxes", "flip", "operations")
"""Fields that must be equal for two crops to be the same."""


@dataclass(frozen=True, kw_only=True)
class RelabelReport:
    """Differences between stored labels and new ones of the same crops."""

    images: int
    """Images of the sample that were labelled again."""
    not_labelled: tuple[str, ...]
    """Key and reason of each image of the sample that is not in the source or was rejected."""
    crops: int
    other_crops: tuple[str, ...]
    """Keys of images whose stored crops are not those of the seed."""
    largest_difference: float
    """Largest difference of a probability that both kept, or of one against the least that the other kept."""
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

    >>> fd.relabel("labels", images="imagenet/train", teachers=["timm:resnet50"], sample=20)  # doctest: +SKIP

    Differences of about 1e-3 come from float16 and other machines; more means other teachers, another preprocessing or
    other images. Raises UsageError for a label set that was merged or imported, whose crops no single seed gives.
    """
    check_at_least(1, sample=sample)
    check_at_least(0, seed=seed)
    labels = open_labels(path)
    origin = labels.manifest.origin
    if origin == "later kind":
        raise UsageError(
            f"{path}: holds one kind of crops that was pulled alone, and whose crop numbers do not begin at 0; pull "
            "the whole and check that"
        )
    if origin != "build":
        raise UsageError(
            f"{path}: was merged or imported; only a label set as one build wrote it can be labelled again"
        )
    resources = resources or Resources()
    job = _job(labels, images, classes, teachers, precision, resources)
    device = resources.resolved_device()
    loaded = load_teachers(job.teachers, device=device, precision=precision)
    # The builder's own labelling, so that what is compared is what a build would write today.
    with open_tools(job, device, loaded) as tools:
        refs, missing = _sample(labels, tools.source.list_images(), sample, seed)
        rows: list[tuple[ImageLabels, bytes]] = []
        not_labelled = [f"{key}: is not in the source" for key in missing]
        for item in label_shard(refs, tools):
            if isinstance(item, LabelledBatch):
                rows += item.rows
            else:
                not_labelled.append(f"{item.key}: {item.reason} ({item.detail})")
    differences, same_top1, other_crops = [], [], []
    for fresh, _ in rows:
        stored = labels[fresh.key]
        if not all(np.array_equal(getattr(fresh, name), getattr(stored, name)) for name in CROP_IDENTITY):
            other_crops.append(fresh.key)
            continue
        differences.append(difference(stored, fresh))
        same_top1.append(stored.class_index[:, 0] == fresh.class_index[:, 0])
    worst = np.concatenate(differences) if differences else np.zeros(1)
    return RelabelReport(
        images=len(rows),
        not_labelled=tuple(not_labelled),
        crops=sum(len(part) for part in differences),
        other_crops=tuple(other_crops),
        largest_difference=float(worst.max()),
        mean_difference=float(worst.mean()),
        same_top1=float(np.concatenate(same_top1).mean()) if same_top1 else 0.0,
        other_weights=_other_weights(labels, loaded),
    )


def difference(a: ImageLabels, b: ImageLabels) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Return (N,): each crop's largest difference of a probability.

    A class that one of them cut off had at most the least probability that it kept.
    """
    return np.maximum(_excess(a, b), _excess(b, a))


def _excess(a: ImageLabels, b: ImageLabels) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    found = a.class_index[:, :, None] == b.class_index[:, None, :]
    # (N, k, k) compared at once; at most one column matches, so the sum is its probability.
    there = np.where(found, b.class_prob[:, None, :], 0).sum(axis=2, dtype=np.float32)
    prob = a.class_prob.astype(np.float32)
    # What b cut off had at most its least kept probability: only an excess above that is a difference.
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
    return Job(
        source=str(images),
        classes=None if classes is None else read_class_list(Path(classes)),
        # Nothing is written: rows are compared in memory.
        out=None,
        teachers=parse_specs(teachers),
        precision=precision,
        settings=BuildSettings(
            **stored_settings(manifest),
            crops=manifest.num_crops,
            crops_per_block=manifest.crops_per_block,
            crop_kinds=manifest.kinds,
            max_pixels=manifest.pixel_limit,
        ),
        resources=resources.local_worker(),
    )


def _sample(
    labels: LabelSet, items: Iterable[ImageRef | Reject], sample: int, seed: int
) -> tuple[list[ImageRef], list[str]]:
    """Choose random labelled images: those of the source, and the keys of those that it does not have.

    Raises UsageError where the source has none of them.
    """
    rows = np.random.default_rng(seed).choice(len(labels), size=min(sample, len(labels)), replace=False)
    # Ascending, so that each shard is read once (`LabelSet` keeps two).
    keys = [labels[row].key for row in np.sort(rows).tolist()]
    wanted = set(keys)
    refs = [item for item in items if isinstance(item, ImageRef) and item.key in wanted]
    if not refs:
        raise UsageError(f"{labels.location}: none of its images is in the source; is it the same data set?")
    found = {ref.key for ref in refs}
    return refs, [key for key in keys if key not in found]


def _other_weights(labels: LabelSet, loaded: Sequence[Teacher]) -> tuple[str, ...]:
    known = {teacher.digest for teacher in labels.manifest.teachers}
    return tuple(str(teacher.spec) for teacher in loaded if teacher.digest not in known)
