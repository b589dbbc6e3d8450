from __future__ import annotations

import math

import numpy as np
import pytest

from ferkd_data.calibration import Calibration
from ferkd_data.errors import UsageError
from ferkd_data.labels.buckets import QuantileThresholds
from ferkd_data.targets import recover


def test_shares_are_not_taken_for_thresholds():
    with pytest.raises(UsageError, match="resolve them first"):
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
