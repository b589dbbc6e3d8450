"""What no label may say, whoever wrote it: a NaN or a distribution of nothing would poison a training in silence."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ferkd_data.errors import ShardError
from ferkd_data.shards.columns import ShardLabels

MAX_TOTAL = 1 + 2**-10
"""Of a crop's probabilities: rounding to float16 raises a sum of 1 by at most half of the excess."""


def check_probabilities(path: str, labels: ShardLabels) -> None:
    """Raises ShardError that names the first crop whose probabilities are not descending numbers of a sum in (0, 1]."""
    prob = labels.class_prob.astype(np.float32)
    total = prob.sum(axis=2)
    rules = {
        "are not all finite": np.isfinite(total),
        "are not descending": (prob[:, :, 1:] <= prob[:, :, :-1]).all(axis=2),
        "are negative": prob[:, :, -1] >= 0,
        "are all 0": prob[:, :, 0] > 0,
        "sum to more than 1": total <= MAX_TOTAL,
    }
    for what, fine in rules.items():
        if not fine.all():
            raise ShardError(f"{path}: {_first(labels, fine, prob)} {what}; do not train on this label set")


def check_classes(path: str, labels: ShardLabels, num_classes: int) -> None:
    """Raises ShardError for a class that the label set does not have."""
    if len(labels) and labels.class_index.max() >= num_classes:
        raise ShardError(f"{path}: class {labels.class_index.max()} in a label set of {num_classes} classes")


def _first(labels: ShardLabels, fine: npt.NDArray[np.bool_], prob: npt.NDArray[np.float32]) -> str:
    row, crop = np.argwhere(~fine)[0].tolist()
    return f"the probabilities {prob[row, crop].tolist()} of crop {crop} of image {labels.keys[row]!r}"
