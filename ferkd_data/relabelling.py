"""`verify --deep`: label a random sample of images again with the teachers, and compare with the stored labels.

This is the one reader of label sets that needs the builder's labelling, so it stands above both.

Legend: S images of the sample, N crops per image, k kept classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ferkd_data.builder.base import Base
from ferkd_data.builder.labelling.job import Job, open_tools
from ferkd_data.builder.labelling.label_shard import LabelledBatch, label_shard
from ferkd_data.builder.prepare import teacher_entry
from ferkd_data.builder.settings import BuildSettings, Resources, stored_settings
from ferkd_data.errors import UsageError, check_at_least
from ferkd_data.format.manifest import Manifest, TeacherEntry
from ferkd_data.images import ClassList, ImageRef, Reject, read_class_list
from ferkd_data.label_set import LabelSet, open_labels
from ferkd_data.labels.rows import ImageLabels
from ferkd_data.storage import expanded
from ferkd_data.teachers import Teacher, TeacherSpec, load_teachers
from ferkd_data.teachers.spec import parse_specs
from ferkd_data.words import count

SAMPLE = 100
CROP_IDENTITY = ("boxes", "flip", "operations")
"""Fields that must be equal for two crops to be the same."""
STATISTIC_STEP = 1e-4
"""Smallest difference of a mean or std that counts, a fortieth of a grey level: 0.498 may stand for 127/255."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The furthest that probabilities differ between machines. Beyond, something else is not the same."""

    mean: float
    """Mean over the crops of each crop's largest difference."""
    largest: float
    """Largest difference of a single crop."""


LIMITS = {
    "fp32": Limit(mean=0.004, largest=0.1),
    "fp16": Limit(mean=0.004, largest=0.1),
    "bf16": Limit(mean=0.035, largest=0.5),
}
"""By precision of the teachers; measured by benchmarks/relabel_differences.py (docs/decisions.md)."""


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
    other_targets: tuple[str, ...]
    """Keys of images whose ground truth is another class here."""
    largest_difference: float
    """Largest difference of a probability that both kept, or of one against the least that the other kept."""
    furthest: str
    """The crop with the largest difference, such as `image 'n01440764/1' crop 7`; empty without crops."""
    mean_difference: float
    """Mean over the crops of each crop's largest difference."""
    same_top1: float
    """Share of the crops whose most probable class is the same."""
    other_weights: tuple[str, ...]
    """Teachers whose weights are not those that the manifest names. No fault by itself: a model that was written as an
    ONNX file gives the same labels."""
    other_settings: tuple[str, ...]
    """Settings of the teachers that are not those of the manifest, each with both values."""
    limit: Limit
    """The furthest that probabilities may differ, for the precisions that the labels were made with, then and now."""

    @property
    def is_too_far(self) -> bool:
        """Return whether probabilities differ further than machines do."""
        return self.mean_difference > self.limit.mean or self.largest_difference > self.limit.largest

    @property
    def ok(self) -> bool:
        """Return whether these are the labels that the teachers give to these images."""
        faults = (self.not_labelled, self.other_crops, self.other_targets, self.other_settings)
        return not any(faults) and not self.is_too_far


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

    `classes` numbers the classes as it did for the build; None takes the numbers from the label set.

    >>> fd.relabel("labels", images="imagenet/train", teachers=["timm:resnet50"], sample=20).ok  # doctest: +SKIP

    Raises UsageError for a label set that was merged or imported, whose crops no single seed gives.
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
    differences, same_top1, other_crops, other_targets, compared = [], [], [], [], []
    for fresh, _ in rows:
        stored = labels[fresh.key]
        if not all(np.array_equal(getattr(fresh, name), getattr(stored, name)) for name in CROP_IDENTITY):
            other_crops.append(fresh.key)
            continue
        if stored.target != fresh.target:
            other_targets.append(fresh.key)
        compared.append(fresh.key)
        differences.append(difference(stored, fresh))
        same_top1.append(stored.class_index[:, 0] == fresh.class_index[:, 0])
    worst = np.concatenate(differences) if differences else np.zeros(1)
    image, crop = divmod(int(worst.argmax()), labels.num_crops)
    return RelabelReport(
        images=len(rows),
        not_labelled=tuple(not_labelled),
        crops=sum(len(part) for part in differences),
        other_crops=tuple(other_crops),
        other_targets=tuple(other_targets),
        largest_difference=float(worst.max()),
        furthest=f"image {compared[image]!r} crop {crop}" if compared else "",
        mean_difference=float(worst.mean()),
        same_top1=float(np.concatenate(same_top1).mean()) if same_top1 else 0.0,
        other_weights=_other_weights(labels, loaded),
        other_settings=tuple(_other_settings(labels.manifest, [teacher_entry(teacher) for teacher in loaded])),
        limit=_limit(labels.manifest, loaded),
    )


def difference(a: ImageLabels, b: ImageLabels) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Return (N,): each crop's largest difference of a probability, also of the ground truth's where both know it.

    A class that one of them cut off had at most the least probability that it kept.
    """
    truth = np.nan_to_num(np.abs(a.target_prob.astype(np.float32) - b.target_prob.astype(np.float32)))
    largest: np.ndarray[tuple[int], np.dtype[np.float32]] = np.maximum(np.maximum(_excess(a, b), _excess(b, a)), truth)
    return largest


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
        classes=_known_classes(labels) if classes is None else read_class_list(expanded(classes)),
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


def _known_classes(labels: LabelSet) -> ClassList | None:
    """Return the classes as the build numbered them, where the manifest has their folders or texts."""
    return Base(out=Path(labels.location), manifest=labels.manifest, identity=labels.identity).classes


def _limit(manifest: Manifest, loaded: Sequence[Teacher]) -> Limit:
    precisions = {entry.precision for entry in manifest.teachers} | {teacher.precision for teacher in loaded}
    limits = [LIMITS[precision] for precision in precisions]
    return Limit(mean=max(limit.mean for limit in limits), largest=max(limit.largest for limit in limits))


def _other_settings(manifest: Manifest, given: Sequence[TeacherEntry]) -> Iterator[str]:
    """Describe each setting that decides on labels and that is another one than the manifest has."""
    known = list(manifest.teachers)
    if len(known) != len(given):
        verb = "is" if len(given) == 1 else "are"
        yield f"{count(len(given), 'teacher')} {verb} given, {len(known)} made the label set"
        return
    total_known, total_given = sum(one.weight for one in known), sum(one.weight for one in given)
    for entry in given:
        # Teachers may come in another order. One with other weights stands for the first that is left.
        then = next((one for one in known if one.digest == entry.digest), known[0])
        known.remove(then)
        pairs = {name: (getattr(then, name), getattr(entry, name)) for name in ("size", "interpolation", "temperature")}
        pairs["share of the ensemble"] = (then.weight / total_known, entry.weight / total_given)
        for name, (saved, now) in pairs.items():
            same = saved == now if isinstance(saved, str) else math.isclose(saved, now, rel_tol=1e-6)
            if not same:
                yield f"{entry.spec}: {name} is {_shown(now)}, the label set was made with {_shown(saved)}"
        for name in ("mean", "std"):
            saved, now = getattr(then, name), getattr(entry, name)
            if max(abs(x - y) for x, y in zip(saved, now, strict=True)) > STATISTIC_STEP:
                yield f"{entry.spec}: {name} is {_shown(now)}, the label set was made with {_shown(saved)}"


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{number:.4g}" for number in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
