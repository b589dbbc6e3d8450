"""Images whose ground truth looks wrong: most of their crops are confidently named otherwise.

A crop is confident if it is in one of the two positive buckets, that is, from the second stored threshold up. Labels
alone decide: neither the name of a file nor that of its folder is looked at.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ferkd_data.report.samples import SampledImage, Smallest, sampled
from ferkd_data.report.sketch import POSITIVE
from ferkd_data.shards.columns import UNKNOWN_TARGET, ShardLabels
from ferkd_data.storage import write_atomically

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
