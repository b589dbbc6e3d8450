"""A target is a sparse vector plus a uniform floor, and stays one under recovery, calibration, SelfMix, Mixup, CutMix.

Held against the same computation on dense float64 targets, written out crop by crop.
"""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ferkd_data.calibration import Calibration, calibrate, crop_policies
from ferkd_data.mixing import CutMix, Mixup
from ferkd_data.selfmix import SelfMix
from ferkd_data.targets import RECOVERIES, SoftTargets

CROPS_PER_IMAGE = 4
NUM_CROPS = 8

POLICIES = st.sampled_from(["discard", "soften", "blend", "keep", "thin(0.5)"])
CALIBRATIONS = st.builds(
    Calibration,
    extreme_hard=POLICIES,
    moderate_hard=POLICIES,
    hard_positive=POLICIES,
    easy_positive=POLICIES,
    confident_but_wrong=st.none() | POLICIES,
    all_discarded=st.sampled_from(["soften", "keep"]),
    epsilon=st.floats(0, 1),
    blend_weight=st.floats(0, 1),
    recovery=st.sampled_from(RECOVERIES),
    temperature=st.just(1.0) | st.floats(0.3, 5),
)
ALPHA, PROB, PER = st.floats(0.2, 3), st.sampled_from([0.5, 1.0]), st.sampled_from(["batch", "sample"])
MODES = st.sampled_from(["cutmix", "mixup", "both"])
MIXES = st.one_of(
    st.builds(SelfMix, prob=PROB, alpha=ALPHA, per=PER, mode=MODES),
    st.builds(CutMix, prob=PROB, alpha=ALPHA, per=PER),
    st.builds(Mixup, prob=PROB, alpha=ALPHA, per=PER),
)


def stored_labels(classes, k, seed, peak):
    """Top-k of random distributions, as float16; at a high peak the tail is stored as 0."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(NUM_CROPS, classes)) * peak
    prob = np.exp(logits - logits.max(axis=1, keepdims=True))
    prob = (prob / prob.sum(axis=1, keepdims=True)).astype(np.float16)
    index = np.argsort(-prob, axis=1, kind="stable")[:, :k]
    return index.astype(np.uint16), np.take_along_axis(prob, index, axis=1)


def recovered(index, prob, classes, mode, temperature):
    prob = prob.astype(np.float64)
    target = np.zeros(classes)
    if mode == "hard":
        target[index[0]] = 1
        return target
    kept = 1 if mode == "label_smoothing" else len(index)
    missing = 0 if mode == "renorm" else max(1 - prob[:kept].sum(), 0)
    if classes > kept:
        target[:] = missing / (classes - kept)
    target[index[:kept]] = prob[:kept]
    target = (target / target.max()) ** (1 / temperature) if temperature != 1 else target
    if mode == "renorm":
        target[np.setdiff1d(np.arange(classes), index)] = 0
    return target / target.sum()


def calibrated(calibration, index, prob, code, target, classes):
    soft = recovered(index, prob, classes, calibration.recovery, calibration.temperature)
    policies = ["extreme_hard", "moderate_hard", "hard_positive", "easy_positive", "confident_but_wrong"]
    policy = getattr(calibration, policies[code])
    policy = calibration.all_discarded if policy == "discard" else policy
    if target < 0 or policy not in ("soften", "blend"):
        return soft
    softened = np.full(classes, calibration.epsilon / max(classes - 1, 1))
    # A single class has no others that could take epsilon.
    softened[target] = 1 - calibration.epsilon if classes > 1 else 1
    share = calibration.blend_weight if policy == "blend" else 0
    return share * soft + (1 - share) * softened


def mixed(mix, targets, seed):
    images = torch.zeros(len(targets), 3, 6, 7)
    rng = np.random.default_rng(seed)
    if isinstance(mix, SelfMix):
        return mix(images, targets, crops_per_image=CROPS_PER_IMAGE, rng=rng)[1]
    return mix(images, targets, rng=rng)[1]


def shares(mix, seed):
    """How much of crop j is in crop i after mixing: what it makes of one-hot targets, a class for each crop."""
    one_hot = SoftTargets(
        index=torch.arange(NUM_CROPS)[:, None],
        weight=torch.ones(NUM_CROPS, 1),
        floor=torch.zeros(NUM_CROPS),
        num_classes=NUM_CROPS,
    )
    return mixed(mix, one_hot, seed).dense().double().numpy()


@settings(deadline=None, max_examples=200)
@given(
    CALIBRATIONS, st.integers(1, 40), st.integers(0, 2**31), st.floats(0, 12), st.lists(MIXES, max_size=3), st.data()
)
def test_sparse_equals_dense_under_every_composition(calibration, classes, seed, peak, mixes, data):
    k = data.draw(st.integers(1, min(classes, 6)))
    index, prob = stored_labels(classes, k, seed, peak)
    rng = np.random.default_rng(seed)
    bucket, target = rng.integers(0, 4, NUM_CROPS).astype(np.uint8), rng.integers(-1, classes, NUM_CROPS)
    codes = crop_policies(calibration, bucket, index[:, 0], target)
    labels = {"class_index": index, "class_prob": prob, "codes": codes, "target": target}
    targets = calibrate(calibration, **labels, num_classes=classes)
    rows = zip(index, prob, codes, target, strict=True)
    dense = np.stack([calibrated(calibration, *row, classes) for row in rows])
    for step, mix in enumerate(mixes):
        targets = mixed(mix, targets, (seed, step))
        dense = shares(mix, (seed, step)) @ dense

    entries = (k + calibration.needs_target) * 2 ** len(mixes)
    assert targets.index.shape == targets.weight.shape == (NUM_CROPS, entries)
    assert targets.floor.shape == (NUM_CROPS,)
    total = targets.weight.double().sum(1) + targets.floor.double() * classes
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)
    np.testing.assert_allclose(targets.dense().numpy(), dense, atol=2e-6)
    assert targets.dense().min() >= 0


@settings(deadline=None)
@given(st.builds(SelfMix, prob=PROB, alpha=ALPHA, per=PER, mode=MODES), st.integers(0, 2**31))
def test_selfmix_never_mixes_the_targets_of_two_images(selfmix, seed):
    image = np.arange(NUM_CROPS) // CROPS_PER_IMAGE
    strangers = image[:, None] != image
    assert (shares(selfmix, seed)[strangers] == 0).all()
