"""Soft labels of the same crops by different teachers, combined into those of the ensemble, from their top-k alone.

Each label set knows its kept classes and the probability of the ground truth exactly; what it cut off is spread evenly
over its other classes, as recovery `smooth` does. So the mean is exact for classes that all kept, and for the
ground truth.

Legend: M crops, S label sets, k kept classes, m candidates (all kept classes and the ground truth), C classes.

Label sets of the same crops by different teachers, combined as they are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from ferkd_data.errors import LabelSetError, UsageError
from ferkd_data.format.manifest import TeacherEntry
from ferkd_data.label_set.label_set import VerifyLabels
from ferkd_data.label_set.views import LabelSet
from ferkd_data.labels.buckets import Thresholds, assign_buckets, confidence
from ferkd_data.labels.rows import UNKNOWN_TARGET, ShardLabels, class_index_dtype
from ferkd_data.labels.statistics import Statistics

CLASS_BITS = 24
CROPS_AT_ONCE = 16384
SAME_FIELDS = ("image_digest", "height", "width", "target", "boxes", "flip", "operations")


@dataclass(frozen=True, kw_only=True, eq=False)
class Merged:
    labels: ShardLabels
    uncertain: npt.NDArray[np.float32]
    """(R, N): how far any probability can be from that of a build with all teachers at once, at most."""


def merge_labels(
    parts: Sequence[ShardLabels],
    weights: Sequence[float],
    *,
    num_classes: int,
    thresholds: Thresholds,
    where: str,
) -> Merged:
    """The weighted mean of what S label sets say of the same crops; keeps the largest k among them.

    A probability differs from the joint build's by at most the weighted mass that was cut off (`uncertain`), besides
    the rounding to float16. Raises LabelSetError where the rows are not the same crops.
    """
    first = parts[0]
    for part in parts[1:]:
        check_same_crops(first, part, where)
    shares = (np.asarray(weights) / np.sum(weights)).astype(np.float32)
    shape = first.flip.shape
    target = np.repeat(first.target, shape[1])
    flat = [
        (part.class_index.reshape(-1, part.class_index.shape[2]), part.class_prob.reshape(-1, part.class_prob.shape[2]))
        for part in parts
    ]
    target_probs = [part.target_prob.reshape(-1) for part in parts]
    top_k = max(index.shape[1] for index, _ in flat)
    pieces = []
    for start in range(0, len(target), CROPS_AT_ONCE):
        rows = slice(start, start + CROPS_AT_ONCE)
        told = [
            _told(index[rows], prob[rows], target[rows], known[rows], num_classes)
            for (index, prob), known in zip(flat, target_probs, strict=True)
        ]
        pieces.append(_mean(told, shares, top_k))
    class_index, class_prob, uncertain = (np.concatenate(column) for column in zip(*pieces, strict=True))
    target_prob = sum(s * p.astype(np.float32) for s, p in zip(shares, target_probs, strict=True))
    merged = replace(
        first,
        class_index=class_index.astype(class_index_dtype(num_classes)).reshape(*shape, top_k),
        class_prob=class_prob.reshape(*shape, top_k),
        target_prob=np.asarray(target_prob, np.float16).reshape(shape),
    )
    bucket = assign_buckets(confidence(merged.class_prob, merged.target_prob, thresholds.confidence), thresholds)
    return Merged(labels=replace(merged, bucket=bucket), uncertain=uncertain.reshape(shape))


def check_same_crops(a: ShardLabels, b: ShardLabels, where: str) -> None:
    """Raises LabelSetError that names the first image and field that differ."""
    if list(a.keys) != list(b.keys):
        pairs = zip(a.keys, b.keys, strict=False)
        x, y = next(((x, y) for x, y in pairs if x != y), (len(a), len(b)))
        raise LabelSetError(f"{where}: the label sets hold other images here: {x!r} and {y!r}")
    for name in SAME_FIELDS:
        x, y = getattr(a, name), getattr(b, name)
        same = x.shape == y.shape and x == y
        if not np.all(same):
            row = int((~np.asarray(same)).reshape(len(a), -1).any(axis=1).argmax()) if x.shape == y.shape else 0
            raise LabelSetError(f"{where}: {name} of image {a.keys[row]!r} differs between the label sets")


@dataclass(frozen=True)
class _Told:
    """What one label set says of M crops: `prob` of `index` (M, k + 1), and `rest` (M,) for any other class.

    The last column is the ground truth where it was not kept, else class -1.
    """

    index: npt.NDArray[np.int64]
    prob: npt.NDArray[np.float32]
    rest: npt.NDArray[np.float32]
    cut: npt.NDArray[np.float32]
    """(M,): the mass of which only the sum is known."""


def _told(
    index: npt.NDArray[Any],
    prob: npt.NDArray[np.float16],
    target: npt.NDArray[np.int32],
    target_prob: npt.NDArray[np.float16],
    num_classes: int,
) -> _Told:
    extra = (target != UNKNOWN_TARGET) & (index != target[:, None]).all(axis=1) & ~np.isnan(target_prob)
    last = np.where(extra, target, -1)
    known = np.where(extra, target_prob, 0).astype(np.float32)
    all_index = np.concatenate([index.astype(np.int64), last[:, None].astype(np.int64)], axis=1)
    all_prob = np.concatenate([prob.astype(np.float32), known[:, None]], axis=1)
    cut = np.maximum(1 - all_prob.sum(axis=1), 0)
    others = num_classes - index.shape[1] - extra
    rest = np.where(others > 0, cut / np.maximum(others, 1), 0).astype(np.float32)
    return _Told(all_index, all_prob, rest, cut)


def _mean(
    told: Sequence[_Told], shares: npt.NDArray[np.float32], top_k: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float16], npt.NDArray[np.float32]]:
    candidates = np.concatenate([one.index for one in told], axis=1)
    earlier = np.tril(np.ones((candidates.shape[1],) * 2, np.bool_), -1)
    again = ((candidates[:, :, None] == candidates[:, None, :]) & earlier).any(axis=2)
    mean = np.zeros(candidates.shape, np.float32)
    for one, share in zip(told, shares, strict=True):
        found = candidates[:, :, None] == one.index[:, None, :]
        said = np.where(found, one.prob[:, None, :], 0).sum(axis=2)
        mean += share * np.where(found.any(axis=2), said, one.rest[:, None])
    stored = mean.astype(np.float16)
    # As labels.soft_labels ranks: by the stored bits, ties by class.
    rank = stored.view(np.int16).astype(np.int64) << CLASS_BITS
    rank += (1 << CLASS_BITS) - 1 - candidates
    rank[again | (candidates < 0)] = -1
    best = np.argsort(-rank, axis=1, kind="stable")[:, :top_k]
    cut = sum(share * one.cut for one, share in zip(told, shares, strict=True))
    return (
        np.take_along_axis(candidates, best, axis=1),
        np.take_along_axis(stored, best, axis=1),
        np.asarray(cut, np.float32),
    )


class EnsembleLabels(LabelSet):
    """Several label sets of the same crops, read as one: blocks are merged as they are read."""

    def __init__(self, sets: Sequence[LabelSet], weights: Sequence[float] | None) -> None:
        first = sets[0]
        self.sets = tuple(sets)
        self.shares = ensemble_shares(sets, weights)
        for labels in sets[1:]:
            check_same_classes(first, labels)
            _check_same_shards(first, labels)
        manifest = first.manifest.model_copy(
            update={
                "teachers": combined_teachers(sets, weights),
                "ensemble": "mean",
                "top_k": max(labels.top_k for labels in sets),
                "statistics": Statistics(),
            }
        )
        told = "".join(f"{labels.identity}{share!r}" for labels, share in zip(sets, self.shares, strict=True))
        identity = hashlib.sha256(told.encode()).hexdigest()
        super().__init__(first.files, manifest, first.num_crops, identity, first.verify_labels)

    @property
    def location(self) -> str:
        return " + ".join(labels.location for labels in self.sets)

    @property
    def is_local(self) -> bool:
        return all(labels.is_local for labels in self.sets)

    @property
    def cache_bytes(self) -> int:
        return min(labels.cache_bytes for labels in self.sets)

    def check_sizes(self) -> None:
        for labels in self.sets:
            labels.check_sizes()

    def verified(self, verify_labels: VerifyLabels) -> Self:
        other = super().verified(verify_labels)
        other.sets = tuple(labels.verified(verify_labels) for labels in self.sets)
        return other

    def block(self, shard: int, block: int) -> ShardLabels:
        return merge_labels(
            [labels.block(shard, block) for labels in self.sets],
            self.shares,
            num_classes=self.num_classes,
            thresholds=self.manifest.thresholds.absolute(),
            where=f"{self.location}: shard {shard}, crop block {block}",
        ).labels

    def raw_block(self, shard: int, block: int) -> ShardLabels:
        return self.block(shard, block)

    def fetch(self, shard: int, block: int) -> None:
        for labels in self.sets:
            labels.fetch(shard, block)

    def keys_of(self, shard: int) -> list[str]:
        return self.sets[0].keys_of(shard)

    def targets_of(self, shard: int) -> npt.NDArray[np.int32]:
        return self.sets[0].targets_of(shard)


def ensemble_shares(sets: Sequence[LabelSet], weights: Sequence[float] | None) -> list[float]:
    """The weight of each label set: as given, or the sum of its teachers'.

    Raises UsageError for weights that are none, or a set whose teachers were combined otherwise than by the mean.
    """
    for labels in sets:
        if len(labels.manifest.teachers) > 1 and labels.manifest.ensemble != "mean":
            raise UsageError(
                f"{labels.location}: its {len(labels.manifest.teachers)} teachers were combined by "
                f"{labels.manifest.ensemble!r}, which cannot be done with teachers of another set; only 'mean' can"
            )
    if weights is None:
        return [sum(teacher.weight for teacher in labels.manifest.teachers) for labels in sets]
    if len(weights) != len(sets) or not all(np.isfinite(weight) and weight > 0 for weight in weights):
        raise UsageError(f"weights must be {len(sets)} positive numbers, one for each label set; got {list(weights)}")
    return [float(weight) for weight in weights]


def combined_teachers(sets: Sequence[LabelSet], weights: Sequence[float] | None) -> tuple[TeacherEntry, ...]:
    """All teachers, their weights such that the ensemble of all is the one of the sets."""
    entries = []
    for labels, share in zip(sets, ensemble_shares(sets, weights), strict=True):
        own = sum(teacher.weight for teacher in labels.manifest.teachers)
        for teacher in labels.manifest.teachers:
            entries.append(teacher.model_copy(update={"weight": teacher.weight * share / own}))
    return tuple(entries)


def check_same_classes(a: LabelSet, b: LabelSet) -> None:
    """Raises LabelSetError where class numbers cannot mean the same."""
    where = f"{a.location} and {b.location}"
    if a.num_classes != b.num_classes:
        raise LabelSetError(f"{where}: num_classes differs: {a.num_classes} and {b.num_classes}")
    if a.class_names and b.class_names and a.class_names != b.class_names:
        number = next(i for i, (x, y) in enumerate(zip(a.class_names, b.class_names, strict=True)) if x != y)
        raise LabelSetError(
            f"{where}: class {number} is {a.class_names[number]!r} in one and {b.class_names[number]!r} in the other"
        )


def _check_same_shards(a: LabelSet, b: LabelSet) -> None:
    for name in ("seed", "crop_distribution", "augmentations", "num_crops", "crops_per_block", "layout"):
        ours, theirs = getattr(a.manifest, name), getattr(b.manifest, name)
        if ours != theirs:
            raise LabelSetError(f"{a.location} and {b.location}: {name} differs: {ours} and {theirs}")
    if [shard.rows for shard in a.manifest.shards] != [shard.rows for shard in b.manifest.shards]:
        raise LabelSetError(
            f"{a.location} and {b.location}: their images are not in the same shards; write them as one with: "
            f"ferkd-data merge {a.location} {b.location} OUT"
        )
