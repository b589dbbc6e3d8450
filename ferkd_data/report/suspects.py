"""Find images whose ground truth looks wrong: most of their crops are confidently named otherwise.

A crop is confident where its p_max reaches the second stored threshold. Where buckets compare p_max, these are the
crops of the two positive buckets; where they compare that of the ground truth, a wrong ground truth has hardly any.
Labels alone decide; names of files and folders are not used.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ferkd_data.labels.rows import UNKNOWN_TARGET, ShardLabels
from ferkd_data.report.samples import SampledImage, Smallest, sampled
from ferkd_data.report.sketch import POSITIVE
from ferkd_data.storage import write_atomically

MIN_SHARE = 0.5
"""Share of an image's crops that must exceed it in confidently naming another class, for a doubtful ground truth."""
SUSPECTS_KEPT = 1000
SURE_SHARE, SURE_P_MAX = 0.8, 0.5
"""Least share of the crops that name one other class, and their least mean p_max, for a ground truth that is surely
wrong."""
SURE_TRUTH_MOST = 0.05
"""Largest mean probability of a label that is surely wrong; twice chance with many classes, see `sure_below`."""
SURE_SHOWN, RELATED_SHOWN = 24, 24
"""Images of each group that a report shows."""


def sure_below(num_classes: int) -> float:
    """Return the label's mean probability below which it may count as surely wrong: 0.002 for 1,000 classes."""
    return min(SURE_TRUTH_MOST, 2 / num_classes)


@dataclass(frozen=True, kw_only=True, eq=False)
class Suspect:
    """An image whose ground truth is doubtful."""

    image: SampledImage
    suggested: int
    """Class that most of the confident crops name."""
    crops: int
    """Number of confident crops that name it."""
    mean_p_max: float
    """Mean p_max of these crops."""
    mean_target_prob: float
    """Mean probability of the ground truth over all crops; 0 where it is not stored."""
    sure: bool
    """The ground truth is surely wrong, rather than a related class or one of several things in the image."""

    @property
    def share(self) -> float:
        """Share of the image's crops that confidently name the suggested class."""
        return self.crops / len(self.image.bucket)

    @property
    def score(self) -> float:
        """Certainty of the teachers: 1 where every crop names the other class with probability 1."""
        return self.share * self.mean_p_max - self.mean_target_prob


class SuspectList:
    """Find images with a doubtful ground truth: count all, keep the SUSPECTS_KEPT most doubtful ones."""

    def __init__(self, num_classes: int, confident_from: float | None = None) -> None:
        """`confident_from` is the p_max of confident crops; None: those of the two positive buckets."""
        self._sure_below = sure_below(num_classes)
        self._confident_from = confident_from
        self.found = 0
        self.sure = 0
        """Number of them that are surely wrong."""
        self._worst = Smallest[Suspect](SUSPECTS_KEPT)

    def add(self, labels: ShardLabels, first_row: int) -> None:
        """Add a shard whose first row has the number `first_row`."""
        known = (labels.target != UNKNOWN_TARGET)[:, None]
        confident = labels.bucket >= POSITIVE
        if self._confident_from is not None:
            # float64 holds every float16 exactly, so that the threshold is not rounded.
            confident = labels.class_prob[..., 0].astype(np.float64) >= self._confident_from
        wrong = known & confident & (labels.class_index[..., 0] != labels.target[:, None])
        rows = np.flatnonzero(wrong.sum(axis=1) > MIN_SHARE * labels.num_crops)
        self.found += len(rows)
        for row in rows.tolist():
            suspect = _suspect(sampled(labels, row, first_row), wrong[row], self._sure_below)
            self.sure += suspect.sure
            # Scores lie in -1..1: subtracting 2 ranks every image that is surely wrong before all others.
            self._worst.add(-suspect.score - 2 * suspect.sure, suspect.image.key, row, lambda suspect=suspect: suspect)  # type: ignore[misc]

    def worst(self) -> list[Suspect]:
        """List the kept images, those that are surely wrong first, each group by falling score."""
        return self._worst.items()

    def shown(self) -> tuple[list[Suspect], list[Suspect]]:
        """List the images that a report shows: those that are surely wrong, and the others."""
        worst = self.worst()
        sure, related = ([suspect for suspect in worst if suspect.sure is which] for which in (True, False))
        return sure[:SURE_SHOWN], related[:RELATED_SHOWN]


def _suspect(image: SampledImage, wrong: npt.NDArray[np.bool_], truth_below: float) -> Suspect:
    named = image.class_index[:, 0]
    classes, counts = np.unique(named[wrong], return_counts=True)
    # argmax takes the smaller class of equally many, so that the list is always the same.
    suggested = int(classes[counts.argmax()])
    agree = wrong & (named == suggested)
    p_max = float(image.class_prob[agree, 0].mean(dtype=np.float64))
    truth = image.target_prob.astype(np.float64)
    # Where the ground truth's probability is not stored, nothing is known of it, and an image is never surely wrong.
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
    """Make one row for each image, in order, with the columns of CSV_COLUMNS."""

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
    """Write a CSV file in UTF-8 with a header line, under another name, and rename it."""
    with write_atomically(path) as aside, aside.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(CSV_COLUMNS)
        writer.writerows(csv_rows(suspects, names))


def _safe(text: str) -> str:
    """Quote a text that a spreadsheet would run as a formula; keys may be hostile."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
