"""Losses on sparse targets, without ever making a target of shape (B, C).

Legend: B crops, C classes, K sparse entries.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ferkd_data.errors import UsageError
from ferkd_data.targets import SoftTargets, check_positive

Reduction: TypeAlias = Literal["mean", "sum", "none"]


def soft_cross_entropy(logits: Tensor, targets: SoftTargets | Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """-sum over classes of target * log_softmax(logits), for logits (B, C) and SoftTargets or dense targets (B, C).

    Computed in float32 (float64 for logits of that type), also under autocast. Raises UsageError where the shapes do
    not fit.
    """
    _check(logits, targets)
    if isinstance(targets, Tensor):
        loss = -(targets * logits.log_softmax(dim=1, dtype=_precision(logits))).sum(dim=1)
    else:
        loss = _SparseCrossEntropy.apply(logits, targets.index, targets.weight, targets.floor)
    return _reduce(loss, reduction)


def kl_div(logits: Tensor, targets: SoftTargets, *, temperature: float = 1.0, reduction: Reduction = "mean") -> Tensor:
    """KL(target || softmax(logits / T)) * T^2; with "mean", over the B rows (PyTorch's "batchmean")."""
    check_positive("temperature", temperature)
    if temperature != 1:
        logits = logits.to(_precision(logits)) / temperature
    loss = soft_cross_entropy(logits, targets, reduction="none") - entropy(targets)
    return _reduce(loss * temperature**2, reduction)


def entropy(targets: SoftTargets) -> Tensor:
    """The entropy (B,) of each target, in nats."""
    # Entries of one class are added up in one of K places; a place left over is a class that has the floor alone.
    index, order = targets.index.sort(dim=1)
    new_class = index.diff(dim=1, prepend=index[:, :1]) != 0
    weight = torch.zeros_like(targets.weight).scatter_add_(1, new_class.cumsum(dim=1), targets.weight.gather(1, order))
    # A class stored as 0 has the weight -floor; rounding must not leave less than nothing of it.
    prob = (weight + targets.floor[:, None]).clamp_(min=0)
    others = targets.num_classes - prob.shape[1]
    return -torch.xlogy(prob, prob).sum(dim=1) - others * torch.xlogy(targets.floor, targets.floor)


class _SparseCrossEntropy(torch.autograd.Function):
    """The gradient is softmax * total - floor, minus the weights where they belong.

    Only the logits are kept for it: forward and backward each hold one buffer of (B, C), and none in between.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, weight: Tensor, floor: Tensor) -> Tensor:
        ctx.save_for_backward(logits, index, weight, floor)
        log_prob = logits.log_softmax(dim=1, dtype=_precision(logits))
        return -(weight * log_prob.gather(1, index)).sum(dim=1) - floor * log_prob.sum(dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, index, weight, floor = ctx.saved_tensors
        total = weight.sum(dim=1) + floor * logits.shape[1]
        prob = logits.softmax(dim=1, dtype=_precision(logits))
        # Two passes: with broadcast operands, addcmul is not vectorised on a CPU.
        gradient = prob.mul_((total * grad)[:, None]).sub_((floor * grad)[:, None])
        gradient.scatter_add_(1, index, -weight * grad[:, None])
        return gradient.to(logits.dtype), None, None, None


def _precision(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _check(logits: Tensor, targets: SoftTargets | Tensor) -> None:
    expected = tuple(targets.shape) if isinstance(targets, Tensor) else (len(targets), targets.num_classes)
    if isinstance(targets, Tensor) and targets.dim() == 1:
        raise UsageError("these targets are class numbers (B,), not distributions; use torch's cross_entropy for them")
    if tuple(logits.shape) != expected:
        raise UsageError(f"logits have shape {tuple(logits.shape)}, the targets need {expected}")


def _reduce(loss: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "mean":
        return loss.mean()
    if reduction == "sum":
        return loss.sum()
    if reduction == "none":
        return loss
    raise UsageError(f"reduction must be mean, sum or none, got {reduction!r}")
