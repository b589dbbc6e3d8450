"""Label sets of the same crops by different teachers, combined as they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from ferkd_data.errors import LabelSetError, UsageError
from ferkd_data.label_set.label_set import VerifyLabels
from ferkd_data.label_set.views import LabelSet
from ferkd_data.manifest import TeacherEntry
from ferkd_data.merging import merge_labels
from ferkd_data.shards.columns import ShardLabels
from ferkd_data.statistics import Statistics


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
