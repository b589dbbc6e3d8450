"""Compare two label sets of the same images, crop by crop.

Legend: M crops, k kept classes of one set, m of both together, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd_data import rng
from ferkd_data.errors import LabelSetError
from ferkd_data.label_set import LabelSet, check_same_classes, open_labels
from ferkd_data.labels.rows import UNKNOWN_TARGET, ShardLabels
from ferkd_data.report.collect import OnImages
from ferkd_data.report.samples import Smallest
from ferkd_data.targets import recover

CROPS_AT_ONCE = 16384
SMALLEST_PROB = 1e-7
"""Lower bound of probabilities in a KL divergence; the smallest number above 0 in float16 is about this large."""
SAME_KL = 1e-4
"""KL divergence in nats below which labels differ by rounding only."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A crop on which two label sets differ."""

    key: str
    crop: int
    """Number of the crop in its image."""
    kl: float
    """KL divergence of B's label from A's, KL(A || B), in nats."""
    named_a: int
    """A's most probable class."""
    named_b: int
    """B's most probable class."""
    p_max_a: float
    """Probability of A's most probable class."""
    p_max_b: float
    """Probability of B's most probable class."""
    target: int
    """Ground-truth class; -1 where it is unknown."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Result of `compare`: two label sets A and B on the crops that both have.

    Shares are in 0..1. Shares and means are None where they are of no crops: without common crops, or without a ground
    truth. The ground truth is A's, or B's where A has none.

    >>> result = fd.compare(labels, labels)
    >>> result.images == len(labels), result.only_a, result.mean_kl, result.most_different
    (True, 0, 0.0, ())
    """

    a: str
    """Folder or URL of A."""
    b: str
    """Folder or URL of B."""
    images: int
    """Images in both."""
    only_a: int
    """Images in A alone."""
    only_b: int
    """Images in B alone."""
    crops: int
    """Crops in both: the same box of the same image, with the same flip and recorded operations. All further numbers
    are about these."""
    other_crops: int
    """Crops of common images that are not compared, since their boxes, flips or recorded operations differ."""
    same_top1: float | None
    """Share of the crops with the same most probable class."""
    right_a: float | None
    """Share of the crops with a ground truth whose most probable class in A it is."""
    right_b: float | None
    """Share of the crops with a ground truth whose most probable class in B it is."""
    only_a_right: float | None
    """Share of the crops with a ground truth that A names and B does not."""
    only_b_right: float | None
    """Share of the crops with a ground truth that B names and A does not."""
    mean_p_max_a: float | None
    """Mean over crops of A's largest probability."""
    mean_p_max_b: float | None
    """Mean over crops of B's largest probability."""
    mean_kl: float | None
    """Mean over crops of KL(A || B) in nats, with both labels recovered by `smooth`."""
    bucket_moves: tuple[tuple[int, ...], ...]
    """4 x 4 counts: entry [i][j] are the crops in bucket i of A and bucket j of B, each by its own thresholds."""
    most_different: tuple[Difference, ...]
    """Crops with the largest KL divergence, at most one of each image, in falling order."""


def compare(
    a: LabelSet | str | Path, b: LabelSet | str | Path, *, examples: int = 10, on_progress: OnImages | None = None
) -> Comparison:
    """Compare two label sets of the same images: other teachers, thresholds or crops.

    `a` and `b` are opened label sets, folders or URLs. Images are joined by key; where the order differs, 16 bytes of
    memory are used for each image of B. Crops are compared where both sets have the same crop of the same image: box,
    flip and recorded operations. The number of crops may differ: with the same seed, the first ones are the same.
    `examples` is the number of crops returned in `most_different`. `on_progress` is called with (images done, images in
    A).

    Raises LabelSetError where the classes differ, or no image is in both.

    >>> fd.compare(labels, labels).same_top1
    1.0
    """
    first = a if isinstance(a, LabelSet) else open_labels(a)
    second = b if isinstance(b, LabelSet) else open_labels(b)
    check_same_classes(first, second)
    sums = _Sums(num_classes=first.num_classes, worst=Smallest[Difference](examples))
    for ours, theirs in _pairs(first, second):
        sums.add(ours, theirs)
        if on_progress:
            on_progress(sums.images, len(first))
    if not sums.images:
        raise LabelSetError(
            f"{first.location} and {second.location}: no image is in both; keys look like "
            f"{next(first.keys(), '')!r} in one and {next(second.keys(), '')!r} in the other"
        )
    return sums.comparison(first, second)


def _pairs(a: LabelSet, b: LabelSet) -> Iterator[tuple[ShardLabels, ShardLabels]]:
    """Yield rows of A and B with the same keys, in A's order, with as many crops as both have."""
    # With the same seed, the first crops are the same, whatever the number.
    num_crops = min(a.num_crops, b.num_crops)
    index: _Index | None = None
    for entry in a.manifest.shards:
        if not entry.rows:
            continue
        ours = a.shard(entry.index).crop_range(0, num_crops)
        # Two builds of one source have the same shards, and need no index.
        alike = entry.index < len(b.manifest.shards) and b.manifest.shards[entry.index].rows == entry.rows
        if alike and b.keys_of(entry.index) == list(ours.keys):
            yield ours, b.shard(entry.index).crop_range(0, num_crops)
        else:
            index = index or _Index(b)
            yield from index.joined(ours, num_crops)


class _Index:
    """Index of a label set's rows by key: 16 bytes for each image."""

    def __init__(self, labels: LabelSet) -> None:
        self._labels = labels
        hashes = labels.key_hashes()
        self._rows = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._rows]

    def joined(self, ours: ShardLabels, num_crops: int) -> Iterator[tuple[ShardLabels, ShardLabels]]:
        """Yield those of our rows that the label set has too, shard by shard of it, so that each shard is read once."""
        wanted = rng.hashes64(ours.keys)
        at, there = rng.find_hashes(self._hashes, wanted)
        found = np.flatnonzero(there)
        theirs = self._rows[at[found]]
        shards = np.searchsorted(self._labels.first_row, theirs, side="right") - 1
        for shard in np.unique(shards).tolist():
            here = shards == shard
            rows, others = found[here], theirs[here] - self._labels.first_row[shard]
            other = self._labels.shard(shard).crop_range(0, num_crops)
            # Different keys may have the same hash.
            pairs = zip(rows.tolist(), others.tolist(), strict=True)
            same = np.array([ours.keys[row] == other.keys[at] for row, at in pairs])
            if same.any():
                yield ours.take(rows[same]), other.take(others[same])


@dataclass(kw_only=True)
class _Sums:
    num_classes: int
    worst: Smallest[Difference]
    images: int = 0
    crops: int = 0
    others: int = 0
    known: int = 0
    same: int = 0
    right: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, 2), np.int64))
    """Crops with a ground truth, counted by (A names it, B names it)."""
    p_max: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    kl: float = 0.0
    moves: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((4, 4), np.int64))

    def add(self, a: ShardLabels, b: ShardLabels) -> None:
        self.images += len(a)
        same_crop = (a.boxes == b.boxes).all(axis=2) & (a.flip == b.flip)
        # With other recorded operations, the teachers saw another picture. Sets of different augmentations may differ
        # in the number of operations, and then have no crop in common.
        same_crop &= a.operations.shape == b.operations.shape and (a.operations == b.operations).all(axis=2)
        # The same key may name another version of the image. Zeros stand for an image that was not hashed.
        hashed = a.image_digest.any(axis=1) & b.image_digest.any(axis=1)
        same_crop &= ((a.image_digest == b.image_digest).all(axis=1) | ~hashed)[:, None]
        self.others += int((~same_crop).sum())
        rows, crops = np.nonzero(same_crop)
        # The divergence compares k classes with k for each crop: some at a time.
        for at in range(0, len(rows), CROPS_AT_ONCE):
            self._add_crops(a, b, rows[at : at + CROPS_AT_ONCE], crops[at : at + CROPS_AT_ONCE])

    def _add_crops(self, a: ShardLabels, b: ShardLabels, rows: Any, crops: Any) -> None:
        target = np.where(a.target == UNKNOWN_TARGET, b.target, a.target)[rows].astype(np.int64)
        top_a, top_b = (labels.class_index[rows, crops, 0].astype(np.int64) for labels in (a, b))
        known = target != UNKNOWN_TARGET
        self.crops += len(rows)
        self.known += int(known.sum())
        self.same += int((top_a == top_b).sum())
        # np.add.at counts repeated indices, which `+=` with an index does not.
        np.add.at(self.right, ((top_a == target)[known].astype(int), (top_b == target)[known].astype(int)), 1)
        p_max = [labels.class_prob[rows, crops, 0].astype(np.float64) for labels in (a, b)]
        self.p_max += [values.sum() for values in p_max]
        np.add.at(self.moves, (a.bucket[rows, crops], b.bucket[rows, crops]), 1)
        kl = divergence(
            (a.class_index[rows, crops], a.class_prob[rows, crops]),
            (b.class_index[rows, crops], b.class_prob[rows, crops]),
            self.num_classes,
        )
        self.kl += float(kl.sum())
        # The crop of each image that differs most: sorted by row, then by falling KL, it is the first of its row.
        order = np.lexsort((crops, -kl, rows))
        firsts = order[np.flatnonzero(np.diff(rows[order], prepend=-1))]
        for at in firsts[np.argsort(-kl[firsts], kind="stable")].tolist():
            # Sorted by falling KL: none that follows can enter.
            if -kl[at] >= self.worst.bound or kl[at] < SAME_KL:
                break
            difference = Difference(
                key=a.keys[rows[at]], crop=int(crops[at]), kl=float(kl[at]), named_a=int(top_a[at]),
                named_b=int(top_b[at]), p_max_a=float(p_max[0][at]), p_max_b=float(p_max[1][at]),
                target=int(target[at]),
            )  # fmt: skip
            self.worst.add(-difference.kl, difference.key, difference.crop, lambda kept=difference: kept)  # type: ignore[misc]

    def comparison(self, a: LabelSet, b: LabelSet) -> Comparison:
        right = self.right.tolist()
        return Comparison(
            a=a.location,
            b=b.location,
            images=self.images,
            only_a=len(a) - self.images,
            only_b=len(b) - self.images,
            crops=self.crops,
            other_crops=self.others,
            same_top1=_ratio(self.same, self.crops),
            right_a=_ratio(sum(right[1]), self.known),
            right_b=_ratio(right[0][1] + right[1][1], self.known),
            only_a_right=_ratio(right[1][0], self.known),
            only_b_right=_ratio(right[0][1], self.known),
            mean_p_max_a=_ratio(float(self.p_max[0]), self.crops),
            mean_p_max_b=_ratio(float(self.p_max[1]), self.crops),
            mean_kl=_ratio(self.kl, self.crops),
            bucket_moves=tuple(tuple(row) for row in self.moves.tolist()),
            most_different=tuple(self.worst.items()),
        )


def _ratio(total: float, crops: int) -> float | None:
    return total / crops if crops else None


Labels = tuple[npt.NDArray[Any], npt.NDArray[Any]]
"""Class numbers and probabilities, each (M, k)."""


def divergence(a: Labels, b: Labels, num_classes: int) -> npt.NDArray[np.float64]:
    """Compute KL(A || B) of each of M crops over all C classes, in nats: (M,). Both are recovered by `smooth` first.

    `smooth` spreads the rest of the probability evenly, so all classes that neither set keeps have equal terms: one
    term times their number.
    """
    weight_a, floor_a = _recovered(a[1], num_classes)
    weight_b, floor_b = _recovered(b[1], num_classes)
    index_a, index_b = a[0].astype(np.int64), b[0].astype(np.int64)
    a_at_a, b_at_b = weight_a + floor_a, weight_b + floor_b
    # (M, k, k): which class of A is which of B. Each matches at most one, so the sums pick the other side's weight.
    match = index_a[:, :, None] == index_b[:, None, :]
    b_at_a = floor_b + (match * weight_b[:, None, :]).sum(axis=2)
    a_at_b = floor_a + (match * weight_a[:, :, None]).sum(axis=1)
    only_b = ~match.any(axis=1)
    terms = _term(a_at_a, b_at_a).sum(axis=1) + (_term(a_at_b, b_at_b) * only_b).sum(axis=1)
    others = num_classes - index_a.shape[1] - only_b.sum(axis=1)
    total: npt.NDArray[np.float64] = terms + others * _term(floor_a, floor_b)[:, 0]
    # KL is never negative; rounding may take it just below.
    return np.maximum(total, 0)


def _recovered(prob: npt.NDArray[Any], num_classes: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    weight, floor = recover(prob, num_classes=num_classes)
    return weight.astype(np.float64), floor.astype(np.float64)[:, None]


def _term(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    # A weight plus the floor may be -1e-9 where a class is stored as 0.
    p = np.maximum(p, 0)
    term: npt.NDArray[np.float64] = p * np.log(np.maximum(p, SMALLEST_PROB) / np.maximum(q, SMALLEST_PROB))
    return term
