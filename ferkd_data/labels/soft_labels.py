"""Several teachers' logits to one distribution, and that to the soft labels that are stored: its top-k.

Ranking uses the probabilities as they are stored (float16), so that a reader can check the order, ties included, from
the file alone.

Legend: B crops of a batch, C classes, k kept classes, T teachers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ferkd_data.errors import TeacherError, UsageError
from ferkd_data.labels.rows import CLASS_BITS, UNKNOWN_TARGET, class_index_dtype

EnsembleMode: TypeAlias = Literal["mean", "logits", "geometric"]


def combine(
    logits: Sequence[Tensor], *, weights: Sequence[float], temperatures: Sequence[float], mode: EnsembleMode
) -> Tensor:
    """Combine the logits (B, C) of each teacher into one distribution (B, C) float32.

    mean: the weighted mean of the softmaxes. logits: the softmax of the weighted mean of the logits. geometric: the
    normalised weighted geometric mean of the softmaxes. A teacher's logits are divided by its temperature first, and
    weights by their sum. Raises UsageError for another mode.
    """
    total = sum(weights)
    shares = [weight / total for weight in weights]
    # float32 whatever the teacher's precision: in half precision, a softmax of 1,000 classes misses 1 by up to 0.01.
    scaled = [z.float() / t for z, t in zip(logits, temperatures, strict=True)]
    if mode == "mean":
        return _weighted_sum([z.softmax(dim=1) for z in scaled], shares)
    if mode == "logits":
        return _weighted_sum(scaled, shares).softmax(dim=1)
    if mode == "geometric":
        # prod(p_t ** w_t) / sum over classes = softmax(sum of w_t * log p_t)
        return _weighted_sum([z.log_softmax(dim=1) for z in scaled], shares).softmax(dim=1)
    raise UsageError(f"ensemble must be mean, logits or geometric, got {mode!r}")


def check_logits(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return a boolean scalar tensor: True where a teacher's output (B, C) cannot be right (see `raise_if_wrong`).

    NaN and infinities are wrong, also those that the temperature makes. So is a batch of two or more rows in which all
    classes have the same probability everywhere, also where the logits differ by too little to show in it.
    """
    scaled = logits.float() / temperature
    # A tensor, not a bool: asking for the value here would make the host wait for the device.
    wrong = ~torch.isfinite(scaled).all()
    if logits.shape[0] > 1 and logits.shape[1] > 1:
        prob = scaled.softmax(dim=1)
        wrong = wrong | (prob == prob[:, :1]).all()
    return wrong


def raise_if_wrong(wrong: Tensor, teacher: object) -> None:
    """Raise TeacherError that names `teacher`, where `wrong` is True. Waits for the device."""
    if bool(wrong):
        raise TeacherError(
            f"teacher {teacher} gave NaN or infinite logits, or the same for every class on a whole batch; "
            "check its weights and precision (--precision fp32) before labelling any further"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SoftLabels:
    """Soft labels of a batch of crops, on the host."""

    class_index: npt.NDArray[Any]
    """(B, k) uint16, or uint32 above 65,536 classes."""
    class_prob: npt.NDArray[np.float16]
    """(B, k), descending."""
    target_prob: npt.NDArray[np.float16]
    """(B,), NaN where the target is unknown."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceLabels:
    """Soft labels of a batch of crops, on the teachers' device; the fields of `SoftLabels`."""

    class_index: Tensor
    class_prob: Tensor
    target_prob: Tensor
    num_classes: int

    def to_numpy(self) -> SoftLabels:
        """Copy to the host. Waits for the device."""
        index_dtype = class_index_dtype(self.num_classes)
        return SoftLabels(
            class_index=self.class_index.cpu().numpy().astype(index_dtype),
            class_prob=self.class_prob.cpu().numpy(),
            target_prob=self.target_prob.cpu().numpy(),
        )


def soft_labels(prob_BC: Tensor, target_B: Tensor, *, top_k: int) -> DeviceLabels:
    """Return the `top_k` most probable classes of each row, descending, ties by class index.

    `prob_BC` is float32, `target_B` int64 with -1 where unknown, both on the same device. Raises UsageError unless
    `top_k` is 1 .. C.
    """
    num_classes = prob_BC.shape[1]
    if not 1 <= top_k <= num_classes:
        raise UsageError(f"top_k must be 1..{num_classes}, the number of classes; got {top_k}")
    stored = prob_BC.to(torch.float16)
    # As `rows.rank_of`, on the device.
    rank = stored.view(torch.int16).to(torch.int64) << CLASS_BITS
    rank += (1 << CLASS_BITS) - 1 - torch.arange(num_classes, device=prob_BC.device)
    best = rank.topk(top_k, dim=1, sorted=True).values
    class_index = (1 << CLASS_BITS) - 1 - (best & ((1 << CLASS_BITS) - 1))
    # Unknown targets (-1) take class 0 here, to keep the index in range, and NaN below.
    target_prob = stored.gather(1, target_B.clamp(min=0)[:, None])[:, 0]
    return DeviceLabels(
        class_index=class_index,
        class_prob=stored.gather(1, class_index),
        target_prob=torch.where(target_B == UNKNOWN_TARGET, torch.nan, target_prob),
        num_classes=num_classes,
    )


def _weighted_sum(parts: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    # A tensor of its own, which the additions may write into.
    total = parts[0] * shares[0]
    for part, share in zip(parts[1:], shares[1:], strict=True):
        total = total.add_(part, alpha=share)
    return total
