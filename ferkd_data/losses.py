"""Losses on sparse targets, computed without making targets of shape (B, C).

Legend: B crops, C classes, K sparse entries.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ferkd_data.errors import UsageError
from ferkd_data.labels.rows import UNKNOWN_TARGET
from ferkd_data.targets import SoftTargets, check_positive

Reduction: TypeAlias = Literal["mean", "sum", "none"]
SMALLEST_SHARE = 1e-6
"""Lower bound of the crops over which a mean is taken: below any share of a mixed crop that images can hold."""


def soft_cross_entropy(logits: Tensor, targets: SoftTargets | Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Cross-entropy with soft targets, in nats: -sum over classes of target * log_softmax(logits).

    logits: (B, C), any floating-point type. targets: SoftTargets of B crops, or dense ones (B, C). Gives a scalar, or
    (B,) with reduction="none".

    Computed in float32 (float64 for logits of that type), also under autocast. Sparse targets stay sparse: forward and
    backward hold one array (B, C) each. Raises UsageError where the shapes do not fit, and for class numbers (B,).

    >>> import torch
    >>> fd.soft_cross_entropy(torch.zeros(1, 4), torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    tensor(1.3863)
    """
    _check(logits, targets)
    # Targets of any type: in half precision, the sums of the backward pass would differ from those of the forward pass.
    precision = _precision(logits)
    if isinstance(targets, Tensor):
        loss = -(targets.to(precision) * logits.log_softmax(dim=1, dtype=precision)).sum(dim=1)
    else:
        weight, floor = targets.weight.to(precision), targets.floor.to(precision)
        loss = _SparseCrossEntropy.apply(logits, targets.index, weight, floor)
    return _reduce(loss, reduction)


def kl_div(
    logits: Tensor,
    targets: SoftTargets | Tensor,
    *,
    temperature: float = 1.0,
    target_temperature: float | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """T^2 * KL(target_T || softmax(logits / T)) of logits (B, C), with one temperature T on both sides.

    target_T is the target with every probability raised to 1/T and divided by their sum (`SoftTargets.tempered`), as a
    teacher's softmax at T would give it. T^2 keeps the size of the gradients (Hinton, Vinyals and Dean, 2015). With
    T = 1 it is the plain KL divergence; "mean" is over the B rows (PyTorch's "batchmean").

    target_temperature: another temperature for the targets. 1 leaves them as they are: for targets that were softened
        when they were made, with `Calibration(temperature=T)`.

    Takes SoftTargets or dense targets (B, C). Raises UsageError where shapes do not fit, and for a temperature that is
    not positive and finite.

    >>> import torch
    >>> targets = torch.tensor([[0.15, 0.05, 0.75, 0.05]])
    >>> fd.kl_div(torch.zeros(1, 4), targets, temperature=4)
    tensor(0.6744)
    """
    check_positive("temperature", temperature)
    target_temperature = temperature if target_temperature is None else target_temperature
    check_positive("target_temperature", target_temperature)
    _check(logits, targets)
    if temperature != 1:
        logits = logits.to(_precision(logits)) / temperature
    if target_temperature != 1:
        targets = _tempered(targets, target_temperature)
    # KL(t || p) = H(t, p) - H(t), so that one implementation serves both losses.
    loss = soft_cross_entropy(logits, targets, reduction="none") - entropy(targets)
    return _reduce(loss * temperature**2, reduction)


def entropy(targets: SoftTargets | Tensor) -> Tensor:
    """Compute the entropy (B,) of each target, in nats."""
    if isinstance(targets, Tensor):
        # xlogy(0, 0) is 0, where 0 * log 0 is NaN.
        return -torch.xlogy(targets.to(_precision(targets)), targets).sum(dim=1)
    targets = targets.to(_precision(targets.weight))
    _, prob = targets.merged()
    # An entry left over by `merged` has the floor's probability, so it may stand for any one of the other classes.
    others = targets.num_classes - prob.shape[1]
    return -torch.xlogy(prob, prob).sum(dim=1) - others * torch.xlogy(targets.floor, targets.floor)


class SoftTargetLoss(nn.Module):
    """A training loss on SoftTargets or dense targets (B, C), as a module.

    soft_cross_entropy at temperature 1, else `kl_div` at that temperature on both sides. With `hard_weight` above 0,
    (1 - hard_weight) of that and hard_weight of the cross-entropy with the ground truth in `targets.hard`, over the
    crops whose ground truth is known. Of mixed crops, both ground truths count, by their shares.

    Raises UsageError when it is made with values out of range, and when called with shapes that do not fit or, with
    `hard_weight`, without a ground truth.

    >>> import torch
    >>> criterion = fd.SoftTargetLoss(temperature=2)
    >>> criterion(torch.zeros(1, 4), torch.tensor([[0.15, 0.05, 0.75, 0.05]]))
    tensor(0.6886)
    """

    def __init__(self, *, temperature: float = 1.0, hard_weight: float = 0.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_positive("temperature", temperature)
        if not 0 <= hard_weight <= 1:
            raise UsageError(f"hard_weight must be 0..1, got {hard_weight}")
        _check_reduction(reduction)
        self.temperature, self.hard_weight, self.reduction = temperature, hard_weight, reduction

    def forward(self, logits: Tensor, targets: SoftTargets | Tensor) -> Tensor:
        if self.temperature == 1:
            soft = soft_cross_entropy(logits, targets, reduction=self.reduction)
        else:
            soft = kl_div(logits, targets, temperature=self.temperature, reduction=self.reduction)
        if not self.hard_weight:
            return soft
        return (1 - self.hard_weight) * soft + self.hard_weight * self._hard(logits, targets)

    def _hard(self, logits: Tensor, targets: SoftTargets | Tensor) -> Tensor:
        if isinstance(targets, Tensor) or targets.hard is None:
            raise UsageError("hard_weight needs the ground truth: targets from a loader, with targets.hard")
        log_prob = logits.log_softmax(dim=1, dtype=_precision(logits))
        loss, known = _negative_log_likelihood(log_prob, targets.hard)
        if targets.hard_partner is not None and targets.hard_share is not None:
            share = targets.hard_share.to(loss.dtype)
            other, other_known = _negative_log_likelihood(log_prob, targets.hard_partner)
            loss, known = share * loss + (1 - share) * other, share * known + (1 - share) * other_known
        if self.reduction != "mean":
            return _reduce(loss, self.reduction)
        # PyTorch's own mean is NaN where no ground truth is known; here the sum of losses is 0 then.
        return loss.sum() / known.sum().clamp(min=SMALLEST_SHARE)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, hard_weight={self.hard_weight}, reduction={self.reduction!r}"


def _negative_log_likelihood(log_prob: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss (B,) of class numbers, 0 where they are unknown, and 1 or 0 (B,) for known or not."""
    loss = nn.functional.nll_loss(log_prob, target, ignore_index=UNKNOWN_TARGET, reduction="none")
    return loss, (target != UNKNOWN_TARGET).to(loss.dtype)


def _tempered(targets: SoftTargets | Tensor, temperature: float) -> SoftTargets | Tensor:
    if isinstance(targets, SoftTargets):
        return targets.to(_precision(targets.weight)).tempered(temperature)
    targets = targets.to(_precision(targets))
    # Relative to the largest, so that no power takes a whole row to 0.
    powers = (targets / targets.amax(dim=1, keepdim=True)).pow(1 / temperature)
    return powers / powers.sum(dim=1, keepdim=True)


class _SparseCrossEntropy(torch.autograd.Function):
    """The gradient is softmax * total - floor, minus the weights where they belong.

    Only the logits are kept for it: forward and backward each hold one buffer of (B, C), and none in between.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, weight: Tensor, floor: Tensor) -> Tensor:
        # The logits and not their softmax, which would be one more array (B, C) from here to the backward pass.
        ctx.save_for_backward(logits, index, weight, floor)
        log_prob = logits.log_softmax(dim=1, dtype=_precision(logits))
        # -sum_c t_c log p_c with t = floor + weight at index: the dense target is never made.
        return -(weight * log_prob.gather(1, index)).sum(dim=1) - floor * log_prob.sum(dim=1)

    @staticmethod
    # A second derivative would be wrong without a word: this refuses it.
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, index, weight, floor = ctx.saved_tensors
        # 1 but for rounding; of targets scaled by hand (a weight for each crop) it is their sum.
        total = weight.sum(dim=1) + floor * logits.shape[1]
        prob = logits.softmax(dim=1, dtype=_precision(logits))
        # Two passes: with broadcast operands, addcmul is not vectorised on a CPU.
        gradient = prob.mul_((total * grad)[:, None]).sub_((floor * grad)[:, None])
        gradient.scatter_add_(1, index, -weight * grad[:, None])
        return gradient.to(logits.dtype), None, None, None


def _precision(logits: Tensor) -> torch.dtype:
    # float32 at least: log-softmax over thousands of classes in float16 loses the small probabilities.
    return torch.promote_types(logits.dtype, torch.float32)


def _check(logits: Tensor, targets: SoftTargets | Tensor) -> None:
    if not isinstance(targets, (SoftTargets, Tensor)):
        raise UsageError(f"targets must be SoftTargets or a tensor (B, C), got {type(targets).__name__}")
    if not isinstance(logits, Tensor):
        raise UsageError(f"logits must be a tensor (B, C), got {type(logits).__name__}; give the model's logits alone")
    expected = tuple(targets.shape) if isinstance(targets, Tensor) else (len(targets), targets.num_classes)
    if isinstance(targets, Tensor) and targets.dim() == 1:
        raise UsageError("these targets are class numbers (B,), not distributions; use torch's cross_entropy for them")
    if tuple(logits.shape) != expected:
        raise UsageError(f"logits have shape {tuple(logits.shape)}, the targets need {expected}")


def _reduce(loss: Tensor, reduction: Reduction) -> Tensor:
    _check_reduction(reduction)
    if reduction == "mean":
        return loss.mean()
    if reduction == "sum":
        return loss.sum()
    return loss


def _check_reduction(reduction: str) -> None:
    if reduction not in get_args(Reduction):
        raise UsageError(f"reduction must be mean, sum or none, got {reduction!r}")
