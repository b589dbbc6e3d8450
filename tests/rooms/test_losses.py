from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from ferkd_data.errors import UsageError
from ferkd_data.losses import SoftTargetLoss, entropy, kl_div, soft_cross_entropy
from ferkd_data.selfmix import SelfMix
from ferkd_data.targets import SoftTargets, recover


def random_targets(rows, classes, entries, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(rows, entries, generator=generator)
    share = torch.rand(rows, 1, generator=generator)
    return SoftTargets(
        index=torch.randint(0, classes, (rows, entries), generator=generator),
        weight=weight / weight.sum(dim=1, keepdim=True) * share,
        floor=(1 - share[:, 0]) / classes,
        num_classes=classes,
    )


def confident_targets(rows=256, classes=1000, entries=5):
    """A sharp teacher's: the tail is stored as 0 while a little mass is missing, so its weights are -floor."""
    rng = np.random.default_rng(0)
    prob = np.zeros((rows, entries), np.float16)
    prob[:, 0] = 1 - rng.integers(1, 40, rows) / 2048
    weight, floor = recover(prob, num_classes=classes)
    return SoftTargets(
        index=torch.from_numpy(np.argsort(rng.random((rows, 10)))[:, :entries].copy()),
        weight=torch.from_numpy(weight),
        floor=torch.from_numpy(floor),
        num_classes=classes,
    )


def peak_bytes(work):
    """The most that was held at once of what `work` allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).max())


def test_forward_and_backward_need_one_buffer_of_the_logits_size():
    rows, classes = 64, 21_841
    targets = random_targets(rows, classes, 12)
    logits = torch.randn(rows, classes, requires_grad=True)
    one_buffer = logits.nbytes
    assert peak_bytes(lambda: soft_cross_entropy(logits, targets).backward()) < 1.1 * one_buffer
    logits.grad = None
    # The measure sees a dense target where there is one.
    assert peak_bytes(lambda: functional.cross_entropy(logits, targets.dense()).backward()) > 1.9 * one_buffer


def test_gradients_by_finite_differences():
    targets = random_targets(3, 7, 4)
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(lambda z, r=reduction: soft_cross_entropy(z, targets, reduction=r), logits)
    assert torch.autograd.gradcheck(lambda z: kl_div(z, targets, temperature=3.0), logits)
    half = SoftTargets(index=targets.index, weight=targets.weight / 2, floor=targets.floor, num_classes=7)
    assert torch.autograd.gradcheck(lambda z: soft_cross_entropy(z, half), logits)


def test_backward_twice_adds_up():
    targets = random_targets(4, 9, 3)
    logits = torch.randn(4, 9, requires_grad=True)
    loss = soft_cross_entropy(logits, targets)
    loss.backward(retain_graph=True)
    once = logits.grad.clone()
    loss.backward()
    torch.testing.assert_close(logits.grad, 2 * once)


def test_logits_far_from_zero():
    targets = random_targets(4, 1000, 3)
    logits = torch.randn(4, 1000) + 1e4
    expected = -(targets.dense().double() * logits.double().log_softmax(1)).sum(1)
    torch.testing.assert_close(
        soft_cross_entropy(logits, targets, reduction="none").double(), expected, rtol=2e-5, atol=0
    )


def test_a_sharp_teachers_divergence_is_finite():
    targets = confident_targets()
    assert (targets.weight < 0).any()
    images, selfmix = torch.zeros(256, 3, 4, 4), SelfMix(prob=1.0, mode="mixup", per="sample")
    for seed in range(3):
        _, targets = selfmix(images, targets, crops_per_image=4, rng=np.random.default_rng(seed))
    logits = torch.randn(256, 1000)
    dense = targets.dense()
    expected = functional.kl_div(logits.log_softmax(1), dense, reduction="batchmean")
    assert expected.isfinite()
    torch.testing.assert_close(kl_div(logits, targets), expected)
    torch.testing.assert_close(entropy(targets), -torch.xlogy(dense, dense).sum(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("classes", "entries"), [(2, 9), (6, 6), (1000, 1), (1000, 96)])
def test_entropy_whether_entries_or_classes_are_more(classes, entries):
    targets = random_targets(5, classes, entries, seed=entries)
    dense = targets.dense().double()
    expected = -torch.xlogy(dense, dense).sum(1).float()
    torch.testing.assert_close(entropy(targets), expected, atol=1e-5, rtol=1e-5)


def test_the_divergence_of_half_precision_logits_is_that_of_their_values():
    targets = random_targets(8, 50, 4)
    logits = (torch.randn(8, 50) * 4).bfloat16()
    torch.testing.assert_close(
        kl_div(logits, targets, temperature=3.0), kl_div(logits.float(), targets, temperature=3.0)
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("classes", [10, 21_841])
def test_reductions_under_autocast(classes, reduction):
    """The linear layer's bfloat16 logits, against the dense losses of their values in float32."""
    targets = random_targets(6, classes, 8)
    dense, torchs = targets.dense(), "batchmean" if reduction == "mean" else reduction
    pairs = (
        (
            lambda z: soft_cross_entropy(z, targets, reduction=reduction),
            lambda z: functional.cross_entropy(z, dense, reduction=reduction),
        ),
        (
            lambda z: kl_div(z, targets, reduction=reduction),
            lambda z: functional.kl_div(z.log_softmax(1), dense, reduction=torchs),
        ),
    )
    layer, features = torch.nn.Linear(5, classes), torch.randn(6, 5) * 4
    for ours, reference in pairs:
        with torch.autocast("cpu", torch.bfloat16):
            logits = layer(features)
            loss = ours(logits)
        assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
        plain = logits.detach().float().requires_grad_()
        expected = reference(plain)
        if reduction == "none":
            expected = expected if expected.dim() == 1 else expected.sum(1)
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), plain)
        torch.testing.assert_close(gradient.float(), expected_gradient, atol=1e-6, rtol=1 / 128)


@pytest.mark.parametrize("classes", [7, 1000])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_one_temperature_softens_both_sides(classes, temperature):
    """Against the softmax of a teacher's logits at that temperature, as distillation is usually written."""
    generator = torch.Generator().manual_seed(classes)
    teacher, student = (torch.randn(6, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    prob = teacher.softmax(1)
    expected = temperature**2 * functional.kl_div(
        (student / temperature).log_softmax(1), (teacher / temperature).softmax(1), reduction="batchmean"
    )
    sparse = SoftTargets(
        index=torch.arange(classes).repeat(6, 1), weight=prob, floor=torch.zeros(6).double(), num_classes=classes
    )
    for targets in (sparse, prob):
        torch.testing.assert_close(kl_div(student, targets, temperature=temperature), expected)
        one_sided = kl_div(student, targets, temperature=temperature, target_temperature=1)
        plain = functional.kl_div((student / temperature).log_softmax(1), prob, reduction="batchmean")
        torch.testing.assert_close(one_sided, temperature**2 * plain)


@pytest.mark.parametrize(("classes", "entries"), [(2, 9), (6, 6), (1000, 1), (1000, 96)])
def test_tempered_targets_are_the_tempered_dense_ones(classes, entries):
    targets = random_targets(5, classes, entries, seed=entries)
    for temperature in (0.5, 1, 3):
        powers = targets.dense().double().pow(1 / temperature)
        expected = (powers / powers.sum(1, keepdim=True)).float()
        tempered = targets.tempered(temperature)
        torch.testing.assert_close(tempered.dense(), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(tempered.total(), torch.ones(5))


def test_sharp_targets_are_tempered_without_nan():
    targets = confident_targets()
    logits = torch.randn(256, 1000)
    for temperature in (0.05, 2, 50):
        sparse, dense = (kl_div(logits, t, temperature=temperature) for t in (targets, targets.dense()))
        assert sparse.isfinite()
        torch.testing.assert_close(sparse, dense, atol=1e-3, rtol=1e-3)


def test_dense_targets_give_what_sparse_ones_give():
    targets, logits = random_targets(8, 50, 4), torch.randn(8, 50)
    torch.testing.assert_close(entropy(targets.dense()), entropy(targets), atol=1e-5, rtol=1e-5)
    for temperature in (1.0, 3.0):
        torch.testing.assert_close(
            kl_div(logits, targets.dense(), temperature=temperature), kl_div(logits, targets, temperature=temperature)
        )


def test_the_loss_as_a_module():
    targets, logits = random_targets(8, 50, 4), torch.randn(8, 50)
    hard = torch.tensor([3, -1, 7, 7, -1, 0, 1, 2])
    known = replace(targets, hard=hard)
    loss = SoftTargetLoss()
    torch.testing.assert_close(loss(logits, targets), soft_cross_entropy(logits, targets))
    torch.testing.assert_close(loss(logits, targets.dense()), soft_cross_entropy(logits, targets))
    warm = SoftTargetLoss(temperature=4, reduction="sum")
    torch.testing.assert_close(warm(logits, targets), kl_div(logits, targets, temperature=4, reduction="sum"))
    mixed = SoftTargetLoss(temperature=2, hard_weight=0.25)
    expected = 0.75 * kl_div(logits, targets, temperature=2) + 0.25 * functional.cross_entropy(
        logits, hard, ignore_index=-1
    )
    torch.testing.assert_close(mixed(logits, known), expected)
    unknown = replace(targets, hard=torch.full((8,), -1))
    torch.testing.assert_close(mixed(logits, unknown), 0.75 * kl_div(logits, targets, temperature=2))
    assert repr(mixed) == "SoftTargetLoss(temperature=2, hard_weight=0.25, reduction='mean')"
    with pytest.raises(UsageError, match=r"hard_weight needs the ground truth"):
        mixed(logits, targets)
    for settings in ({"hard_weight": 1.5}, {"temperature": 0}, {"reduction": "batchmean"}):
        with pytest.raises(UsageError):
            SoftTargetLoss(**settings)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_module_counts_both_ground_truths_of_a_mixed_crop(reduction):
    """As torch's cross-entropy of the mixed one-hot ground truths, over the shares that are known."""
    hard, partner = torch.tensor([3, -1, 7, -1]), torch.tensor([1, 0, 3, 2])
    targets = replace(random_targets(4, 9, 3), hard=hard, hard_partner=hard, hard_share=torch.ones(4))
    mixed = targets.mix(partner, torch.tensor([0.75, 0.6, 0.3, 0.2]))
    logits = torch.randn(4, 9)
    one_hot = torch.eye(10)[hard][:, :9]
    share = torch.tensor([0.75, 0.6, 0.3, 0.2])[:, None]
    dense = share * one_hot + (1 - share) * one_hot[partner]
    each = functional.cross_entropy(logits, dense, reduction="none")
    expected = {"mean": each.sum() / dense.sum(), "sum": each.sum(), "none": each}[reduction]
    torch.testing.assert_close(SoftTargetLoss(hard_weight=1, reduction=reduction)(logits, mixed), expected)


def test_half_precision_targets_lose_little():
    targets, logits = random_targets(8, 50, 4), torch.randn(8, 50)
    for half in (targets.half(), targets.bfloat16()):
        for loss in (soft_cross_entropy, kl_div):
            torch.testing.assert_close(loss(logits, half), loss(logits, targets), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("of_logits", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_targets", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("rows", [0, 7])
def test_gradients_for_every_pair_of_types_are_those_of_float64(of_logits, of_targets, form, rows):
    """Of the very targets that are given: their rounding is no error of the loss."""
    precision = torch.promote_types(of_logits, torch.float32)
    targets = random_targets(8, 1000, 5).to(of_targets)[:rows]
    dense = targets.double().dense()
    if form == "dense":
        dense, targets = targets.dense().double(), targets.dense()
    logits = (3 * torch.randn(rows, 1000)).to(of_logits).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    loss = soft_cross_entropy(logits, targets, reduction="sum")
    reference = -(dense * exact.log_softmax(dim=1)).sum()
    loss.backward()
    reference.backward()
    assert loss.dtype == precision
    torch.testing.assert_close(loss.double(), reference, atol=1e-5, rtol=1e-5)
    # One rounding, to the logits' own type.
    torch.testing.assert_close(logits.grad, exact.grad.to(of_logits), atol=1e-6, rtol=torch.finfo(of_logits).eps + 1e-5)


def test_dense_targets_are_not_broadcast():
    with pytest.raises(UsageError, match=r"\(3, 7\), the targets need \(1, 7\)"):
        soft_cross_entropy(torch.randn(3, 7), torch.rand(1, 7))
    with pytest.raises(UsageError, match=r"targets must be SoftTargets or a tensor \(B, C\), got list"):
        soft_cross_entropy(torch.zeros(2, 5), [0, 1])
    with pytest.raises(UsageError, match=r"logits must be a tensor \(B, C\), got tuple"):
        soft_cross_entropy((torch.randn(3, 7),), torch.rand(3, 7))
    with pytest.raises(UsageError, match="class numbers"):
        soft_cross_entropy(torch.randn(3, 7), torch.arange(3))
    with pytest.raises(UsageError, match="temperature must be positive"):
        kl_div(torch.randn(2, 5), random_targets(2, 5, 1), temperature=0)


def test_a_loss_of_pytorch_says_what_takes_soft_targets():
    targets = SoftTargets(index=torch.tensor([[1]]), weight=torch.ones(1, 1), floor=torch.zeros(1), num_classes=3)
    for loss in (torch.nn.CrossEntropyLoss(), torch.nn.functional.mse_loss, torch.add):
        with pytest.raises(UsageError, match=r'takes tensors, and these are SoftTargets.*targets="dense"'):
            loss(torch.zeros(1, 3), targets)
