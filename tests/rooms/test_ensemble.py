from __future__ import annotations

import numpy as np
import pytest
import torch

from ferkd_data.errors import TeacherError, UsageError
from ferkd_data.labels.soft_labels import check_logits, combine, raise_if_wrong

WEIGHTS, TEMPERATURES = (1.0, 3.0), (1.0, 2.5)


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def reference(logits, mode):
    w = np.array(WEIGHTS) / sum(WEIGHTS)
    scaled = [z.astype(np.float64) / t for z, t in zip(logits, TEMPERATURES, strict=True)]
    if mode == "mean":
        return sum(share * softmax(z) for share, z in zip(w, scaled, strict=True))
    if mode == "logits":
        return softmax(sum(share * z for share, z in zip(w, scaled, strict=True)))
    product = np.prod([softmax(z) ** share for share, z in zip(w, scaled, strict=True)], axis=0)
    return product / product.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("mode", ["mean", "logits", "geometric"])
def test_the_formulas(mode):
    rng = np.random.default_rng(0)
    logits = [rng.normal(size=(7, 11)).astype(np.float32) * 4 for _ in range(2)]
    ours = combine([torch.from_numpy(z) for z in logits], weights=WEIGHTS, temperatures=TEMPERATURES, mode=mode).numpy()
    np.testing.assert_allclose(ours, reference(logits, mode), atol=1e-6)
    np.testing.assert_allclose(ours.sum(axis=1), 1, atol=1e-6)


def test_one_teacher_is_its_softmax_and_inputs_are_kept():
    z = torch.randn(3, 5)
    before = z.clone()
    for mode in ("mean", "logits", "geometric"):
        torch.testing.assert_close(combine([z], weights=[2.0], temperatures=[1.0], mode=mode), z.softmax(1))
    assert torch.equal(z, before)


def test_an_unknown_mode():
    with pytest.raises(UsageError, match="geometric"):
        combine([torch.zeros(1, 2)], weights=[1], temperatures=[1], mode="max")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_impossible_logits(value):
    logits = torch.randn(4, 5)
    assert not bool(check_logits(logits))
    logits[2, 3] = value
    with pytest.raises(TeacherError, match="timm:x gave NaN"):
        raise_if_wrong(check_logits(logits), "timm:x")


def test_all_equal_logits():
    assert bool(check_logits(torch.ones(4, 5)))
    assert not bool(check_logits(torch.ones(1, 5)))
