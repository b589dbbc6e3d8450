"""Buckets: a crop's difficulty, read off its soft label (FerKD, ICCV 2023).

A bucket follows from a confidence: the soft label's largest probability (p_max), or the probability of the ground
truth. Both are stored as float16, and thresholds are compared with the stored values, so that a reader finds the same
buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ferkd_data.errors import UsageError

BUCKETS = ("extreme_hard", "moderate_hard", "hard_positive", "easy_positive")
"""Names by code 0..3."""
NUM_FLOAT16 = 0x3C01
"""Number of float16 values in [0, 1]. Their bit patterns 0x0000..0x3C00 have the order of the values."""

Confidence = Literal["max", "target"]
QUANTILE_PREFIX = "quantile:"


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Thresholds of the buckets: extreme_hard < low <= moderate_hard < mid <= hard_positive < top <= easy_positive.

    Raises UsageError unless 0 <= low <= mid <= top <= 1. FerKD discards extreme_hard crops, gives moderate_hard ones
    the softened ground truth, and keeps the soft label of the others. The default values are ours.

    >>> Thresholds(low=0.1, mid=0.25).top
    0.95
    """

    low: float = 0.15
    mid: float = 0.3
    top: float = 0.95
    confidence: Confidence = "max"
    """max: p_max. target: the probability of the ground truth; p_max where that is unknown."""

    def __post_init__(self) -> None:
        _check("thresholds", (self.low, self.mid, self.top), self.confidence)


@dataclass(frozen=True, kw_only=True)
class QuantileThresholds:
    """Thresholds given as shares of the label set's own crops, since teachers differ in sharpness.

    Raises UsageError unless 0 <= low <= mid <= top <= 1.

    >>> asked = QuantileThresholds(low=0.01, mid=0.03, top=0.9)  # build(..., thresholds=asked)
    """

    low: float = 0.01
    mid: float = 0.03
    top: float = 0.9
    confidence: Confidence = "max"

    def __post_init__(self) -> None:
        _check("quantiles", (self.low, self.mid, self.top), self.confidence)

    def resolve(self, counts: npt.NDArray[np.int64]) -> Thresholds:
        """Return the absolute thresholds for the confidences counted by `confidence_counts`, exactly.

        A threshold is the smallest stored value that has at least its share of all crops below it.
        """
        # below[i]: crops with a smaller pattern than i. So the first i with enough below it is the smallest threshold.
        below = np.concatenate([[0], np.cumsum(counts)])
        wanted = np.array([self.low, self.mid, self.top]) * below[-1]
        patterns = np.minimum(np.searchsorted(below, wanted, side="left"), NUM_FLOAT16 - 1)
        low, mid, top = patterns.astype(np.uint16).view(np.float16).astype(np.float64).tolist()
        return Thresholds(low=low, mid=mid, top=top, confidence=self.confidence)


def parse_thresholds(pieces: Sequence[str], confidence: Confidence = "max") -> Thresholds | QuantileThresholds:
    """Parse `("0.15", "0.3", "0.95")` or `("quantile:0.01,0.03,0.9",)`. Raises UsageError."""
    text = " ".join(pieces)
    kind = QuantileThresholds if text.startswith(QUANTILE_PREFIX) else Thresholds
    try:
        values = [float(piece) for piece in text.removeprefix(QUANTILE_PREFIX).replace(",", " ").split()]
    except ValueError:
        values = []
    if len(values) != 3:
        raise UsageError(f"thresholds must be LOW MID TOP or quantile:LOW,MID,TOP, got {text!r}")
    return kind(low=values[0], mid=values[1], top=values[2], confidence=confidence)


def confidences_of(
    class_prob: npt.NDArray[np.float16], target_prob: npt.NDArray[np.float16], which: Confidence
) -> npt.NDArray[np.float16]:
    """Return the confidences (...,) of crops with class_prob (..., k) and target_prob (...,)."""
    p_max = class_prob[..., 0]
    return p_max if which == "max" else np.where(np.isnan(target_prob), p_max, target_prob)


def assign_buckets(confidences: npt.NDArray[np.float16], thresholds: Thresholds) -> npt.NDArray[np.uint8]:
    """Return the bucket codes 0..3 of confidences, in their shape."""
    # float64 holds every float16 exactly: the stored value is compared, not a rounded threshold. `right` puts a
    # confidence that equals a threshold above it, as `<` and `<=` in `Thresholds` say.
    edges = np.array([thresholds.low, thresholds.mid, thresholds.top])
    return np.searchsorted(edges, confidences.astype(np.float64), side="right").astype(np.uint8)


def buckets_of(
    class_prob: npt.NDArray[np.float16], target_prob: npt.NDArray[np.float16], thresholds: Thresholds
) -> npt.NDArray[np.uint8]:
    """Return the bucket codes (...,) of crops with class_prob (..., k) and target_prob (...,).

    >>> import numpy as np
    >>> prob = np.array([[0.5, 0.2], [0.125, 0.1]], np.float16)
    >>> [BUCKETS[code] for code in buckets_of(prob, prob[:, 1], Thresholds())]
    ['hard_positive', 'extreme_hard']
    """
    return assign_buckets(confidences_of(class_prob, target_prob, thresholds.confidence), thresholds)


def confidence_counts(confidences: npt.NDArray[np.float16]) -> npt.NDArray[np.int64]:
    """Count how often each float16 value in [0, 1] occurs: (NUM_FLOAT16,), indexed by bit pattern."""
    # The pattern is the index, which sorts nothing and needs no bins: patterns of 0..1 are in the order of the values.
    patterns = np.ascontiguousarray(confidences).reshape(-1).view(np.uint16)
    return np.bincount(patterns, minlength=NUM_FLOAT16)


def from_patterns(patterns: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Convert the bit patterns of float16 values in 0..1 to float32, exactly. Other patterns give any value.

    This is 15 times as fast as NumPy's own conversion.
    """
    wide = patterns.astype(np.uint32)
    # The mantissa's bits stay the same, and the exponent is rescaled. Shifted by 13 bits, the fields of float16 lie
    # where float32 has its own. The exponent's bias is 15 in float16 and 127 in float32, so the value is too small by
    # 2**(127 - 15). Subnormal numbers come out right too.
    wide <<= 13
    values = wide.view(np.float32)
    values *= np.float32(2.0**112)
    return values


def _check(name: str, values: tuple[float, float, float], which: Any) -> None:
    if not 0 <= values[0] <= values[1] <= values[2] <= 1:
        raise UsageError(f"{name} must be 0 <= LOW <= MID <= TOP <= 1, got {' '.join(map(str, values))}")
    if which not in ("max", "target"):
        raise UsageError(f"confidence must be max or target, got {which!r}")
