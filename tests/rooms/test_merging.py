"""Ensembles from the top-k of their members, against the mean of the full distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ferkd_data.errors import LabelSetError
from ferkd_data.exchange.checks import row_faults
from ferkd_data.label_set.ensemble import merge_labels
from ferkd_data.labels.buckets import Thresholds
from ferkd_data.labels.rows import ShardLabels
from ferkd_data.labels.soft_labels import soft_labels

CROPS = 6
HALF = 2.0**-10


def labels_of(prob, target, top_k):
    """Soft labels as a build stores them, of distributions (R, N, C)."""
    rows, crops, num_classes = prob.shape
    kept = soft_labels(
        torch.from_numpy(prob.reshape(-1, num_classes)), torch.from_numpy(np.repeat(target, crops)), top_k=top_k
    ).to_numpy()
    return ShardLabels(
        keys=[f"image{i}" for i in range(rows)],
        image_digest=np.zeros((rows, 16), np.uint8),
        height=np.full(rows, 9, np.uint16),
        width=np.full(rows, 9, np.uint16),
        target=target.astype(np.int32),
        boxes=np.ones((rows, crops, 4), np.uint16),
        flip=np.zeros((rows, crops), np.bool_),
        class_index=kept.class_index.reshape(rows, crops, top_k),
        class_prob=kept.class_prob.reshape(rows, crops, top_k),
        target_prob=kept.target_prob.reshape(rows, crops),
        bucket=np.zeros((rows, crops), np.uint8),
    )


@st.composite
def ensembles(draw):
    num_classes = draw(st.integers(2, 12))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    sharpness = draw(st.sampled_from([0.1, 1.0, 5.0]))
    sizes = draw(st.lists(st.integers(1, num_classes), min_size=2, max_size=3))
    weights = draw(st.lists(st.floats(0.1, 5), min_size=len(sizes), max_size=len(sizes)))
    target = generator.integers(-1, num_classes, 4)
    probs = []
    for _ in sizes:
        logits = generator.normal(0, sharpness, (4, CROPS, num_classes))
        exp = np.exp(logits - logits.max(axis=2, keepdims=True))
        probs.append((exp / exp.sum(axis=2, keepdims=True)).astype(np.float32))
    return probs, target, sizes, weights


@settings(max_examples=200, deadline=None)
@given(ensembles())
def test_the_error_is_within_the_mass_that_was_cut_off(case):
    probs, target, sizes, weights = case
    num_classes = probs[0].shape[2]
    parts = [labels_of(prob, target, size) for prob, size in zip(probs, sizes, strict=True)]
    thresholds = Thresholds()
    merged = merge_labels(parts, weights, num_classes=num_classes, thresholds=thresholds, where="here")
    joint = sum(w * p for w, p in zip(weights, probs, strict=True)) / sum(weights)
    true = np.take_along_axis(joint, merged.labels.class_index.astype(np.int64), axis=2)
    assert (np.abs(merged.labels.class_prob - true) <= merged.uncertain[:, :, None] + HALF).all()
    by_all = np.ones(true.shape, np.bool_)
    for part in parts:
        by_all &= (merged.labels.class_index[..., None] == part.class_index[:, :, None, :]).any(axis=3)
    assert np.abs(np.where(by_all, merged.labels.class_prob - true, 0)).max() <= HALF
    known = target >= 0
    of_target = np.take_along_axis(joint, np.maximum(target, 0)[:, None, None], axis=2)[:, :, 0]
    assert np.abs(np.where(known[:, None], merged.labels.target_prob - of_target, 0)).max() <= HALF
    assert not [
        fault
        for fault in row_faults(
            merged.labels, num_classes=num_classes, thresholds=thresholds, pixel_limit=10**8, limit=5
        )
        if fault.field not in ("target_prob", "boxes")
    ]


@settings(max_examples=50, deadline=None)
@given(ensembles())
def test_whole_distributions_give_the_joint_build(case):
    probs, target, _, weights = case
    num_classes = probs[0].shape[2]
    parts = [labels_of(prob, target, num_classes) for prob in probs]
    merged = merge_labels(parts, weights, num_classes=num_classes, thresholds=Thresholds(), where="here")
    joint = sum(w * p for w, p in zip(weights, probs, strict=True)) / sum(weights)
    expected = -np.sort(-joint, axis=2)
    assert np.abs(merged.labels.class_prob - expected).max() <= HALF
    assert merged.uncertain.max() < 0.01


def test_rows_that_are_not_the_same_crops_are_named():
    prob = np.full((2, CROPS, 3), 1 / 3, np.float32)
    a, b = (labels_of(prob, np.zeros(2, np.int64), 2) for _ in range(2))
    b.boxes[1, 2, 3] += 1
    with pytest.raises(LabelSetError, match="here: boxes of image 'image1' differs"):
        merge_labels([a, b], [1, 1], num_classes=3, thresholds=Thresholds(), where="here")
    b.keys[0] = "another"
    with pytest.raises(LabelSetError, match="'image0' and 'another'"):
        merge_labels([a, b], [1, 1], num_classes=3, thresholds=Thresholds(), where="here")
