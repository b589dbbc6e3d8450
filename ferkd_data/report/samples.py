"""Crops and images picked out of a label set by a rule that depends on the seed and their keys alone.

Each crop has a priority, a hash of (seed, key, crop number); of every group those with the smallest priorities are
kept. So the same label set gives the same samples, in whatever order its shards are read, and memory stays flat.

Images whose ground truth looks wrong: most of their crops are confidently named otherwise.

A crop is confident if it is in one of the two positive buckets, that is, from the second stored threshold up. Labels
alone decide: neither the name of a file nor that of its folder is looked at.
"""

from __future__ import annotations

import csv
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from ferkd_data import rng
from ferkd_data.labels.rows import CROP_FIELDS, UNKNOWN_TARGET, ImageLabels, ShardLabels
from ferkd_data.report.sketch import POSITIVE
from ferkd_data.storage import write_atomically

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledImage(ImageLabels):
    """A row of its own memory, with its place in the label set."""

    row: int
    """Row number, counted over the shards in the order in which they were added."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Crop:
    """One crop with all that is known of it."""

    image: SampledImage
    number: int

    @property
    def p_max(self) -> float:
        return float(self.image.class_prob[self.number, 0])

    @property
    def top1(self) -> int:
        return int(self.image.class_index[self.number, 0])


class Smallest(Generic[Item]):
    """Keeps the `capacity` items of the smallest ranks, whatever the order in which they come."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        # The largest rank on top. Keys break ties, so that items are never compared.
        self._heap: list[tuple[float, str, int, int, Item]] = []
        self._seen = 0

    @property
    def bound(self) -> float:
        """An item of this rank or a larger one would not be kept."""
        if len(self._heap) < self._capacity:
            return float("inf")
        return -self._heap[0][0] if self._heap else float("-inf")

    def add(self, rank: float, key: str, number: int, make: Callable[[], Item]) -> None:
        if rank < self.bound:
            # A damaged label set may hold a key twice; the count keeps items from being compared then too.
            self._seen += 1
            entry = (-rank, key, number, self._seen, make())
            if len(self._heap) < self._capacity:
                heapq.heappush(self._heap, entry)
            else:
                heapq.heappushpop(self._heap, entry)

    def items(self) -> list[Item]:
        """The smallest rank first."""
        return [entry[4] for entry in sorted(self._heap, key=lambda entry: (-entry[0], entry[1], entry[2]))]


class CropSample:
    """Of each group, `capacity` crops of the smallest priorities."""

    def __init__(self, num_groups: int, capacity: int) -> None:
        self._capacity = capacity
        self._groups = [Smallest[Crop](capacity) for _ in range(num_groups)]

    def add(
        self, labels: ShardLabels, first_row: int, priority: npt.NDArray[np.float64], group: npt.NDArray[np.int64]
    ) -> None:
        """`priority` and `group` are (R, N); crops whose group is negative belong to none."""
        bounds = np.array([kept.bound for kept in self._groups] + [-1.0])
        alive = np.flatnonzero(priority < bounds[np.maximum(group, -1)])
        groups, ranks = group.reshape(-1)[alive], priority.reshape(-1)[alive]
        for number in np.unique(groups).tolist():
            here = np.flatnonzero(groups == number)
            if len(here) > self._capacity:
                here = here[np.argpartition(ranks[here], self._capacity)[: self._capacity]]
            for at in alive[here].tolist():
                row, crop = divmod(at, labels.num_crops)
                make = _maker(labels, row, crop, first_row)
                self._groups[number].add(float(priority[row, crop]), labels.keys[row], crop, make)

    def crops(self) -> list[list[Crop]]:
        """By group, the smallest priority first."""
        return [group.items() for group in self._groups]


def _maker(labels: ShardLabels, row: int, crop: int, first_row: int) -> Callable[[], Crop]:
    return lambda: Crop(image=sampled(labels, row, first_row), number=crop)


def sampled(labels: ShardLabels, row: int, first_row: int) -> SampledImage:
    """A copy of a row, which does not keep its shard in memory; `first_row` is the number of the shard's first row."""
    image = labels[row]
    return SampledImage(
        key=image.key,
        image_digest=image.image_digest,
        height=image.height,
        width=image.width,
        target=image.target,
        row=first_row + row,
        **{name: getattr(image, name).copy() for name in CROP_FIELDS},
    )


def priorities(labels: ShardLabels, seed: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """In [0, 1): (R, N) of the crops and (R,) of their images."""
    image = rng.mix64(rng.hashes64(labels.keys) ^ np.uint64(rng.hash64("report", seed)))
    crop = np.arange(labels.num_crops, dtype=np.uint64)[None]
    return rng.uniforms(rng.counter64(image[:, None], crop)), rng.uniforms(image)


MIN_SHARE = 0.5
"""Of an image's crops: so many must be confidently named otherwise."""
SUSPECTS_KEPT = 1000
SURE_SHARE, SURE_P_MAX = 0.8, 0.5
"""The ground truth is surely wrong where at least so many of the crops name one other class, with this mean p_max."""
SURE_TRUTH_MOST = 0.05
"""Upper limit of the label's mean probability for that; with many classes it is twice chance, see `sure_below`."""
SURE_SHOWN, RELATED_SHOWN = 24, 24
"""Images of each group that a report shows."""


def sure_below(num_classes: int) -> float:
    """Return the label's mean probability below which it may count as surely wrong: 0.002 for 1,000 classes."""
    return min(SURE_TRUTH_MOST, 2 / num_classes)


@dataclass(frozen=True, kw_only=True, eq=False)
class Suspect:
    image: SampledImage
    suggested: int
    """The class that most of the confident crops name."""
    crops: int
    """How many name it."""
    mean_p_max: float
    """Of these crops."""
    mean_target_prob: float
    """The ground truth's probability, over all crops; 0 where it is not stored."""
    sure: bool
    """Surely wrong, rather than a related class or an image of several things."""

    @property
    def share(self) -> float:
        """Of the image's crops, those that name the suggested class."""
        return self.crops / len(self.image.bucket)

    @property
    def score(self) -> float:
        """How sure the teachers are: 1 where every crop names the other class with certainty."""
        return self.share * self.mean_p_max - self.mean_target_prob


class SuspectList:
    """The most suspicious images, and how many there are in all."""

    def __init__(self, num_classes: int) -> None:
        self._sure_below = sure_below(num_classes)
        self.found = 0
        self.sure = 0
        """How many of them are surely wrong."""
        self._worst = Smallest[Suspect](SUSPECTS_KEPT)

    def add(self, labels: ShardLabels, first_row: int) -> None:
        """Look at the rows of a shard; its first one has the number `first_row`."""
        known = (labels.target != UNKNOWN_TARGET)[:, None]
        wrong = known & (labels.bucket >= POSITIVE) & (labels.class_index[..., 0] != labels.target[:, None])
        rows = np.flatnonzero(wrong.sum(axis=1) > MIN_SHARE * labels.num_crops)
        self.found += len(rows)
        for row in rows.tolist():
            suspect = _suspect(sampled(labels, row, first_row), wrong[row], self._sure_below)
            self.sure += suspect.sure
            # A score lies in -1..1, so every one that is surely wrong ranks before the others.
            self._worst.add(-suspect.score - 2 * suspect.sure, suspect.image.key, row, lambda suspect=suspect: suspect)  # type: ignore[misc]

    def worst(self) -> list[Suspect]:
        """The surely wrong ones first, each group by falling score."""
        return self._worst.items()

    def shown(self) -> tuple[list[Suspect], list[Suspect]]:
        """The first of the surely wrong ones, and the first of the others."""
        worst = self.worst()
        sure, related = ([suspect for suspect in worst if suspect.sure is which] for which in (True, False))
        return sure[:SURE_SHOWN], related[:RELATED_SHOWN]


def _suspect(image: SampledImage, wrong: npt.NDArray[np.bool_], truth_below: float) -> Suspect:
    named = image.class_index[:, 0]
    classes, counts = np.unique(named[wrong], return_counts=True)
    suggested = int(classes[counts.argmax()])
    agree = wrong & (named == suggested)
    p_max = float(image.class_prob[agree, 0].mean(dtype=np.float64))
    truth = image.target_prob.astype(np.float64)
    # A probability that is not stored says nothing, so such an image is never surely wrong.
    stored = not np.isnan(truth).any()
    truth_prob = float(np.nan_to_num(truth).mean())
    return Suspect(
        image=image,
        suggested=suggested,
        crops=int(agree.sum()),
        mean_p_max=p_max,
        mean_target_prob=truth_prob,
        sure=bool(stored and truth_prob < truth_below and agree.mean() >= SURE_SHARE and p_max >= SURE_P_MAX),
    )


CSV_COLUMNS = (
    "key", "ground_truth", "ground_truth_name", "suggested", "suggested_name",
    "crops_that_say_so", "crops", "mean_p_max", "mean_ground_truth_prob", "score", "group",
)  # fmt: skip


def csv_rows(suspects: Sequence[Suspect], names: Sequence[str] | None) -> list[tuple[object, ...]]:
    """One row for each image in the order given, with the columns of CSV_COLUMNS."""

    def name(number: int) -> str:
        return _safe(names[number]) if names else ""

    return [
        (
            _safe(suspect.image.key), suspect.image.target, name(suspect.image.target), suspect.suggested,
            name(suspect.suggested), suspect.crops, len(suspect.image.bucket), round(suspect.mean_p_max, 4),
            round(suspect.mean_target_prob, 4), round(suspect.score, 4),
            "surely wrong" if suspect.sure else "related or ambiguous",
        )
        for suspect in suspects
    ]  # fmt: skip


def write_csv(path: Path, suspects: Sequence[Suspect], names: Sequence[str] | None) -> None:
    """UTF-8 with a header line; aside and renamed."""
    with write_atomically(path) as aside, aside.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(CSV_COLUMNS)
        writer.writerows(csv_rows(suspects, names))


def _safe(text: str) -> str:
    """Spreadsheets run a cell that begins like a formula, and a key is a stranger's."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
