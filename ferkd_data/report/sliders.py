"""What the page's three sliders need: exact counts below each threshold, and crops that change bucket."""

from __future__ import annotations

from typing import Any

import numpy as np

from ferkd_data.buckets import BUCKETS, Thresholds
from ferkd_data.label_set import LabelSet
from ferkd_data.report.pictures import Pictures
from ferkd_data.report.samples import Crop
from ferkd_data.report.sketch import CONFIDENCES, Sketch, counts_below
from ferkd_data.report.suggestion import Suggestion

STEPS = 1000
"""Thresholds go in steps of 1 / STEPS. JavaScript and Python divide alike, so both compare with the same number."""
BINS = 100
"""Bars of the histogram."""


def slider_data(
    labels: LabelSet, sketch: Sketch, strata: list[Crop], pictures: Pictures, suggestion: Suggestion
) -> dict[str, Any]:
    """Plain numbers and texts for the page's script.

    For each kind of confidence, `below` says for each threshold how many crops have a smaller one, as
    `assign_buckets` compares; `known` and `right` say so of the crops with a ground truth and of those named right.
    """
    edges = np.arange(STEPS + 1) / STEPS
    stored = labels.manifest.thresholds
    quantiles = {}
    confidence: dict[str, Any] = {}
    for which in CONFIDENCES:
        counts = sketch.confidence[which]
        below = [counts_below(row, edges).tolist() for row in counts]
        confidence[which] = {"below": below[0], "known": below[1], "right": below[2]}
        quantiles[which] = counts.sum(axis=1).tolist()
    return {
        "steps": STEPS,
        "bins": BINS,
        "totals": quantiles,
        "confidence": confidence,
        "buckets": list(BUCKETS),
        "stored": _thresholds(stored.absolute()),
        "suggested": _thresholds(suggestion.thresholds),
        "defaults": _thresholds(Thresholds()),
        "crops": [_crop(labels, crop, pictures) for crop in strata],
    }


def _thresholds(thresholds: Thresholds) -> dict[str, Any]:
    return {"values": [thresholds.low, thresholds.mid, thresholds.top], "confidence": thresholds.confidence}


def _crop(labels: LabelSet, crop: Crop, pictures: Pictures) -> dict[str, Any]:
    said = float(crop.image.target_prob[crop.number])
    return {
        "key": crop.image.key,
        "crop": crop.number,
        "max": crop.p_max,
        "target": crop.p_max if np.isnan(said) else said,
        "named": class_name(labels, crop.top1),
        "truth": class_name(labels, crop.image.target),
        "right": crop.top1 == crop.image.target,
        "picture": pictures.crops.get((crop.image.key, crop.number), ""),
    }


def class_name(labels: LabelSet, number: int) -> str:
    """The class as people read it: the first of its names, or its number."""
    if number < 0:
        return "unlabelled"
    return labels.class_names[number].split(",")[0] if labels.class_names else f"class {number}"
