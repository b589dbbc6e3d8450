"""Probabilities to soft labels: the top-k, as they are stored.

Legend: N crops, C classes, k kept classes. Ranking uses the probabilities as stored (float16), so that a reader can
check the order, ties included, from the file alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ferkd_data.errors import UsageError
from ferkd_data.shards.columns import UNKNOWN_TARGET, class_index_dtype

CLASS_BITS = 24
"""Bits of the ranking key that hold the class: 16.7 million classes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SoftLabels:
    class_index: npt.NDArray[Any]
    """(N, k) uint16, or uint32 above 65,536 classes."""
    class_prob: npt.NDArray[np.float16]
    """(N, k), descending."""
    target_prob: npt.NDArray[np.float16]
    """(N,), NaN where the target is unknown."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceLabels:
    """Soft labels that are still on the teacher's device."""

    class_index: Tensor
    class_prob: Tensor
    target_prob: Tensor
    num_classes: int

    def to_numpy(self) -> SoftLabels:
        """Waits for the device."""
        index_dtype = class_index_dtype(self.num_classes)
        return SoftLabels(
            class_index=self.class_index.cpu().numpy().astype(index_dtype),
            class_prob=self.class_prob.cpu().numpy(),
            target_prob=self.target_prob.cpu().numpy(),
        )


def soft_labels(prob_NC: Tensor, target_N: Tensor, *, top_k: int) -> DeviceLabels:
    """The k most probable classes of each row, descending, ties by class index; k from 1 to C.

    `prob_NC` is float32, `target_N` int64 with -1 where unknown, both on the same device.

    Raises UsageError when k is larger than C.
    """
    num_classes = prob_NC.shape[1]
    if not 1 <= top_k <= num_classes:
        raise UsageError(f"top_k must be 1..{num_classes}, the number of classes; got {top_k}")
    stored = prob_NC.to(torch.float16)
    # Non-negative floats sort like their bits, so (bits, reversed class) in one integer ranks with ties decided.
    rank = stored.view(torch.int16).to(torch.int64) << CLASS_BITS
    rank += (1 << CLASS_BITS) - 1 - torch.arange(num_classes, device=prob_NC.device)
    best = rank.topk(top_k, dim=1, sorted=True).values
    class_index = (1 << CLASS_BITS) - 1 - (best & ((1 << CLASS_BITS) - 1))
    target_prob = stored.gather(1, target_N.clamp(min=0)[:, None])[:, 0]
    return DeviceLabels(
        class_index=class_index,
        class_prob=stored.gather(1, class_index),
        target_prob=torch.where(target_N == UNKNOWN_TARGET, torch.nan, target_prob),
        num_classes=num_classes,
    )
