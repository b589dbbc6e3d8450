"""Label sets of the same crops by different teachers, combined into their ensemble as they are read.

Each label set knows its kept classes and the probability of the ground truth exactly; what it cut off is spread evenly
over its other classes, as recovery `smooth` does. So the mean is exact for classes that every set kept, and for the
ground truth. Buckets are assigned anew, by the thresholds of the first label set.

Legend: M crops, S label sets, k kept classes, m candidates (all kept classes and the ground truth), C classes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd_data.errors import LabelSetError, UsageError
from ferkd_data.format.manifest import FileEntry, TeacherEntry
from ferkd_data.label_set.reader import RowReader, VerifyLabels
from ferkd_data.labels.buckets import Thresholds, buckets_of
from ferkd_data.labels.rows import UNKNOWN_TARGET, ShardLabels, class_index_dtype, rank_of
from ferkd_data.labels.statistics import Statistics
from ferkd_data.storage import OpenFile

CROPS_AT_ONCE = 16384
SAME_FIELDS = ("image_digest", "height", "width", "target", "boxes", "flip", "operations")


@dataclass(frozen=True, kw_only=True, eq=False)
class Merged:
    """Labels of an ensemble."""

    labels: ShardLabels
    uncertain: npt.NDArray[np.float32]
    """(R, N): upper bound on the error of any probability, compared with a build with all teachers at once."""


def merge_labels(
    parts: Sequence[ShardLabels],
    weights: Sequence[float],
    *,
    num_classes: int,
    thresholds: Thresholds,
    where: str,
) -> Merged:
    """Compute the weighted mean of the distributions of S label sets for the same crops; keep the largest k.

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
    # Comparing the m candidates of a crop with each other takes m * m values: some megabytes at a time.
    for start in range(0, len(target), CROPS_AT_ONCE):
        rows = slice(start, start + CROPS_AT_ONCE)
        members = [
            _with_target(index[rows], prob[rows], target[rows], known[rows], num_classes)
            for (index, prob), known in zip(flat, target_probs, strict=True)
        ]
        pieces.append(_mean(members, shares, top_k))
    class_index, class_prob, uncertain = (np.concatenate(column) for column in zip(*pieces, strict=True))
    # NaN where any of them does not know it: a mean of the others would be no probability of this ensemble.
    target_prob = sum(s * p.astype(np.float32) for s, p in zip(shares, target_probs, strict=True))
    merged = replace(
        first,
        class_index=class_index.astype(class_index_dtype(num_classes)).reshape(*shape, top_k),
        class_prob=class_prob.reshape(*shape, top_k),
        target_prob=np.asarray(target_prob, np.float16).reshape(shape),
    )
    bucket = buckets_of(merged.class_prob, merged.target_prob, thresholds)
    return Merged(labels=replace(merged, bucket=bucket), uncertain=uncertain.reshape(shape))


def check_same_crops(a: ShardLabels, b: ShardLabels, where: str) -> None:
    """Raise LabelSetError that names the first image and field that differ."""
    if list(a.keys) != list(b.keys):
        # Not strict: one may be a prefix of the other, which the default of `next` then says.
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
class _Distributions:
    """The distributions of one label set for M crops: `prob` of `index` (M, k + 1), and `rest` (M,) of any other class.

    The last column is the ground truth where it was not kept, else class -1.
    """

    index: npt.NDArray[np.int64]
    prob: npt.NDArray[np.float32]
    rest: npt.NDArray[np.float32]
    cut: npt.NDArray[np.float32]
    """(M,): the mass of which only the sum is known."""


def _with_target(
    index: npt.NDArray[Any],
    prob: npt.NDArray[np.float16],
    target: npt.NDArray[np.int32],
    target_prob: npt.NDArray[np.float16],
    num_classes: int,
) -> _Distributions:
    # The ground truth is stored apart where it is outside the top k: one more class of which the probability is known.
    extra = (target != UNKNOWN_TARGET) & (index != target[:, None]).all(axis=1) & ~np.isnan(target_prob)
    last = np.where(extra, target, -1)
    known = np.where(extra, target_prob, 0).astype(np.float32)
    all_index = np.concatenate([index.astype(np.int64), last[:, None].astype(np.int64)], axis=1)
    all_prob = np.concatenate([prob.astype(np.float32), known[:, None]], axis=1)
    # Rounding to float16 may take the sum above 1.
    cut = np.maximum(1 - all_prob.sum(axis=1), 0)
    others = num_classes - index.shape[1] - extra
    # Recovery `smooth`: each class that was neither kept nor the ground truth gets the same share of the mass cut off.
    rest = np.where(others > 0, cut / np.maximum(others, 1), 0).astype(np.float32)
    return _Distributions(all_index, all_prob, rest, cut)


def _mean(
    members: Sequence[_Distributions], shares: npt.NDArray[np.float32], top_k: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float16], npt.NDArray[np.float32]]:
    candidates = np.concatenate([one.index for one in members], axis=1)
    # A class that several label sets kept is a candidate once: where an earlier column names it, the later one goes.
    earlier = np.tril(np.ones((candidates.shape[1],) * 2, np.bool_), -1)
    again = ((candidates[:, :, None] == candidates[:, None, :]) & earlier).any(axis=2)
    mean = np.zeros(candidates.shape, np.float32)
    for one, share in zip(members, shares, strict=True):
        found = candidates[:, :, None] == one.index[:, None, :]
        kept = np.where(found, one.prob[:, None, :], 0).sum(axis=2)
        mean += share * np.where(found.any(axis=2), kept, one.rest[:, None])
    stored = mean.astype(np.float16)
    rank = rank_of(stored, candidates)
    # Below every real rank, as bit patterns of probabilities are not negative. -1 stands for "no ground truth to add".
    rank[again | (candidates < 0)] = -1
    best = np.argsort(-rank, axis=1, kind="stable")[:, :top_k]
    cut = sum(share * one.cut for one, share in zip(members, shares, strict=True))
    return (
        np.take_along_axis(candidates, best, axis=1),
        np.take_along_axis(stored, best, axis=1),
        np.asarray(cut, np.float32),
    )


class EnsembleReader:
    """Several label sets of the same crops, read as one: blocks are merged as they are read.

    The files of the first are those of the images and of everything else that the label sets have in common.
    """

    def __init__(self, sets: Sequence[RowReader], weights: Sequence[float] | None) -> None:
        """Raises UsageError for wrong weights, LabelSetError where the label sets do not hold the same crops."""
        first = sets[0]
        self.sets = tuple(sets)
        self.weights = weights
        self.shares = ensemble_shares(sets, weights)
        for labels in sets[1:]:
            check_same_classes(first, labels)
            _check_same_shards(first, labels)
        self.manifest = first.manifest.model_copy(
            update={
                "teachers": combined_teachers(sets, weights),
                "ensemble": "mean",
                "top_k": max(labels.manifest.top_k for labels in sets),
                "statistics": Statistics(),
            }
        )
        self.num_crops = first.num_crops
        # Weights are part of it: caches and saved states of another weighting must not fit.
        parts = "".join(f"{labels.identity}{share!r}" for labels, share in zip(sets, self.shares, strict=True))
        self.identity = hashlib.sha256(parts.encode()).hexdigest()

    def __repr__(self) -> str:
        manifest = self.manifest
        return (
            f"LabelSet({self.location!r}, images={manifest.num_images}, crops={self.num_crops}, top_k={manifest.top_k})"
        )

    @property
    def statistics(self) -> None:
        return None

    @property
    def location(self) -> str:
        return " + ".join(labels.location for labels in self.sets)

    @property
    def is_local(self) -> bool:
        return all(labels.is_local for labels in self.sets)

    @property
    def cache_bytes(self) -> int:
        return min(labels.cache_bytes for labels in self.sets)

    @property
    def is_verified(self) -> bool:
        return all(labels.is_verified for labels in self.sets)

    def block(self, shard: int, block: int) -> ShardLabels:
        return merge_labels(
            [labels.block(shard, block) for labels in self.sets],
            self.shares,
            num_classes=self.manifest.num_classes,
            thresholds=self.manifest.thresholds.absolute(),
            where=f"{self.location}: shard {shard}, crop block {block}",
        ).labels

    def raw_block(self, shard: int, block: int) -> ShardLabels:
        return self.block(shard, block)

    def keys_of(self, shard: int, block: int = 0) -> list[str]:
        return self.sets[0].keys_of(shard, block)

    def targets_of(self, shard: int, block: int = 0) -> npt.NDArray[np.int32]:
        return self.sets[0].targets_of(shard, block)

    def image_locations(self, shard: int) -> npt.NDArray[np.int64]:
        return self.sets[0].image_locations(shard)

    def fetch(self, shard: int, block: int) -> None:
        for labels in self.sets:
            labels.fetch(shard, block)

    def check_size(self, shard: int, block: int) -> None:
        for labels in self.sets:
            labels.check_size(shard, block)

    def open(self, entry: FileEntry, *, check: bool = True) -> OpenFile:
        return self.sets[0].open(entry, check=check)

    def verified(self, verify_labels: VerifyLabels) -> EnsembleReader:
        return EnsembleReader([labels.verified(verify_labels) for labels in self.sets], self.weights)


def ensemble_shares(sets: Sequence[RowReader], weights: Sequence[float] | None) -> list[float]:
    """Return the weight of each label set: as given, or the sum of its teachers' weights.

    Raises UsageError for impossible weights, or a set whose teachers were combined otherwise than by the mean.
    """
    for labels in sets:
        # A mean of means is a mean of all teachers. The other modes need every class, of which the top k alone are
        # stored.
        if len(labels.manifest.teachers) > 1 and labels.manifest.ensemble != "mean":
            raise UsageError(
                f"{labels.location}: its {len(labels.manifest.teachers)} teachers were combined by "
                f"{labels.manifest.ensemble!r}, which cannot be done with teachers of another set; only 'mean' can"
            )
    if weights is None:
        return [sum(teacher.weight for teacher in labels.manifest.teachers) for labels in sets]
    given: Sequence[Any] = weights
    if len(given) != len(sets) or not all(isinstance(w, Real) and 0 < float(w) < math.inf for w in given):
        raise UsageError(f"weights must be {len(sets)} positive numbers, one for each label set; got {list(weights)}")
    return [float(weight) for weight in weights]


def combined_teachers(sets: Sequence[RowReader], weights: Sequence[float] | None) -> tuple[TeacherEntry, ...]:
    """Return all teachers, weighted so that their ensemble is that of the label sets."""
    entries = []
    for labels, share in zip(sets, ensemble_shares(sets, weights), strict=True):
        own = sum(teacher.weight for teacher in labels.manifest.teachers)
        for teacher in labels.manifest.teachers:
            # Scaled so that a set's teachers add up to its share: an ensemble built at once with these weights is the
            # same.
            entries.append(teacher.model_copy(update={"weight": teacher.weight * share / own}))
    return tuple(entries)


def check_same_classes(a: RowReader, b: RowReader) -> None:
    """Raise LabelSetError where class numbers cannot mean the same."""
    where = f"{a.location} and {b.location}"
    ours, theirs = a.manifest, b.manifest
    if ours.num_classes != theirs.num_classes:
        raise LabelSetError(f"{where}: num_classes differs: {ours.num_classes} and {theirs.num_classes}")
    if ours.class_names and theirs.class_names and ours.class_names != theirs.class_names:
        # Strict: both have num_classes names, which the manifest's own check says.
        pairs = enumerate(zip(ours.class_names, theirs.class_names, strict=True))
        number, (x, y) = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
        raise LabelSetError(f"{where}: class {number} is {x!r} in one and {y!r} in the other")


def _check_same_shards(a: RowReader, b: RowReader) -> None:
    for name in ("seed", "crop_distribution", "crop_kinds", "augmentations", "num_crops", "crops_per_block", "layout"):
        ours, theirs = getattr(a.manifest, name), getattr(b.manifest, name)
        if ours != theirs:
            raise LabelSetError(f"{a.location} and {b.location}: {name} differs: {ours} and {theirs}")
    if [shard.rows for shard in a.manifest.shards] != [shard.rows for shard in b.manifest.shards]:
        raise LabelSetError(
            f"{a.location} and {b.location}: their images are not in the same shards; write them as one with: "
            f"ferkd-data merge {a.location} {b.location} OUT"
        )
