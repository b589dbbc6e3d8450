"""Statistics of a shard while it is labelled: of its rows, and of each teacher by itself.

The counts by teacher cannot be made afterwards, since only the ensemble's labels are kept.

Legend: T teachers, B crops of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ferkd_data.labels import statistics
from ferkd_data.labels.rows import UNKNOWN_TARGET, ImageLabels, ShardLabels
from ferkd_data.labels.statistics import P_MAX_UNITS, TEACHER_BINS, Statistics

ROWS_AT_ONCE = 64


class RowCounts:
    """Accumulator of the statistics of rows. Belongs to the thread that writes the rows."""

    def __init__(self) -> None:
        self._pending: list[ImageLabels] = []
        self._total = Statistics()

    def add(self, labels: ImageLabels) -> None:
        self._pending.append(labels)
        if len(self._pending) == ROWS_AT_ONCE:
            self._count()

    def total(self) -> Statistics:
        self._count()
        return self._total

    def _count(self) -> None:
        if self._pending:
            rows = ShardLabels.from_rows(self._pending)
            self._total = statistics.add([self._total, statistics.shard_statistics(rows)])
            self._pending = []


@dataclass(frozen=True, eq=False)
class TeacherCounts:
    """Sums over crops: of a batch, or of all batches of a shard. Integers all, so that their order does not matter."""

    agreement: Tensor
    """(T, T) int64: crops on which two teachers name the same class first."""
    right_together: Tensor
    """(T, T) int64: crops on which both name the ground truth; on the diagonal, each by itself."""
    calibration: Tensor
    """(3, T, TEACHER_BINS) int64, by the teacher's own p_max: crops with a ground truth; those that it names right; the
    sum of p_max in units of 1 / P_MAX_UNITS."""

    @classmethod
    def zeros(cls, num_teachers: int) -> TeacherCounts:
        square = (num_teachers, num_teachers)
        return cls(
            agreement=torch.zeros(square, dtype=torch.int64),
            right_together=torch.zeros(square, dtype=torch.int64),
            calibration=torch.zeros((3, num_teachers, TEACHER_BINS), dtype=torch.int64),
        )

    def __add__(self, other: TeacherCounts) -> TeacherCounts:
        return TeacherCounts(
            agreement=self.agreement + other.agreement,
            right_together=self.right_together + other.right_together,
            calibration=self.calibration + other.calibration,
        )

    def statistics(self) -> dict[str, Any]:
        """Return the fields of `Statistics` that are counted by teacher."""
        crops, right, p_max = map(_rows, self.calibration)
        return {
            "teacher_top1_matches_target": tuple(self.right_together.diagonal().tolist()),
            "teacher_agreement": _rows(self.agreement),
            "teacher_right_together": _rows(self.right_together),
            "teacher_bin_crops": crops,
            "teacher_bin_right": right,
            "teacher_bin_p_max": p_max,
        }


def count_batch(logits_TBC: Sequence[Tensor], temperatures: Sequence[float], target: Tensor) -> list[Tensor]:
    """Compute the three sums of `TeacherCounts` for one batch, on the device of the logits, without waiting for it."""
    top1_TB = torch.stack([logits.argmax(dim=1) for logits in logits_TBC])
    known = target != UNKNOWN_TARGET
    right_TB = (top1_TB == target) & known
    agreement = (top1_TB[:, None] == top1_TB[None]).sum(dim=2)
    right_together = (right_TB[:, None] & right_TB[None]).sum(dim=2)
    p_max_TB = torch.stack([_p_max(logits, t) for logits, t in zip(logits_TBC, temperatures, strict=True)])
    # A teacher's NaN ends the build, but only when this batch is fetched, and an index must be in range until then.
    p_max_TB = p_max_TB.nan_to_num(0).clamp(0, 1)
    bin_TB = (p_max_TB * TEACHER_BINS).long().clamp(max=TEACHER_BINS - 1)
    values = torch.stack(
        [known.expand_as(bin_TB).long(), right_TB.long(), known * (p_max_TB * P_MAX_UNITS).round().long()]
    )
    calibration = values.new_zeros((3, len(logits_TBC), TEACHER_BINS))
    return [agreement, right_together, calibration.scatter_add_(2, bin_TB.expand_as(values), values)]


def _p_max(logits: Tensor, temperature: float) -> Tensor:
    # The largest softmax is exp(max - logsumexp): no (B, C) softmax has to be stored.
    scaled = logits.float() / temperature
    return (scaled.amax(dim=1) - scaled.logsumexp(dim=1)).exp()


def _rows(table: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())
