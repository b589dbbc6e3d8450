"""Several teachers' logits to one distribution.

Legend: B crops, C classes, T teachers. Weights are divided by their sum first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ferkd_data.errors import TeacherError, UsageError

Ensemble: TypeAlias = Literal["mean", "logits", "geometric"]


def combine(
    logits: Sequence[Tensor], *, weights: Sequence[float], temperatures: Sequence[float], mode: Ensemble
) -> Tensor:
    """One distribution (B, C) float32 from the logits (B, C) of each teacher.

    mean: the weighted mean of the softmaxes. logits: the softmax of the weighted mean of the logits. geometric: the
    normalised weighted geometric mean of the softmaxes. A teacher's logits are divided by its temperature first.
    """
    total = sum(weights)
    shares = [weight / total for weight in weights]
    scaled = [z.float() / t for z, t in zip(logits, temperatures, strict=True)]
    if mode == "mean":
        return _weighted_sum([z.softmax(dim=1) for z in scaled], shares)
    if mode == "logits":
        return _weighted_sum(scaled, shares).softmax(dim=1)
    if mode == "geometric":
        # Normalising the product of powers is a softmax of the weighted mean of log-probabilities.
        return _weighted_sum([z.log_softmax(dim=1) for z in scaled], shares).softmax(dim=1)
    raise UsageError(f"ensemble must be mean, logits or geometric, got {mode!r}")


def check_logits(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """A boolean scalar tensor, true where a teacher's output (B, C) cannot be right; see `raise_if_wrong`.

    Wrong are NaN and infinities, also those that the temperature makes, and a batch of two or more rows in which all
    classes are equally likely everywhere: logits that differ by too little to show in a probability are as empty.
    """
    scaled = logits.float() / temperature
    wrong = ~torch.isfinite(scaled).all()
    if logits.shape[0] > 1 and logits.shape[1] > 1:
        prob = scaled.softmax(dim=1)
        wrong = wrong | (prob == prob[:, :1]).all()
    return wrong


def raise_if_wrong(wrong: Tensor, teacher: str) -> None:
    """Waits for the device. Raises TeacherError that names the teacher."""
    if bool(wrong):
        raise TeacherError(
            f"teacher {teacher} gave NaN or infinite logits, or the same for every class on a whole batch; "
            "check its weights and precision (--precision fp32) before labelling any further"
        )


def _weighted_sum(parts: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    total = parts[0] * shares[0]
    for part, share in zip(parts[1:], shares[1:], strict=True):
        total = total.add_(part, alpha=share)
    return total
