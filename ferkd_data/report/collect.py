"""Collect everything that a report shows, in one pass over a label set.

Only sums and samples of fixed size are kept, so memory does not grow with the number of images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ferkd_data.crop_kinds import CropKind, kind_starts
from ferkd_data.format.rejects import read_rejects
from ferkd_data.images import Reject
from ferkd_data.label_set import LabelSet
from ferkd_data.labels.rows import UNKNOWN_TARGET, ShardLabels
from ferkd_data.labels.statistics import Statistics, add, shard_statistics
from ferkd_data.report.samples import Crop, CropSample, SampledImage, Smallest, priorities, sampled
from ferkd_data.report.sketch import POSITIVE, Sketch
from ferkd_data.report.suspects import SuspectList
from ferkd_data.report.temperatures import TemperatureSample

DIGESTS_KEPT = 2**20
"""Digests that are compared to find duplicates: 20 MB."""
DTYPE = np.dtype([("digest", "<u8"), ("row", "<i8"), ("target", "<i4")])


class Duplicates:
    """Find images with the same bytes by their digests, in bounded memory.

    Beyond `capacity` digests, only those whose last bits are 0 are compared. That is a random share of the *digests*:
    both copies of an image are in it or neither is, so counts can be scaled up.
    """

    def __init__(self, capacity: int = DIGESTS_KEPT) -> None:
        self._capacity = capacity
        self._kept = np.empty(0, DTYPE)
        self._waiting: list[npt.NDArray[np.void]] = []
        self._num_waiting = 0
        self._bits = 0
        self._row = 0

    def add(self, labels: ShardLabels) -> None:
        """Add a shard. Rows are numbered in the order in which shards are added."""
        found = np.empty(len(labels), DTYPE)
        # 8 of 16 bytes: two different images of 10**6 have the same ones with a probability of 3e-8.
        found["digest"] = np.ascontiguousarray(labels.image_digest[:, :8]).view("<u8")[:, 0]
        found["row"] = np.arange(self._row, self._row + len(labels))
        found["target"] = labels.target
        self._row += len(labels)
        # A digest of zeros stands for an image that was not hashed.
        found = found[labels.image_digest.any(axis=1)]
        # Joined when there are many: joining with every shard would copy all that is kept each time.
        self._waiting.append(found[self._chosen(found)])
        self._num_waiting += len(self._waiting[-1])
        if len(self._kept) + self._num_waiting > self._capacity:
            self._shrink()

    @property
    def share(self) -> float:
        """Share of the digests that were compared, in 0..1."""
        return float(2.0**-self._bits)

    def groups(self) -> list[npt.NDArray[np.void]]:
        """Group the rows of each image that occurs more than once among the compared digests, in row order."""
        self._gather()
        # Sorted by digest, then by row, copies stand side by side; a new digest starts a group.
        order = np.lexsort((self._kept["row"], self._kept["digest"]))
        ranked = self._kept[order]
        starts = np.flatnonzero(np.concatenate([[True], ranked["digest"][1:] != ranked["digest"][:-1]]))
        groups = [part for part in np.split(ranked, starts[1:]) if len(part) > 1]
        return sorted(groups, key=lambda part: int(part["row"][0]))

    def _gather(self) -> None:
        self._kept = np.concatenate([self._kept, *self._waiting])
        self._waiting, self._num_waiting = [], 0

    def _shrink(self) -> None:
        self._gather()
        # Each further bit halves the share of digests that are compared; a digest that was dropped never comes back.
        while len(self._kept) > self._capacity:
            self._bits += 1
            self._kept = self._kept[self._chosen(self._kept)]

    def _chosen(self, found: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
        chosen: npt.NDArray[np.bool_] = (found["digest"] & np.uint64(2**self._bits - 1)) == 0
        return chosen


SHEET_CROPS = 14
"""Crops shown for each bucket."""
STRATA, STRATUM_CROPS = 40, 3
"""Bins of p_max, and crops sampled from each: the page shows those that change bucket as a threshold moves."""
IMAGES_SHOWN = 6
EXAMPLES = 8
DUPLICATES_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class DuplicateGroup:
    """Images with the same bytes; at most EXAMPLES of them, first one of each ground truth."""

    keys: tuple[str, ...]
    targets: tuple[int, ...]
    images: int
    """Number of images in all."""
    conflict: bool
    """Whether two of the images have different ground truths."""


@dataclass(kw_only=True)
class Collected:
    """Result of the pass."""

    sketch: Sketch
    kinds: list[tuple[CropKind, Statistics]]
    """Statistics of the crops of each kind; empty where there are no crop kinds."""
    sheets: list[list[Crop]]
    """Sampled crops by bucket."""
    wrong: list[Crop]
    """Sampled crops that are confident but wrong."""
    strata: list[Crop]
    """Crops spread over the range of p_max, in rising order."""
    images: list[SampledImage]
    """Sampled images."""
    suspects: SuspectList
    temperatures: TemperatureSample
    discarded_images: list[SampledImage]
    """Examples of images whose crops are all extreme hard."""
    smallest_images: list[SampledImage]
    duplicates: list[DuplicateGroup]
    duplicate_groups: float
    """Number of groups; an estimate where not all images were compared."""
    duplicate_conflicts: float
    """Number of groups whose copies have different ground truths; an estimate likewise."""
    duplicates_compared: float = 1.0
    """Share of the images that were compared: below 1 where there are more than digests are kept."""
    rejects: Counter[str] = field(default_factory=Counter)
    reject_examples: dict[str, list[Reject]] = field(default_factory=dict)


class Collector:
    """Accumulator of a label set's shards. `finish` returns the result so far, also in between."""

    def __init__(self, labels: LabelSet) -> None:
        self._seed = labels.manifest.seed
        self._kinds = labels.crop_kinds
        self._of_kinds = [Statistics() for _ in self._kinds]
        self._sketch = Sketch(num_classes=labels.num_classes, top_k=labels.top_k, num_crops=labels.num_crops)
        self._sheets = CropSample(POSITIVE + 2, SHEET_CROPS)
        self._wrong = CropSample(1, SHEET_CROPS)
        self._strata = CropSample(STRATA, STRATUM_CROPS)
        self._images = Smallest[SampledImage](IMAGES_SHOWN)
        self._discarded = Smallest[SampledImage](EXAMPLES)
        self._smallest = Smallest[SampledImage](EXAMPLES)
        thresholds = labels.manifest.thresholds
        self._suspects = SuspectList(labels.num_classes, thresholds.mid if thresholds.confidence == "target" else None)
        self._duplicates = Duplicates()
        self._temperatures = TemperatureSample(labels.num_classes)
        self._rejects: Counter[str] = Counter()
        self._reject_examples: dict[str, list[Reject]] = {}

    def add(self, labels: ShardLabels) -> None:
        """Count a shard's rows and sample from them."""
        first_row = self._sketch.images
        self._sketch.add(labels)
        for number, (kind, start) in enumerate(zip(self._kinds, kind_starts(self._kinds), strict=True)):
            part = labels.crop_range(start, start + kind.crops)
            self._of_kinds[number] = add([self._of_kinds[number], shard_statistics(part)])
        self._suspects.add(labels, first_row)
        self._duplicates.add(labels)
        # Crops and images have priorities of their own, so that showing more of the ones does not change the others.
        crop, image = priorities(labels, self._seed)
        self._sheets.add(labels, first_row, crop, labels.bucket.astype(np.int64))
        self._temperatures.add(labels, crop)
        p_max = labels.class_prob[..., 0].astype(np.float32)
        # p_max = 1 belongs to the last bin.
        self._strata.add(labels, first_row, crop, np.minimum((p_max * STRATA).astype(np.int64), STRATA - 1))
        target = labels.target[:, None]
        wrong = (labels.bucket >= POSITIVE) & (target != UNKNOWN_TARGET) & (labels.class_index[..., 0] != target)
        self._wrong.add(labels, first_row, crop, np.where(wrong, 0, -1))
        sides = np.minimum(labels.height, labels.width).astype(np.float64)
        unused = (labels.bucket == 0).all(axis=1)
        for sample, rank in (
            (self._images, image),
            # `image` is below 1: it only orders images of the same side, at random and always alike.
            (self._smallest, sides + image),
            (self._discarded, np.where(unused, image, np.inf)),
        ):
            _add_images(sample, labels, first_row, rank)

    def add_reject(self, reject: Reject) -> None:
        """Count an image that could not be used."""
        self._rejects[reject.reason] += 1
        examples = self._reject_examples.setdefault(reject.reason, [])
        if len(examples) < EXAMPLES:
            examples.append(reject)

    def finish(self, labels: LabelSet) -> Collected:
        """Return the result of the shards so far; `labels` holds the same shards in the order in which they were added.

        Raises ShardError or RemoteError where the keys of duplicates, which are read again, cannot be read.
        """
        groups = self._duplicates.groups()
        conflicts = [group for group in groups if _in_conflict(group)]
        # Copies under different ground truths first: one of them is wrong.
        shown = [*conflicts, *(group for group in groups if not _in_conflict(group))][:DUPLICATES_SHOWN]
        return Collected(
            sketch=self._sketch,
            kinds=list(zip(self._kinds, self._of_kinds, strict=True)),
            sheets=self._sheets.crops(),
            wrong=self._wrong.crops()[0],
            strata=sorted((crop for group in self._strata.crops() for crop in group), key=lambda crop: crop.p_max),
            images=self._images.items(),
            suspects=self._suspects,
            temperatures=self._temperatures,
            discarded_images=self._discarded.items(),
            smallest_images=self._smallest.items(),
            duplicates=[_named(labels, group) for group in shown],
            # Scaled up from the share of digests that was compared.
            duplicate_groups=len(groups) / self._duplicates.share,
            duplicate_conflicts=len(conflicts) / self._duplicates.share,
            duplicates_compared=self._duplicates.share,
            rejects=self._rejects,
            reject_examples=self._reject_examples,
        )


OnImages = Callable[[int, "int | None"], None]
"""Function that is called with (images done, images in all)."""


def collect(labels: LabelSet, on_progress: OnImages | None = None) -> Collected:
    """Read every shard and the rejects once. Raises ShardError or RemoteError where one cannot be read."""
    collector, done = Collector(labels), 0
    for shard in labels.shards():
        collector.add(shard)
        done += len(shard)
        if on_progress:
            on_progress(done, len(labels))
    if labels.manifest.rejects.rows:
        with labels.open(labels.manifest.rejects) as file:
            for reject in read_rejects(file.path):
                collector.add_reject(reject)
    return collector.finish(labels)


def _add_images(
    sample: Smallest[SampledImage], labels: ShardLabels, first_row: int, rank: npt.NDArray[np.float64]
) -> None:
    # No more than EXAMPLES of one shard can stay.
    for row in np.argsort(rank, kind="stable")[:EXAMPLES].tolist():
        if np.isfinite(rank[row]):
            sample.add(float(rank[row]), labels.keys[row], 0, lambda row=row: sampled(labels, row, first_row))  # type: ignore[misc]


def _in_conflict(group: npt.NDArray[np.void]) -> bool:
    """Whether copies have different ground truths. An unlabelled copy contradicts none."""
    return len(np.unique(group["target"][group["target"] != UNKNOWN_TARGET])) > 1


def _named(labels: LabelSet, group: npt.NDArray[np.void]) -> DuplicateGroup:
    # One of each ground truth first: of many copies, the one that differs may be the last.
    firsts = np.sort(np.unique(group["target"], return_index=True)[1])
    examples = group[np.concatenate([firsts, np.delete(np.arange(len(group)), firsts)])[:EXAMPLES]]
    keys = []
    for row in examples["row"].tolist():
        shard, at = labels.position(row)
        keys.append(labels.keys_of(shard)[at])
    return DuplicateGroup(
        keys=tuple(keys),
        targets=tuple(examples["target"].tolist()),
        images=len(group),
        conflict=_in_conflict(group),
    )
