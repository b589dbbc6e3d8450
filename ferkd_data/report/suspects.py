"""Images whose ground truth looks wrong: most of their crops are confidently named otherwise."""

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

    def __init__(self) -> None:
        self.found = 0
        self._worst = Smallest[Suspect](SUSPECTS_KEPT)

    def add(self, labels: ShardLabels, first_row: int) -> None:
        """Look at the rows of a shard; its first one has the number `first_row`."""
        known = (labels.target != UNKNOWN_TARGET)[:, None]
        wrong = known & (labels.bucket >= POSITIVE) & (labels.class_index[..., 0] != labels.target[:, None])
        rows = np.flatnonzero(wrong.sum(axis=1) > MIN_SHARE * labels.num_crops)
        self.found += len(rows)
        for row in rows.tolist():
            suspect = _suspect(sampled(labels, row, first_row), wrong[row])
            self._worst.add(-suspect.score, suspect.image.key, row, lambda suspect=suspect: suspect)  # type: ignore[misc]

    def worst(self) -> list[Suspect]:
        """The most suspicious first."""
        return self._worst.items()


def _suspect(image: SampledImage, wrong: npt.NDArray[np.bool_]) -> Suspect:
    named = image.class_index[:, 0]
    classes, counts = np.unique(named[wrong], return_counts=True)
    suggested = int(classes[counts.argmax()])
    agree = wrong & (named == suggested)
    return Suspect(
        image=image,
        suggested=suggested,
        crops=int(agree.sum()),
        mean_p_max=float(image.class_prob[agree, 0].mean(dtype=np.float64)),
        mean_target_prob=float(np.nan_to_num(image.target_prob.astype(np.float64)).mean()),
    )


CSV_COLUMNS = (
    "key", "ground_truth", "ground_truth_name", "suggested", "suggested_name",
    "crops_that_say_so", "crops", "mean_p_max", "mean_ground_truth_prob", "score",
)  # fmt: skip


def csv_rows(suspects: Sequence[Suspect], names: Sequence[str] | None) -> list[tuple[object, ...]]:
    """One row for each image, the most suspicious first, in the order of CSV_COLUMNS."""

    def name(number: int) -> str:
        return _safe(names[number]) if names else ""

    return [
        (
            _safe(suspect.image.key), suspect.image.target, name(suspect.image.target), suspect.suggested,
            name(suspect.suggested), suspect.crops, len(suspect.image.bucket), round(suspect.mean_p_max, 4),
            round(suspect.mean_target_prob, 4), round(suspect.score, 4),
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
