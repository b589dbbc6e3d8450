"""Recorded augmentations: operations on a crop after it was cut, resized and flipped, replayed to the pixel.

A crop is box + flip + recorded operations. `distribution` draws the operations when a label set is built; `operations`
defines each of them in integers, so that every reader gets the same pixels.
"""

from __future__ import annotations

from ferkd_data.augment.distribution import Augmentation, draw_operations, num_words, parse_augmentations
from ferkd_data.augment.operations import OPERATIONS, Operations, apply_operations

__all__ = [
    "OPERATIONS",
    "Augmentation",
    "Operations",
    "apply_operations",
    "draw_operations",
    "num_words",
    "parse_augmentations",
]
