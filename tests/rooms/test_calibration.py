from __future__ import annotations

import math

import numpy as np
import pytest

from ferkd_data.calibration import Calibration, calibrate, calibration_at, use_probability
from ferkd_data.errors import UsageError
from ferkd_data.labels.buckets import QuantileThresholds
from ferkd_data.targets import recover


def test_shares_are_not_taken_for_thresholds():
    with pytest.raises(UsageError, match="shares of the crops become Thresholds in a build"):
        Calibration(thresholds=QuantileThresholds())


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_is_positive_and_finite(temperature):
    with pytest.raises(UsageError, match="temperature must be positive and finite"):
        Calibration(temperature=temperature)
    with pytest.raises(UsageError, match="temperature must be positive and finite"):
        recover(np.ones((1, 1), np.float16), num_classes=2, temperature=temperature)


@pytest.mark.parametrize("mode", ["smooth", "renorm", "label_smoothing"])
def test_no_temperature_takes_a_row_to_nothing(mode):
    """At T = 0.02 a probability of 0.04 is 1e-70, which float32 does not have."""
    weight, floor = recover(np.array([[0.04, 0.03]], np.float16), num_classes=1000, mode=mode, temperature=0.02)
    np.testing.assert_allclose(weight, [[1, 0]], atol=1e-5)
    np.testing.assert_allclose(floor, [0], atol=1e-5)


def test_the_preset_blend_halves_every_soft_label_with_the_softened_ground_truth():
    """Four crops of the four buckets, of class 1 of 3: all in use, each target by hand."""
    blend = calibration_at("blend", 0)
    prob = np.array([[0.5, 0.25], [1, 0], [0.5, 0.5], [0.75, 0.25]], np.float16)
    index = np.array([[0, 1], [2, 0], [1, 0], [1, 2]])
    codes = np.arange(4, dtype=np.uint8)
    targets = calibrate(
        blend, class_index=index, class_prob=prob, codes=codes, target=np.full(4, 1), num_classes=3
    ).dense()
    soft = np.array([[0.5, 0.25, 0.25], [0, 0, 1], [0.5, 0.5, 0], [0, 0.75, 0.25]])
    np.testing.assert_allclose(targets, (soft + np.array([0.05, 0.9, 0.05])) / 2, atol=1e-6)
    np.testing.assert_array_equal(use_probability(blend, codes), 1)
    # A soft label leads only where it is surer of another class than the softened ground truth is of its own.
    np.testing.assert_array_equal(targets.argmax(axis=1), [1, 2, 1, 1])
