from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ferkd_data.errors import UsageError
from ferkd_data.labels.buckets import (
    QuantileThresholds,
    Thresholds,
    assign_buckets,
    confidence_counts,
    confidences_of,
    parse_thresholds,
)
from ferkd_data.labels.soft_labels import soft_labels

FLOAT16 = hnp.arrays(np.float16, st.integers(1, 300), elements=st.floats(0, 1, width=16))


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**32 - 1), st.data())
def test_top_k_is_a_stable_sort_by_the_stored_probability(classes, rows, seed, data):
    rng = np.random.default_rng(seed)
    # Few distinct values, so that ties are the rule.
    prob = rng.integers(0, 4, (rows, classes)).astype(np.float32) / 4 + rng.choice([0, 1e-6], (rows, classes))
    target = rng.integers(-1, classes, rows)
    k = data.draw(st.integers(1, classes))
    labels = soft_labels(torch.from_numpy(prob.astype(np.float32)), torch.from_numpy(target), top_k=k).to_numpy()
    stored = prob.astype(np.float16)
    for row in range(rows):
        order = sorted(range(classes), key=lambda c: (-float(stored[row, c]), c))[:k]
        assert labels.class_index[row].tolist() == order
        assert labels.class_prob[row].tolist() == stored[row, order].tolist()
        expected = np.float16(np.nan) if target[row] < 0 else stored[row, target[row]]
        np.testing.assert_equal(labels.target_prob[row], expected)
    assert labels.class_index.dtype == np.uint16


def test_many_classes_need_wider_indices():
    prob = torch.zeros(1, 70_000)
    prob[0, 69_999] = 1.0
    labels = soft_labels(prob, torch.tensor([-1]), top_k=2).to_numpy()
    assert labels.class_index.dtype == np.uint32
    assert labels.class_index.tolist() == [[69_999, 0]]


@pytest.mark.parametrize("k", [0, 11])
def test_k_outside_the_classes(k):
    with pytest.raises(UsageError, match=r"1\.\.10"):
        soft_labels(torch.full((1, 10), 0.1), torch.tensor([0]), top_k=k)


@given(FLOAT16, st.tuples(*[st.floats(0, 1)] * 3))
def test_buckets_follow_the_thresholds(confidences, values):
    low, mid, top = sorted(values)
    buckets = assign_buckets(confidences, Thresholds(low=low, mid=mid, top=top))
    for c, bucket in zip(confidences.astype(float), buckets, strict=True):
        expected = 0 if c < low else 1 if c < mid else 2 if c < top else 3
        assert bucket == expected


@given(FLOAT16, st.tuples(*[st.floats(0, 1)] * 3))
def test_quantiles_leave_at_least_their_share_below(confidences, values):
    low, mid, top = sorted(values)
    resolved = QuantileThresholds(low=low, mid=mid, top=top).resolve(confidence_counts(confidences))
    ordered = np.sort(confidences.astype(float))
    for share, threshold in zip((low, mid, top), (resolved.low, resolved.mid, resolved.top), strict=True):
        below = (ordered < threshold).mean()
        assert below >= share or threshold == 1.0
        smaller = ordered[ordered < threshold]
        if len(smaller):
            assert (ordered < smaller[-1]).mean() < share


def test_the_targets_probability_can_decide():
    prob = np.array([[0.9, 0.1], [0.9, 0.1]], np.float16)
    target = np.array([0.05, np.nan], np.float16)
    assert confidences_of(prob, target, "target").tolist() == [np.float16(0.05), np.float16(0.9)]
    assert confidences_of(prob, target, "max").tolist() == [np.float16(0.9)] * 2


def test_parsing():
    assert parse_thresholds(["0.1", "0.2", "0.9"]) == Thresholds(low=0.1, mid=0.2, top=0.9)
    assert parse_thresholds(["quantile:0.01,0.03,0.9"]) == QuantileThresholds()
    for wrong in (["0.1"], ["a", "b", "c"], ["0.3", "0.2", "0.9"], ["quantile:0.1"], ["0", "0", "nan"]):
        with pytest.raises(UsageError):
            parse_thresholds(wrong)
