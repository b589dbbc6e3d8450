"""Accumulate sums over all crops of a label set, in memory that does not grow with the number of images.

Confidences are stored as float16, so counts of each of the 15,361 values in [0, 1] lose nothing: every histogram,
bucket share and calibration error of a report is exact.

Legend: R images of a shard, N crops per image, k kept classes, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd_data.labels.buckets import BUCKETS, NUM_FLOAT16, Confidence, confidences_of
from ferkd_data.labels.rows import UNKNOWN_TARGET, ShardLabels

Counts = npt.NDArray[np.int64]

GRID = 20
"""Cells along each side of the map of crop centres, and bins of the crops' area and confidence."""
SIDE_EDGES = (32, 64, 128, 256, 512, 1024, 2048)
"""Limits in pixels of the bins of an image's shorter side."""
CONFUSIONS_KEPT = 100_000
"""Pairs of classes that are counted exactly; beyond twice as many, the rarest half is dropped."""
CONFIDENCES: tuple[Confidence, ...] = ("max", "target")
POSITIVE = 2
"""First bucket code of confident crops."""


class Sketch:
    """Accumulator of `ShardLabels`."""

    def __init__(self, *, num_classes: int, top_k: int, num_crops: int) -> None:
        self.num_classes, self.num_crops = num_classes, num_crops
        self.images = self.crops = 0
        self.confidence: dict[Confidence, Counts] = {
            which: np.zeros((3, NUM_FLOAT16), np.int64) for which in CONFIDENCES
        }
        """Counts by kind of confidence and float16 value: all crops, crops with a ground truth, crops named right."""
        self.truth = np.zeros(NUM_FLOAT16, np.int64)
        """Crops by the stored probability of the ground truth."""
        self.truth_in_top_k = 0
        """Crops whose ground truth is among the stored classes."""
        self.mass_by_rank = np.zeros(top_k, np.float64)
        """Sum over crops of the first, second, ... stored probability."""
        self.buckets = np.zeros((3, len(BUCKETS)), np.int64)
        """Counts by stored bucket: all crops, crops with a ground truth, crops named right."""
        self.centres = np.zeros((len(BUCKETS), GRID, GRID), np.int64)
        """Crops by bucket and by the cell (row, column) of their centre."""
        self.centre_p_max = np.zeros((GRID, GRID), np.float64)
        """Sum of p_max by cell."""
        self.areas = np.zeros((GRID, GRID), np.int64)
        """Crops by p_max (rows) and by their share of the image's area (columns)."""
        self.in_use = np.zeros(num_crops + 1, np.int64)
        """Images by the number of their crops that are not extreme hard."""
        self.epoch_share = np.zeros(len(BUCKETS), np.float64)
        """Sum over images of each bucket's share among the crops that are in use under `ferkd`."""
        self.sides = np.zeros(len(SIDE_EDGES) + 1, np.int64)
        """Images by their shorter side: below 32 pixels, 32 to 63, and so on."""
        self.unlabelled_images = 0
        self.class_images = np.zeros(num_classes, np.int64)
        """(C,) images by ground truth."""
        self.class_right = np.zeros(num_classes, np.int64)
        """(C,) crops named right, by ground truth."""
        self.class_p_max = np.zeros(num_classes, np.float64)
        """(C,) sum of p_max, by ground truth."""
        self.class_named = np.zeros(num_classes, np.int64)
        """(C,) crops by their most probable class."""
        self.confusions: dict[tuple[int, int], int] = {}
        """Crops by (ground truth, most probable class) where these differ."""
        self.confusions_dropped = False

    def add(self, labels: ShardLabels) -> None:
        """Count the rows of a shard, at least one."""
        shape = labels.flip.shape
        p_max = labels.class_prob[..., 0]
        top1 = labels.class_index[..., 0]
        known = np.broadcast_to((labels.target != UNKNOWN_TARGET)[:, None], shape)
        right = top1 == labels.target[:, None]
        self.images += shape[0]
        self.crops += p_max.size
        for which in CONFIDENCES:
            # Values are in 0..1, which reading has checked, so every pattern is an index below NUM_FLOAT16.
            patterns = _patterns(confidences_of(labels.class_prob, labels.target_prob, which))
            for row, mask in enumerate((None, known, right)):
                self.confidence[which][row] += _counts(patterns if mask is None else patterns[mask], NUM_FLOAT16)
        known_prob = labels.target_prob[known & ~np.isnan(labels.target_prob)]
        self.truth += _counts(_patterns(known_prob), NUM_FLOAT16)
        self.truth_in_top_k += int((labels.class_index == labels.target[:, None, None]).any(axis=2).sum())
        # Summed in float64: float16 stops counting at 2,048.
        self.mass_by_rank += labels.class_prob.sum(axis=(0, 1), dtype=np.float64)
        for row, mask in enumerate((None, known, right)):
            self.buckets[row] += _counts(labels.bucket if mask is None else labels.bucket[mask], len(BUCKETS))
        self._add_positions(labels, p_max.astype(np.float32))
        self._add_images(labels)
        self._add_classes(labels, p_max, top1, right)

    def _add_positions(self, labels: ShardLabels, p_max: npt.NDArray[np.float32]) -> None:
        boxes: npt.NDArray[np.float32] = labels.boxes.astype(np.float32)
        # A size of 0 is for `verify` to report; here it must not divide.
        height = np.maximum(labels.height, 1).astype(np.float32)[:, None]
        width = np.maximum(labels.width, 1).astype(np.float32)[:, None]
        row = _cells((boxes[..., 0] + boxes[..., 2] / 2) / height)
        column = _cells((boxes[..., 1] + boxes[..., 3] / 2) / width)
        cell = row * GRID + column
        size = GRID * GRID
        # One number for bucket and cell, so that one bincount counts all buckets. int64: a bucket is uint8.
        self.centres += _counts(labels.bucket * np.int64(size) + cell, len(BUCKETS) * size).reshape(-1, GRID, GRID)
        sums = np.bincount(cell.reshape(-1), p_max.reshape(-1).astype(np.float64), minlength=size)
        self.centre_p_max += sums.reshape(GRID, GRID)
        area = _cells(boxes[..., 2] * boxes[..., 3] / (height * width))
        self.areas += _counts(_cells(p_max) * GRID + area, size).reshape(GRID, GRID)

    def _add_images(self, labels: ShardLabels) -> None:
        by_bucket = np.stack([(labels.bucket == code).sum(axis=1) for code in range(len(BUCKETS))])
        in_use = by_bucket[1:].sum(axis=0)
        self.in_use += _counts(in_use, self.num_crops + 1)
        used = in_use > 0
        # An epoch draws equally many crops of each image, whatever the number of those in use.
        self.epoch_share[1:] += (by_bucket[1:, used] / in_use[used]).sum(axis=1)
        self.sides += _counts(
            np.searchsorted(SIDE_EDGES, np.minimum(labels.height, labels.width), side="right"), len(SIDE_EDGES) + 1
        )

    def _add_classes(
        self, labels: ShardLabels, p_max: npt.NDArray[Any], top1: npt.NDArray[Any], right: npt.NDArray[np.bool_]
    ) -> None:
        named, how_often = np.unique(top1, return_counts=True)
        self.class_named[named] += how_often
        images = np.flatnonzero(labels.target != UNKNOWN_TARGET)
        self.unlabelled_images += len(labels) - len(images)
        classes, index = np.unique(labels.target[images], return_inverse=True)
        self.class_images[classes] += _counts(index, len(classes))
        for sums, values in (
            (self.class_right, right[images].sum(axis=1)),
            (self.class_p_max, p_max[images].sum(axis=1, dtype=np.float64)),
        ):
            sums[classes] += np.bincount(index, values, minlength=len(classes)).astype(sums.dtype)
        wrong = ~right[images]
        truth = np.broadcast_to(labels.target[images].astype(np.int64)[:, None], wrong.shape)[wrong]
        # One number for a pair of classes, truth * C + named, makes counting pairs a count of numbers.
        pairs, counts = np.unique(truth * self.num_classes + top1[images][wrong].astype(np.int64), return_counts=True)
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            names = divmod(pair, self.num_classes)
            self.confusions[names] = self.confusions.get(names, 0) + count
        if len(self.confusions) > 2 * CONFUSIONS_KEPT:
            # Ties by number, so that what is dropped does not depend on the order of counting.
            most = sorted(self.confusions.items(), key=lambda item: (-item[1], item[0]))[:CONFUSIONS_KEPT]
            self.confusions, self.confusions_dropped = dict(most), True


def _patterns(values: npt.NDArray[np.float16]) -> npt.NDArray[np.uint16]:
    """View float16 values as their bit patterns, which number the values of [0, 1] in rising order."""
    return np.ascontiguousarray(values).view(np.uint16)


def _counts(codes: npt.NDArray[Any], length: int) -> Counts:
    return np.bincount(codes.reshape(-1), minlength=length)[:length].astype(np.int64, copy=False)


def _cells(shares: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Number the cells 0 .. GRID - 1 that shares in 0..1 lie in."""
    return np.clip((shares * GRID).astype(np.int64), 0, GRID - 1)


FLOAT16_VALUES: npt.NDArray[np.float64] = np.arange(NUM_FLOAT16, dtype=np.uint16).view(np.float16).astype(np.float64)
"""All float16 values in [0, 1]. Positive floats rise with their bit patterns, so the pattern is the index."""


def counts_below(counts: Counts, edges: npt.NDArray[np.float64]) -> Counts:
    """Count the values below each edge. A value at an edge is not below it, as in `assign_buckets`."""
    below = np.concatenate([[0], np.cumsum(counts)])
    return below[np.searchsorted(FLOAT16_VALUES, edges, side="left")].astype(np.int64)


def counts_between(counts: Counts, edges: npt.NDArray[np.float64]) -> Counts:
    """Count the values in each bin between `edges`; the last bin includes its upper edge."""
    below = counts_below(counts, edges)
    below[-1] = counts.sum()
    return np.diff(below)
