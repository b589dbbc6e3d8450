"""Losses on sparse targets, without ever making a target of shape (B, C).

Legend: B crops, C classes, K sparse entries.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ferkd_data.errors import UsageError
from ferkd_data.targets import SoftTargets

Reduction: TypeAlias = Literal["mean", "sum", "none"]


def soft_cross_entropy(logits: Tensor, targets: SoftTargets | Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """-sum over classes of target * log_softmax(logits), for logits (B, C) and SoftTargets or dense targets (B, C).

    Computed in float32, also under autocast. Raises UsageError when the number of classes differs.
    """
    if isinstance(targets, Tensor):
        loss = -(targets.float() * logits.float().log_softmax(dim=1)).sum(dim=1)
    else:
        _check(logits, targets)
        loss = _SparseCrossEntropy.apply(logits, targets.index, targets.weight, targets.floor)
    return _reduce(loss, reduction)


def kl_div(logits: Tensor, targets: SoftTargets, *, temperature: float = 1.0, reduction: Reduction = "mean") -> Tensor:
    """KL(target || softmax(logits / T)) * T^2; with "mean", over the B rows (PyTorch's "batchmean")."""
    loss = soft_cross_entropy(logits / temperature, targets, reduction="none") - entropy(targets)
    return _reduce(loss * temperature**2, reduction)


def entropy(targets: SoftTargets) -> Tensor:
    """The entropy (B,) of each target, in nats."""
    same = targets.index[:, :, None] == targets.index[:, None, :]
    # Entries of one class count once, with their weights added up.
    merged = (same * targets.weight[:, None, :]).sum(dim=2) + targets.floor[:, None]
    once = 1 / same.sum(dim=2)
    others = targets.num_classes - once.sum(dim=1)
    return -(once * torch.xlogy(merged, merged.clamp(min=0))).sum(dim=1) - others * torch.xlogy(
        targets.floor, targets.floor
    )


class _SparseCrossEntropy(torch.autograd.Function):
    """The gradient is softmax * total - floor, minus the weights where they belong: one buffer of (B, C)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, weight: Tensor, floor: Tensor) -> Tensor:
        z = logits.float()
        lse = z.logsumexp(dim=1)
        picked = z.gather(1, index) - lse[:, None]
        ctx.save_for_backward(logits, lse, index, weight, floor)
        return -(weight * picked).sum(dim=1) - floor * (z - lse[:, None]).sum(dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, lse, index, weight, floor = ctx.saved_tensors
        total = weight.sum(dim=1) + floor * logits.shape[1]
        gradient = logits.float().sub(lse[:, None]).exp_().mul_((total * grad)[:, None]).sub_((floor * grad)[:, None])
        gradient.scatter_add_(1, index, -weight * grad[:, None])
        return gradient.to(logits.dtype), None, None, None


def _check(logits: Tensor, targets: SoftTargets) -> None:
    expected = (len(targets), targets.num_classes)
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
