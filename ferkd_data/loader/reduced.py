"""Decoding large JPEGs at 1/2, 1/4 or 1/8 of their sides, where all crops that are drawn remain larger than the output.

The pixels differ from those of the whole image: see docs/loader.md for how much.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ferkd_data.crops import Crops

DIVISORS = (8, 4, 2)
MARGIN = 2
"""A reduced crop has at least so many times the pixels of the output along each side."""


def divisor_for(boxes_N4: npt.NDArray[np.uint16], size: int) -> int:
    """The largest divisor by which every box still has MARGIN * `size` pixels along each side; 1 for none.

    >>> divisor_for(np.array([[0, 0, 900, 1800]], np.uint16), 224)
    2
    """
    smallest = int(boxes_N4[:, 2:].min())
    return next((divisor for divisor in DIVISORS if smallest >= divisor * MARGIN * size), 1)


def reduced_crops(crops: Crops, divisor: int, height: int, width: int) -> Crops:
    """The crops within an image of `height` x `width` that was reduced by `divisor`; edges to the nearest pixel."""
    boxes = crops.boxes.astype(np.int64)
    start = np.rint(boxes[:, :2] / divisor).astype(np.int64)
    end = np.minimum(np.rint((boxes[:, :2] + boxes[:, 2:]) / divisor).astype(np.int64), [height, width])
    return replace(crops, boxes=np.concatenate([start, end - start], axis=1).astype(np.uint16))
