"""Suggest thresholds for a label set, and say which clause of the rule decided each of them.

The rule is this project's own rule of thumb. Every threshold has an accuracy test (how often the teachers are right
near it or above it) and a cap (the share of all crops that its bucket may hold); whichever ends first decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ferkd_data.labels.buckets import QuantileThresholds, Thresholds
from ferkd_data.report.sketch import Counts, Sketch, counts_below
from ferkd_data.words import percent

Decider = Literal["accuracy", "cap", "none", "share"]
"""none: no crop is unsure enough for the threshold's bucket."""
SUGGESTION_STEPS = 100
"""Thresholds are suggested in steps of 1 / STEPS."""
DISCARD_BELOW, SOFTEN_BELOW, EASY_FROM = 1 / 3, 1 / 2, 0.98
"""Shares of right crops that the three accuracy tests compare with."""
WINDOW = 10
"""Steps below a threshold over which accuracy is counted."""
MOST_DISCARDED, MOST_SOFTENED, MOST_EASY, SUREST = 0.1, 0.2, 0.25, 0.1
"""Caps on the shares of all crops. SUREST is the share taken as easy where the accuracy test never holds."""


@dataclass(frozen=True, kw_only=True)
class Clause:
    """One suggested threshold: its rule in words, and the clause that decided its value."""

    value: float
    rule: str
    decided_by: Decider
    decided: str


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Three suggested thresholds on p_max, and why."""

    thresholds: Thresholds
    clauses: tuple[Clause, Clause, Clause]

    @property
    def measured(self) -> int:
        """Number of thresholds that the accuracy test decided."""
        return sum(clause.decided_by == "accuracy" for clause in self.clauses)

    @property
    def summary(self) -> str:
        """The thresholds and what decided them, in words that claim no more than was measured."""
        low, mid, top = (clause.value for clause in self.clauses)
        values = f"Suggested thresholds: {low:g}, {mid:g} and {top:g} on p_max."
        start = "a place to start, not a measurement of these teachers"
        if self.clauses[0].decided_by == "share":
            return f"{values} They are fixed shares of the crops: {start}."
        if empty := self._decided_by("none"):
            reasons: tuple[tuple[Decider, str], ...] = (
                ("accuracy", "how often the teachers are right"), ("cap", "a limit on the size of the bucket"),
            )  # fmt: skip
            others = [f"{why} decided the {names}" for by, why in reasons if (names := self._decided_by(by))]
            return f"{values} {'; '.join([f'No crop is unsure enough for the {empty}', *others])}."
        if not self.measured:
            return f"{values} Limits on the size of the buckets decided all three: {start}."
        if self.measured == 3:
            return f"{values} How often the teachers are right decided all three."
        rest = "the other" if self.measured == 2 else "the others"
        return (
            f"{values} How often the teachers are right decided the {self._decided_by('accuracy')}; a limit on the "
            f"size of the bucket decided {rest}."
        )

    def _decided_by(self, decider: Decider) -> str:
        names = zip(("first", "second", "third"), self.clauses, strict=True)
        return " and the ".join(name for name, clause in names if clause.decided_by == decider)


def suggest(sketch: Sketch) -> Suggestion:
    """Suggest thresholds on p_max: by accuracy and caps, or by shares of the crops without a ground truth."""
    total, known, right = sketch.confidence["max"]
    if not known.sum():
        return _by_shares(total)
    # All three conditions are evaluated at every step at once; cumulative counts make each a comparison of arrays.
    edges = np.arange(SUGGESTION_STEPS + 1) / SUGGESTION_STEPS
    below, known_below, right_below = (counts_below(counts, edges) for counts in (total, known, right))
    # Counts of the WINDOW steps below each edge: differences of cumulative counts.
    near = [row - np.concatenate([np.zeros(WINDOW, np.int64), row[:-WINDOW]]) for row in (known_below, right_below)]
    low, low_by = _lower(edges, near[1] <= DISCARD_BELOW * near[0], below, MOST_DISCARDED * sketch.crops)
    softened = below - below[round(low * SUGGESTION_STEPS)]
    mid, mid_by = _lower(edges, near[1] <= SOFTEN_BELOW * near[0], softened, MOST_SOFTENED * sketch.crops)
    # Each follows from a test of its own, but thresholds must ascend.
    mid = max(low, mid)
    # Of the crops from each edge on; where none is left there is nothing to be right on.
    accurate = (right.sum() - right_below >= EASY_FROM * (known.sum() - known_below)) & (known_below < known.sum())
    above = (sketch.crops - below) / max(sketch.crops, 1)
    top, top_by, top_cap = _upper(edges, accurate, above)
    if top < mid:
        top, top_by, top_cap = mid, "cap", "it cannot lie below the second threshold"
    return Suggestion(
        thresholds=Thresholds(low=low, mid=mid, top=top),
        clauses=(
            _clause(low, low_by, MOST_DISCARDED, "extreme hard", "crops below it", "a third"),
            _clause(mid, mid_by, MOST_SOFTENED, "moderate hard", "crops between the first one and it", "half"),
            Clause(
                value=top,
                rule=f"crops from it on are easy. The teachers are right on at least {percent(EASY_FROM, 0)} of them, "
                f"and at most {percent(MOST_EASY, 0)} of all crops are easy; where no value does both, the surest "
                f"{percent(SUREST, 0)} are",
                decided_by=top_by,
                decided=top_cap or "accuracy: from a lower one on, the teachers would be right less often",
            ),
        ),
    )


def _clause(value: float, by: Decider, cap: float, bucket: str, crops: str, right: str) -> Clause:
    """Describe a threshold that ends a bucket; `right` is the share of its accuracy test in words."""
    reasons = {
        "accuracy": "accuracy: beyond it, the teachers are right more often",
        "cap": f"the limit of {percent(cap, 0)}; by accuracy alone, the threshold could be higher",
        "none": "no crop is unsure enough, so the bucket stays empty",
    }
    return Clause(
        value=value,
        rule=f"{crops} are {bucket}. Just below it, the teachers are right on at most {right} of the crops, and "
        f"at most {percent(cap, 0)} of all crops are {bucket}",
        decided_by=by,
        decided=reasons[by],
    )


def _lower(
    edges: npt.NDArray[Any], accurate: npt.NDArray[np.bool_], inside: Counts, most: float
) -> tuple[float, Decider]:
    """Give the largest edge up to which the teachers are seldom right and at most `most` crops are in the bucket.

    `inside` counts the crops of the bucket that ends at each edge; 0 where it would be empty.
    """
    # Up to the first step at which the test fails: beyond it, single steps may pass by chance.
    by_accuracy = _last(edges, np.logical_and.accumulate(accurate))
    by_cap = _last(edges, inside <= most)
    if by_cap < by_accuracy:
        return by_cap, "cap"
    # Where there are no crops the teachers are never right, and the test holds: that is no reason for a threshold.
    if inside[round(by_accuracy * SUGGESTION_STEPS)] <= 0:
        return 0.0, "none"
    return by_accuracy, "accuracy"


def _upper(
    edges: npt.NDArray[Any], accurate: npt.NDArray[np.bool_], above: npt.NDArray[np.float64]
) -> tuple[float, Decider, str]:
    """Give the smallest edge above which the teachers are nearly always right and the bucket is small enough."""
    sure = np.flatnonzero(accurate)
    allowed = sure[above[sure] <= MOST_EASY]
    if len(allowed):
        by_cap = allowed[0] != sure[0]
        limit = f"the limit of {percent(MOST_EASY, 0)}; by accuracy alone, the threshold could be lower"
        return float(edges[allowed[0]]), "cap" if by_cap else "accuracy", limit if by_cap else ""
    why = f"the surest {percent(SUREST, 0)} of the crops, since no value does both"
    fits = np.flatnonzero(above <= SUREST)
    return float(edges[fits[0]]) if len(fits) else 1.0, "cap", why


def _last(edges: npt.NDArray[Any], fits: npt.NDArray[np.bool_]) -> float:
    """Give the largest edge that fits; 0 where none does."""
    good = np.flatnonzero(fits)
    return float(edges[good[-1]]) if len(good) else 0.0


def _by_shares(total: Counts) -> Suggestion:
    shares = QuantileThresholds()
    found = shares.resolve(total)
    # Not rounded: of 20,000 classes many crops may lie within a thousandth.
    low, mid, top = found.low, found.mid, found.top
    decided = "by shares of the crops, since no ground truth is known"
    clauses = [
        Clause(value=value, rule=f"{percent(share, 0)} of the crops lie below it", decided_by="share", decided=decided)
        for value, share in ((low, shares.low), (mid, shares.mid), (top, shares.top))
    ]
    first, second, third = clauses
    return Suggestion(thresholds=Thresholds(low=low, mid=mid, top=top), clauses=(first, second, third))
