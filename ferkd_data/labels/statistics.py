"""Statistics of a label set, as sums that add up shard by shard.

The p_max histogram has bins of 0.005, so that FerKD's ranges (multiples of 0.05) are sums of whole bins.
Legend: R images, N crops, T teachers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from ferkd_data.labels.buckets import BUCKETS, NUM_FLOAT16, from_patterns
from ferkd_data.labels.rows import UNKNOWN_TARGET, ShardLabels

NUM_BINS = 200
NUM_PATTERNS = 2**16
"""Bit patterns of float16."""
VALUES_AT_ONCE = 2**16
"""Values that are added at a time, so that they stay in a core's cache."""
RANGE_EDGES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
"""FerKD's p_max ranges: each holds its lower edge, the last one both."""
PAPER_SHARES = (0.43, 0.89, 1.29, 2.03, 3.66, 4.35, 5.04, 7.76, 8.14, 28.73, 37.34, 0.33)
"""Percent of ImageNet crops in each range, as FerKD (ICCV 2023) reports them."""

TEACHER_BINS = 15
"""Equal bins of a teacher's own p_max, for its calibration error."""
P_MAX_UNITS = 2**16
"""Sums of p_max are counted in units of 1 / P_MAX_UNITS: whole numbers add up alike in every order."""

MAX_COUNT = 2**53
"""Counts are exact in every reader's numbers."""
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]


class Statistics(BaseModel):
    """Sums over the crops of a shard or a label set. `a + b` are the statistics of both together."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    crops: Count = 0
    """Crops of all images together."""
    p_max_histogram: Annotated[tuple[Count, ...], Field(min_length=NUM_BINS, max_length=NUM_BINS)] = (0,) * NUM_BINS
    """Crops by p_max in 200 bins of 0.005; 1.0 falls into the last."""
    bucket_counts: Annotated[tuple[Count, ...], Field(min_length=4, max_length=4)] = (0, 0, 0, 0)
    """Crops by bucket: extreme_hard, moderate_hard, hard_positive, easy_positive."""
    crops_with_target: Count = 0
    """Crops of images whose ground truth is known."""
    top1_matches_target: Count = 0
    """Crops whose most probable class is the ground truth."""
    target_prob_sum: Annotated[float, Field(ge=0)] = 0.0
    """Sum over crops of the ensemble's probability of the ground truth, where it is stored."""
    kept_prob_sum: Annotated[float, Field(ge=0)] = 0.0
    """Sum over crops of the top-k probabilities."""
    teacher_top1_matches_target: tuple[Count, ...] = ()
    """Per teacher: crops whose most probable class, for this teacher alone, is the ground truth."""
    teacher_agreement: tuple[tuple[Count, ...], ...] = ()
    """Entry [a][b]: crops on which teachers a and b name the same most probable class."""

    teacher_right_together: tuple[tuple[Count, ...], ...] = ()
    """Entry [a][b]: crops whose ground truth both teachers a and b name as the most probable class."""
    teacher_bin_crops: tuple[tuple[Count, ...], ...] = ()
    """Per teacher: crops with a ground truth in 15 equal bins of the teacher's own largest probability."""
    teacher_bin_right: tuple[tuple[Count, ...], ...] = ()
    """Per teacher and bin: those whose most probable class, for this teacher alone, is the ground truth."""
    teacher_bin_p_max: tuple[tuple[Count, ...], ...] = ()
    """Per teacher and bin: the sum of the teacher's largest probability over its crops, in units of 1/65536."""

    def __add__(self, other: Statistics) -> Statistics:
        return add([self, other])

    def fits(self, num_teachers: int) -> bool:
        """Return whether the counts per teacher are of `num_teachers` teachers, or absent."""
        squares = (self.teacher_agreement, self.teacher_right_together)
        binned = (self.teacher_bin_crops, self.teacher_bin_right, self.teacher_bin_p_max)
        lists = (self.teacher_top1_matches_target, *squares, *binned)
        return (
            all(len(entries) in (0, num_teachers) for entries in lists)
            and all(len(row) == num_teachers for square in squares for row in square)
            and all(len(row) == TEACHER_BINS for table in binned for row in table)
        )


def add(parts: Iterable[Statistics]) -> Statistics:
    """Return the statistics of the union of disjoint crops."""
    filled = [part for part in parts if part.crops]
    if not filled:
        return Statistics()
    # Declared fields alone: an unknown field of a newer version may be no sum.
    names = Statistics.model_fields
    sums = {name: _sum([getattr(part, name) for part in filled]) for name in names}
    return Statistics.model_validate(sums)


def _sum(values: list[object]) -> object:
    if () in values:
        # Some parts lack these counts, such as those that an older version wrote: the whole has none either.
        return ()
    if isinstance(values[0], (int, float)):
        return sum(values)  # type: ignore[arg-type]
    total = np.sum([np.asarray(value, dtype=np.int64) for value in values], axis=0)
    return tuple(tuple(row) for row in total.tolist()) if total.ndim == 2 else tuple(total.tolist())


def crop_statistics(
    *,
    class_index: npt.NDArray[np.generic],
    class_prob: npt.NDArray[np.float16],
    target_prob: npt.NDArray[np.float16],
    bucket: npt.NDArray[np.uint8],
    target: npt.NDArray[np.integer],
) -> Statistics:
    """Return the statistics of columns class_index, class_prob (R, N, k); target_prob, bucket (R, N); target (R,)."""
    known = target != UNKNOWN_TARGET
    with_target = target_prob if known.all() else target_prob[known]
    num_crops = target_prob.shape[1]
    return Statistics(
        crops=target_prob.size,
        p_max_histogram=tuple(histogram(*_counts(class_prob[..., 0])).tolist()),
        bucket_counts=tuple(np.bincount(bucket.reshape(-1), minlength=4).tolist()),
        crops_with_target=int(known.sum()) * num_crops,
        # No class is numbered -1, so crops without a target never match.
        top1_matches_target=int((class_index[..., 0] == target[:, None]).sum()),
        target_prob_sum=_total(np.where(np.isnan(with_target), np.float16(0), with_target)),
        kept_prob_sum=_total(class_prob),
    )


def _counts(values: npt.NDArray[np.float16]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return the distinct values and their counts. There are few, and converting all values would take longer."""
    counts = np.bincount(np.ascontiguousarray(values).reshape(-1).view(np.uint16), minlength=NUM_PATTERNS)
    patterns = np.flatnonzero(counts)
    return patterns.astype(np.uint16).view(np.float16).astype(np.float64), counts[patterns]


def _total(values: npt.NDArray[np.float16]) -> float:
    """Return the sum of the values. float64 adds float16 values without rounding."""
    total = 0.0
    # Rows that hold about VALUES_AT_ONCE values.
    step = max(1, VALUES_AT_ONCE * len(values) // max(values.size, 1))
    for at in range(0, len(values), step):
        part = values[at : at + step]
        patterns = np.ascontiguousarray(part).view(np.uint16)
        # `from_patterns` is for 0..1. -0, which readers take for 0, has a pattern beyond these.
        usual = patterns.max(initial=0) < NUM_FLOAT16
        total += float(from_patterns(patterns).sum(dtype=np.float64) if usual else part.astype(np.float64).sum())
    return total


def shard_statistics(labels: ShardLabels) -> Statistics:
    """Return the statistics of a shard's rows, without those per teacher, which only a build can know."""
    return crop_statistics(
        class_index=labels.class_index,
        class_prob=labels.class_prob,
        target_prob=labels.target_prob,
        bucket=labels.bucket,
        target=labels.target,
    )


def histogram(p_max: npt.NDArray[np.float64], counts: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.int64]:
    """Count crops in NUM_BINS equal bins of [0, 1], each once or as often as `counts` says: int64 (NUM_BINS,).

    Exact at the edges, because an edge times 200 is compared as a whole.
    """
    # 0.29 * 200 is 57.99999999999999 in float64. A float16 below an edge is at least 4e-7 bins away from it, so that
    # 1e-9 moves none of those into the wrong bin.
    bins = np.clip(np.floor(p_max.reshape(-1) * NUM_BINS + 1e-9), 0, NUM_BINS - 1).astype(np.int64)
    return np.bincount(bins, counts, minlength=NUM_BINS).astype(np.int64)


def near_chance(num_classes: int) -> float:
    """Return the accuracy below which a teacher counts as guessing: three times chance, less where classes are few.

    With two or three classes, three times chance is 100 % or more: a fifth of the way from chance to 1 is the limit.

    >>> [round(near_chance(classes), 3) for classes in (2, 3, 10, 1000)]
    [0.6, 0.467, 0.28, 0.003]
    """
    chance = 1 / num_classes
    return min(3 * chance, chance + 0.2 * (1 - chance))


class Range(NamedTuple):
    """A row of FerKD's table: the crops with low <= p_max < high."""

    low: float
    high: float
    crops: int
    share: float
    """Percent of all crops."""
    aggregate: float
    """Percent of all crops up to and including this range."""
    paper_share: float


def p_max_table(statistics: Statistics) -> list[Range]:
    """Return FerKD's table for this label set: a row for each range of RANGE_EDGES."""
    counts = np.asarray(statistics.p_max_histogram, dtype=np.int64)
    total = max(int(counts.sum()), 1)
    rows = []
    seen = 0
    for low, high, paper in zip(RANGE_EDGES[:-1], RANGE_EDGES[1:], PAPER_SHARES, strict=True):
        crops = int(counts[round(low * NUM_BINS) : round(high * NUM_BINS)].sum())
        seen += crops
        rows.append(Range(low, high, crops, 100 * crops / total, 100 * seen / total, paper))
    return rows


def summarise(statistics: Statistics) -> dict[str, Any]:
    """Return what `ferkd-data stats` prints: shares in percent in the tables, agreements in 0..1.

    Entries about the ground truth are None, or an empty list, where no crop has one.
    """
    crops = max(statistics.crops, 1)
    known = statistics.crops_with_target > 0
    with_target = max(statistics.crops_with_target, 1)
    return {
        "crops": statistics.crops,
        "p_max": [row._asdict() for row in p_max_table(statistics)],
        "buckets": {
            name: {"crops": count, "share": 100 * count / crops}
            for name, count in zip(BUCKETS, statistics.bucket_counts, strict=True)
        },
        "crops_with_target": statistics.crops_with_target,
        "agreement_with_target": statistics.top1_matches_target / with_target if known else None,
        "mean_target_prob": statistics.target_prob_sum / with_target if known else None,
        "mean_kept_prob": statistics.kept_prob_sum / crops,
        "teacher_agreement": [[count / crops for count in row] for row in statistics.teacher_agreement],
        "teacher_agreement_with_target": [count / with_target for count in statistics.teacher_top1_matches_target]
        if known
        else [],
    }


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Counts of how often the most probable class is the ground truth, over crops whose ground truth is known."""

    by_class: tuple[tuple[int, int, float], ...]
    """(class, crops, share of them that are right) for every class seen, the worst first."""
    by_bucket: tuple[float | None, ...]
    """By bucket code, as stored: the share of crops that are right; None where there are none."""


def count_agreement(shards: Iterable[ShardLabels]) -> Agreement:
    """Count, over all shards, how often the most probable class is the ground truth, by class and by bucket.

    One pass with one shard in memory at a time.
    """
    crops: Counter[int] = Counter()
    matches: Counter[int] = Counter()
    bucket_crops, bucket_matches = np.zeros((2, len(BUCKETS)), np.int64)
    for shard in shards:
        for target in np.unique(shard.target[shard.target != UNKNOWN_TARGET]).tolist():
            rows = shard.target == target
            right = shard.class_index[rows, :, 0] == target
            crops[target] += right.size
            matches[target] += int(right.sum())
            buckets = shard.bucket[rows]
            bucket_crops += np.bincount(buckets.ravel(), minlength=len(BUCKETS))
            bucket_matches += np.bincount(buckets[right], minlength=len(BUCKETS))
    table = [(target, crops[target], matches[target] / crops[target]) for target in crops]
    pairs = zip(bucket_matches.tolist(), bucket_crops.tolist(), strict=True)
    return Agreement(
        by_class=tuple(sorted(table, key=lambda row: (row[2], row[0]))),
        by_bucket=tuple(right / number if number else None for right, number in pairs),
    )
