from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ferkd_data.calibration import Calibration, calibrate, calibration_at, crop_buckets, crop_policies, use_probability
from ferkd_data.errors import UsageError
from ferkd_data.labels.buckets import Thresholds
from ferkd_data.losses import entropy, kl_div, soft_cross_entropy
from ferkd_data.mixing import CutMix, Mixup
from ferkd_data.normalization import normalize
from ferkd_data.selfmix import SelfMix, partners
from ferkd_data.targets import RECOVERIES, SoftTargets, recover


def top_k(rows, classes, k, seed, peak=3.0):
    """class_index, class_prob (rows, k) of random distributions, stored as float16."""
    rng = np.random.default_rng(seed)
    prob = np.exp(rng.normal(size=(rows, classes)) * peak)
    prob = (prob / prob.sum(axis=1, keepdims=True)).astype(np.float16)
    index = np.argsort(-prob, axis=1, kind="stable")[:, :k]
    return index.astype(np.uint16), np.take_along_axis(prob, index, axis=1)


def dense_recovery(index, prob, classes, mode):
    """FKD's four ways, written out class by class, for rows whose sum does not pass 1."""
    target = np.zeros((len(index), classes))
    for row, (classes_of, prob_of) in enumerate(zip(index, prob.astype(np.float64), strict=True)):
        if mode == "hard":
            target[row, classes_of[0]] = 1
        elif mode == "renorm":
            target[row, classes_of] = prob_of / prob_of.sum()
        elif mode == "smooth":
            rest = classes - len(classes_of)
            target[row] = (1 - prob_of.sum()) / rest if rest else 0
            target[row, classes_of] = prob_of
        else:
            target[row] = (1 - prob_of[0]) / (classes - 1)
            target[row, classes_of[0]] = prob_of[0]
    return target


def as_targets(index, weight, floor, classes):
    return SoftTargets(
        index=torch.from_numpy(index.astype(np.int64)),
        weight=torch.from_numpy(weight),
        floor=torch.from_numpy(floor),
        num_classes=classes,
    )


CASES = st.tuples(st.integers(2, 30), st.integers(0, 2**32 - 1)).flatmap(
    lambda case: st.tuples(st.just(case[0]), st.integers(1, case[0]), st.just(case[1]))
)


@pytest.mark.parametrize("mode", RECOVERIES)
@settings(deadline=None)
@given(case=CASES)
def test_recovery_is_fkds(mode, case):
    classes, k, seed = case
    index, prob = top_k(5, classes, k, seed)
    weight, floor = recover(prob, num_classes=classes, mode=mode)
    dense = as_targets(index, weight, floor, classes).dense().numpy()
    # Where float16 took the sum above 1, or k is C, every mode normalises.
    np.testing.assert_allclose(dense, dense_recovery(index, prob, classes, mode), atol=3e-3)
    np.testing.assert_allclose(dense.sum(axis=1), 1, atol=1e-5)
    assert dense.min() >= -1e-7


@settings(deadline=None)
@given(CASES, st.floats(0.3, 5))
def test_temperature_is_a_power_of_the_recovered_distribution(case, temperature):
    classes, k, seed = case
    index, prob = top_k(4, classes, k, seed, peak=1.0)
    plain = as_targets(index, *recover(prob, num_classes=classes), classes).dense().numpy().astype(np.float64)
    tempered = as_targets(index, *recover(prob, num_classes=classes, temperature=temperature), classes).dense().numpy()
    expected = np.maximum(plain, 0) ** (1 / temperature)
    np.testing.assert_allclose(tempered, expected / expected.sum(axis=1, keepdims=True), atol=2e-3)


def random_targets(rows, classes, entries, seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, classes, (rows, entries), generator=generator)
    weight = torch.rand(rows, entries, generator=generator)
    share = torch.rand(rows, 1, generator=generator)
    weight = weight / weight.sum(dim=1, keepdim=True) * share
    return SoftTargets(index=index, weight=weight, floor=(1 - share[:, 0]) / classes, num_classes=classes)


@settings(deadline=None)
@given(st.integers(1, 6), st.sampled_from([2, 10, 1000, 21841]), st.integers(1, 12), st.integers(0, 2**31))
def test_sparse_losses_equal_dense_ones_with_their_gradients(rows, classes, entries, seed):
    targets = random_targets(rows, classes, entries, seed)
    dense = targets.dense()
    torch.testing.assert_close(dense.sum(1), torch.ones(rows), atol=1e-5, rtol=0)
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * 3
    # In float32, PyTorch's own gradient errs by 2e-5 with 21,841 classes.
    dense = dense.double()
    for ours, reference in (
        (lambda z: soft_cross_entropy(z, targets), lambda z: torch.nn.functional.cross_entropy(z, dense)),
        (
            lambda z: kl_div(z, targets, temperature=2.0, target_temperature=1.0),
            lambda z: torch.nn.functional.kl_div((z / 2).log_softmax(1), dense, reduction="batchmean") * 4,
        ),
    ):
        a, b = logits.clone().requires_grad_(), logits.double().requires_grad_()
        loss_a, loss_b = ours(a), reference(b)
        torch.testing.assert_close(loss_a.double(), loss_b, atol=1e-5, rtol=1e-5)
        loss_a.backward()
        loss_b.backward()
        torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-5, rtol=1e-5)


def test_loss_reductions_autocast_and_dense_targets():
    targets = random_targets(5, 10, 3, 0)
    logits = torch.randn(5, 10)
    each = soft_cross_entropy(logits, targets, reduction="none")
    assert each.shape == (5,)
    torch.testing.assert_close(soft_cross_entropy(logits, targets, reduction="sum"), each.sum())
    torch.testing.assert_close(soft_cross_entropy(logits, targets.dense()), each.mean())
    half = logits.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = soft_cross_entropy(half, targets)
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, soft_cross_entropy(half.detach().float(), targets))
    with pytest.raises(UsageError, match="the targets need"):
        soft_cross_entropy(torch.randn(5, 11), targets)
    with pytest.raises(UsageError, match="reduction"):
        soft_cross_entropy(logits, targets, reduction="median")


def test_entropy_adds_up_entries_of_one_class():
    targets = random_targets(7, 6, 9, 3)
    dense = targets.dense()
    torch.testing.assert_close(entropy(targets), -(dense * dense.log()).sum(1), atol=1e-5, rtol=1e-5)


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
    temperature=st.floats(0.5, 4),
)


@settings(deadline=None, max_examples=150)
@given(CALIBRATIONS, CASES, st.integers(0, 3))
def test_targets_stay_sparse_and_sum_to_one_under_every_composition(calibration, case, layers):
    """Invariant 5: recovery, calibration, SelfMix, CutMix and Mixup, in a row."""
    classes, k, seed = case
    rng = np.random.default_rng(seed)
    index, prob = top_k(8, classes, k, seed)
    codes = rng.integers(0, 4, 8).astype(np.uint8)
    target = rng.integers(-1, classes, 8)
    targets = calibrate(
        calibration, class_index=index, class_prob=prob, codes=codes, target=target, num_classes=classes
    )
    assert targets.index.shape[1] == k + calibration.needs_target
    images = torch.zeros(8, 3, 6, 6, dtype=torch.uint8)
    steps = [
        lambda x, t: SelfMix(prob=1.0)(x, t, crops_per_image=4, rng=rng),
        lambda x, t: CutMix(per="sample")(x, t, rng=rng),
        lambda x, t: Mixup(prob=0.7)(x, t, rng=rng),
    ]
    for step in steps[:layers]:
        before = targets.dense()
        images, targets = step(images, targets)
        assert targets.dense().shape == before.shape
    torch.testing.assert_close(targets.total(), torch.ones(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(targets.dense().sum(1), torch.ones(8), atol=1e-5, rtol=0)
    assert targets.dense().min() > -1e-6


def one_crop(calibration, bucket, target=3, prob=(0.6, 0.3), index=(1, 3)):
    return (
        calibrate(
            calibration,
            class_index=np.array([index], np.uint16),
            class_prob=np.array([prob], np.float16),
            codes=np.array([bucket], np.uint8),
            target=np.array([target]),
            num_classes=5,
        )
        .dense()[0]
        .numpy()
    )


def test_what_each_policy_makes_of_a_crop():
    soft = np.array([0.1 / 3, 0.6, 0.1 / 3, 0.3, 0.1 / 3])
    softened = np.array([0.025, 0.025, 0.025, 0.9, 0.025])
    ferkd = Calibration.ferkd()
    for bucket, expected in enumerate([softened, softened, soft, soft]):
        np.testing.assert_allclose(one_crop(ferkd, bucket), expected, atol=5e-4)
    for bucket in range(4):
        np.testing.assert_allclose(one_crop(Calibration.fkd(), bucket), soft, atol=5e-4)
    blend = Calibration(hard_positive="blend", blend_weight=0.25)
    np.testing.assert_allclose(one_crop(blend, 2), 0.25 * soft + 0.75 * softened, atol=5e-4)
    np.testing.assert_allclose(one_crop(ferkd, 1, target=-1), soft, atol=5e-4)
    kept = Calibration(all_discarded="keep")
    np.testing.assert_allclose(one_crop(kept, 0), soft, atol=5e-4)


def test_policies_use_and_thresholds():
    bucket = np.array([0, 1, 2, 3, 2, 3], np.uint8)
    top1, target = np.array([0, 0, 7, 7, 1, 1]), np.array([7, 7, 7, 7, 7, -1])
    calibration = Calibration(easy_positive="thin(0.25)", confident_but_wrong="discard")
    codes = crop_policies(calibration, bucket, top1, target)
    assert codes.tolist() == [0, 1, 2, 3, 4, 3]
    assert use_probability(calibration, codes).tolist() == [0, 1, 1, 0.25, 0, 0.25]
    assert crop_policies(Calibration(), bucket, top1, target) is bucket
    prob = np.array([[0.5, 0.1], [0.05, 0.01]], np.float16)
    other = Calibration(thresholds=Thresholds(low=0.1, mid=0.2, top=0.4))
    stored = np.array([1, 1], np.uint8)
    assert crop_buckets(other, stored, prob, prob[:, 0]).tolist() == [3, 0]
    assert crop_buckets(Calibration(), stored, prob, prob[:, 0]) is stored


def test_settings_that_cannot_be_right():
    for wrong in (
        {"extreme_hard": "drop"},
        {"easy_positive": "thin(0)"},
        {"easy_positive": "thin(2)"},
        {"confident_but_wrong": "x"},
        {"all_discarded": "discard"},
        {"epsilon": 2},
        {"recovery": "x"},
        {"temperature": 0},
    ):
        with pytest.raises(UsageError):
            Calibration(**wrong)
    for make in (lambda: SelfMix(prob=2), lambda: CutMix(alpha=0), lambda: Mixup(per="x"), lambda: SelfMix(mode="x")):
        with pytest.raises(UsageError):
            make()
    with pytest.raises(UsageError, match="fkd, ferkd or blend"):
        calibration_at("ferdk", 0)
    assert calibration_at(lambda epoch: Calibration(epsilon=epoch / 10), 3).epsilon == 0.3
    assert calibration_at("fkd", 0) == Calibration.fkd()


def painted(groups, crops, dtype):
    """Crops of one image all have that image's number as their pixels, plus a little for the crop."""
    value = torch.arange(groups).repeat_interleave(crops) * 10
    value = value + torch.arange(crops).repeat(groups)
    images = value[:, None, None, None].expand(-1, 3, 16, 20).to(dtype).clone()
    targets = SoftTargets(
        index=torch.arange(groups * crops)[:, None],
        weight=torch.ones(groups * crops, 1),
        floor=torch.zeros(groups * crops),
        num_classes=groups * crops,
    )
    return images, targets


@pytest.mark.parametrize("mode", ["cutmix", "mixup", "both"])
@pytest.mark.parametrize("per", ["batch", "sample"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("inplace", [False, True])
def test_selfmix_mixes_within_an_image_and_by_the_share_it_says(mode, per, dtype, inplace):
    selfmix = SelfMix(prob=1.0, mode=mode, per=per)
    for seed in range(10):
        images, targets = painted(6, 4, dtype)
        before = images.clone()
        mixed, after = selfmix(images, targets, crops_per_image=4, rng=np.random.default_rng(seed), inplace=inplace)
        assert (mixed is images) == inplace
        assert inplace or torch.equal(images, before)
        image_of = torch.arange(24) // 4
        assert torch.equal(mixed.float().div(10).floor().long().amax((1, 2, 3)), image_of)
        assert torch.equal(mixed.float().div(10).floor().long().amin((1, 2, 3)), image_of)
        assert torch.equal(after.index[:, 1] // 4, image_of)
        assert (after.index[:, 1] != after.index[:, 0]).all()
        own, other = after.weight[:, 0], before[after.index[:, 1], 0, 0, 0].float()
        mean = mixed.float().mean((1, 2, 3))
        expected = own * before[:, 0, 0, 0].float() + (1 - own) * other
        tolerance = 0.51 if dtype == torch.uint8 else 1e-3
        torch.testing.assert_close(mean, expected, atol=tolerance, rtol=0)
        if mode == "cutmix":
            pasted = (mixed != before).any(1).float().mean((1, 2))
            torch.testing.assert_close(own, 1 - pasted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mix", [CutMix(), CutMix(per="sample"), Mixup(), Mixup(per="sample", prob=0.5)])
def test_mixing_strangers_is_deterministic_and_dense_agrees(mix):
    images, targets = painted(4, 2, torch.uint8)
    a = mix(images, targets, rng=np.random.default_rng(1))
    b = mix(images, targets, rng=np.random.default_rng(1))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1].dense(), b[1].dense())
    torch.testing.assert_close(a[1].dense().sum(1), torch.ones(8))


def test_probability_zero_changes_nothing():
    images, targets = painted(2, 2, torch.uint8)
    mixed, after = SelfMix(prob=0.0)(images, targets, crops_per_image=2, rng=np.random.default_rng(0))
    assert torch.equal(mixed, images)
    torch.testing.assert_close(after.dense(), targets.dense())
    with pytest.raises(UsageError, match="at least 2 crops"):
        partners(4, 1, np.random.default_rng(0))
    with pytest.raises(UsageError, match="5 crops in groups of 4"):
        partners(5, 4, np.random.default_rng(0))


def test_normalize():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    ours = normalize(images, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(ours, (images / 255 - mean) / std, atol=1e-5, rtol=1e-5)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert normalize(images, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_targets_move_slice_and_join():
    targets = random_targets(6, 9, 3, 1)
    assert len(targets[2:5]) == 3 and torch.equal(targets[torch.tensor([1])].dense(), targets.dense()[1:2])
    assert torch.equal(SoftTargets.cat([targets[:2], targets[2:]]).dense(), targets.dense())
    assert targets.to("cpu").device.type == "cpu"


def test_targets_with_other_numbers_of_entries_join():
    parts = [random_targets(3, 9, entries, entries) for entries in (2, 5, 1)]
    joined = SoftTargets.cat(parts)
    assert joined.index.shape == joined.weight.shape == (9, 5)
    assert torch.equal(joined.dense(), torch.cat([part.dense() for part in parts]))


def test_targets_of_other_classes_do_not_join():
    with pytest.raises(UsageError, match="targets of 9 and 12 classes cannot be joined"):
        SoftTargets.cat([random_targets(2, 12, 3, 1), random_targets(2, 9, 3, 1)])
    with pytest.raises(UsageError, match="no targets to join"):
        SoftTargets.cat([])


def test_a_number_selects_the_targets_of_one_crop():
    targets = random_targets(3, 9, 3, 1)
    for one in (targets[1], targets[-2], targets[np.int64(1)], list(targets)[1]):
        assert len(one) == 1 and torch.equal(one.dense(), targets.dense()[1:2])
    assert len(list(targets)) == 3 and "1 rows" in repr(targets[0])
    for several in ([0, 2], np.array([0, 2])):
        assert torch.equal(targets[several].dense(), targets.dense()[[0, 2]])
    for none in ([], np.array([]), slice(0, 0), [False] * 3):
        assert len(targets[none]) == 0
    with pytest.raises(IndexError):
        targets[3]


FULL = {"hard": torch.tensor([1, -1]), "hard_share": torch.ones(2), "bucket": torch.tensor([3, 0], dtype=torch.uint8)}


def full_targets():
    return replace(random_targets(2, 5, 3, seed=1), keys=("a", "b"), **FULL)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.to(torch.float16),
        lambda t: t.half(),
        lambda t: t.to("cpu", torch.float16),
        lambda t: t.to("cpu", torch.float16, True),
        lambda t: t.to(device="cpu", dtype=torch.float16, non_blocking=True),
        lambda t: t.to(dtype=torch.float16),
        lambda t: t.to(torch.zeros(1, dtype=torch.float16)),
        lambda t: t.to(t.half()),
        lambda t: t.to(tensor=torch.zeros(1, dtype=torch.float16)),
    ],
)
def test_a_type_changes_probabilities_and_no_class_numbers(change):
    before = full_targets()
    after = change(before)
    assert after.dtype == after.weight.dtype == after.floor.dtype == after.hard_share.dtype == torch.float16
    for name in ("index", "hard", "bucket"):
        assert torch.equal(getattr(after, name), getattr(before, name))
        assert getattr(after, name).dtype == getattr(before, name).dtype
    assert after.keys == before.keys and after.dense().dtype == torch.float16


def test_a_move_changes_no_type():
    before = full_targets()
    for after in (before.to("cpu"), before.to(torch.device("cpu"), non_blocking=True), before.cpu(), before.to("meta")):
        assert (after.index.dtype, after.weight.dtype, after.bucket.dtype) == (torch.int64, torch.float32, torch.uint8)
    assert after.device.type == after.hard.device.type == after.bucket.device.type == "meta"
    assert before.double().float().bfloat16().dtype == torch.bfloat16
    copied = before.to("cpu", copy=True)
    assert copied.index.data_ptr() != before.index.data_ptr() and torch.equal(copied.index, before.index)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_probabilities_do_not_become_integers(dtype):
    with pytest.raises(UsageError, match="their type must be floating-point"):
        full_targets().to(dtype)
