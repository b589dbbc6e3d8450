"""The contents of a shard as arrays: the one form that writers take and readers return, whatever the layout.

Legend: R images (rows), N crops per image, k kept classes, W words of a crop's recorded operations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd_data.crops import Crops

UNKNOWN_TARGET = -1
SHARDS_PER_FOLDER = 500
"""Image shards whose files lie in one folder. The hub takes 10,000 files in each, so 20 crop blocks fit."""
DIGEST_BYTES = 16
CLASS_BITS = 24
"""Bits that hold any class number."""
NO_OPERATIONS: npt.NDArray[np.uint16] = np.empty((0, 0), np.uint16)
"""Default of rows without recorded operations (W = 0). It is replaced by an array of the rows' own shape."""


def rank_of(prob: npt.NDArray[np.float16], index: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return integers that rank classes by their stored probability, and equal probabilities by the smaller class.

    Bits of non-negative floats sort like the floats; the lower bits hold (most classes - class).
    """
    rank = prob.view(np.int16).astype(np.int64) << CLASS_BITS
    return rank + ((1 << CLASS_BITS) - 1 - index.astype(np.int64))


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageLabels:
    """The row of one image."""

    key: str
    image_digest: bytes
    """16 bytes: BLAKE2b-128 of the encoded image."""
    height: int
    width: int
    target: int
    """Ground-truth class, -1 where unknown."""
    boxes: npt.NDArray[np.uint16]
    """(N, 4): top, left, height, width."""
    flip: npt.NDArray[np.bool_]
    """(N,)"""
    class_index: npt.NDArray[Any]
    """(N, k) uint16, or uint32 above 65,536 classes; descending by probability."""
    class_prob: npt.NDArray[np.float16]
    """(N, k)"""
    target_prob: npt.NDArray[np.float16]
    """(N,) the ensemble's probability of the ground truth, NaN where unknown."""
    bucket: npt.NDArray[np.uint8]
    """(N,)"""
    operations: npt.NDArray[np.uint16] = field(default_factory=lambda: NO_OPERATIONS)
    """(N, W): recorded augmentations, as `augment.Operations.pack` puts them; W = 0 where none are."""

    def __post_init__(self) -> None:
        # Not a default of the field, since its shape is that of the row; and frozen, so past the class's __setattr__.
        if self.operations is NO_OPERATIONS:
            object.__setattr__(self, "operations", np.empty((*self.flip.shape, 0), np.uint16))

    @property
    def crops(self) -> Crops:
        return Crops(boxes=self.boxes, flip=self.flip, operations=self.operations)


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardLabels:
    """The rows of one image shard: the fields of `ImageLabels`, each with a leading axis R."""

    keys: Sequence[str]
    image_digest: npt.NDArray[np.uint8]
    """(R, 16)"""
    height: npt.NDArray[np.uint16]
    """(R,)"""
    width: npt.NDArray[np.uint16]
    """(R,)"""
    target: npt.NDArray[np.int32]
    """(R,)"""
    boxes: npt.NDArray[np.uint16]
    """(R, N, 4)"""
    flip: npt.NDArray[np.bool_]
    """(R, N)"""
    class_index: npt.NDArray[Any]
    """(R, N, k)"""
    class_prob: npt.NDArray[np.float16]
    """(R, N, k)"""
    target_prob: npt.NDArray[np.float16]
    """(R, N)"""
    bucket: npt.NDArray[np.uint8]
    """(R, N)"""
    operations: npt.NDArray[np.uint16] = field(default_factory=lambda: NO_OPERATIONS)
    """(R, N, W)"""

    def __post_init__(self) -> None:
        if self.operations is NO_OPERATIONS:
            object.__setattr__(self, "operations", np.empty((*self.flip.shape, 0), np.uint16))

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_crops(self) -> int:
        return int(self.flip.shape[1])

    def __getitem__(self, row: int) -> ImageLabels:
        return ImageLabels(
            key=self.keys[row],
            image_digest=self.image_digest[row].tobytes(),
            height=int(self.height[row]),
            width=int(self.width[row]),
            target=int(self.target[row]),
            **{name: getattr(self, name)[row] for name in CROP_FIELDS},
        )

    def __iter__(self) -> Iterator[ImageLabels]:
        return (self[row] for row in range(len(self)))

    def crop_range(self, start: int, stop: int) -> ShardLabels:
        """Return the same rows with crops `start` .. `stop - 1` only."""
        # Views: the blocks of a shard share the memory of the whole.
        return replace(self, **{name: getattr(self, name)[:, start:stop] for name in CROP_FIELDS})

    def take(self, rows: npt.NDArray[np.int64]) -> ShardLabels:
        """Return the rows of these numbers, in their order."""
        arrays = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "keys"}
        return replace(self, keys=[self.keys[row] for row in rows.tolist()], **arrays)

    @classmethod
    def from_rows(cls, rows: Sequence[ImageLabels]) -> ShardLabels:
        """Stack rows, at least one, along a new first axis."""
        digests = np.frombuffer(b"".join(row.image_digest for row in rows), np.uint8)
        return cls(
            keys=[row.key for row in rows],
            image_digest=digests.reshape(len(rows), DIGEST_BYTES),
            # Sides fit uint16: `crops.check_size` has refused longer ones.
            height=np.array([row.height for row in rows], np.uint16),
            width=np.array([row.width for row in rows], np.uint16),
            target=np.array([row.target for row in rows], np.int32),
            **{name: np.stack([getattr(row, name) for row in rows]) for name in CROP_FIELDS},
        )


CROP_FIELDS = ("boxes", "flip", "class_index", "class_prob", "target_prob", "bucket", "operations")
"""The fields with an axis N."""


def concat_crops(parts: Sequence[ShardLabels]) -> ShardLabels:
    """Join crop blocks of the same rows along N."""
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts], axis=1) for name in CROP_FIELDS
    }
    return replace(parts[0], **joined)


def to_float16(values: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    """Convert stored probabilities to float16. Values too large for it become infinite, which every check refuses."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16, copy=False)


def identity_of_images(labels: ShardLabels) -> bytes:
    """Return the BLAKE2b-128 (16 bytes) of the keys, image digests, sizes and targets."""
    # Keys hold no control characters (docs/format.md), so the joint of two keys cannot be mistaken. Files of others may
    # hold anything, and must not end in an encoding error here.
    state = hashlib.blake2b("\0".join(labels.keys).encode("utf-8", "surrogatepass"), digest_size=16)
    for values in (labels.image_digest, labels.height, labels.width, labels.target):
        state.update(np.ascontiguousarray(values).data)
    return state.digest()


def shard_folder(top: str, shard: int) -> str:
    """Return the folder of a shard's files: `top` for the first `SHARDS_PER_FOLDER`, then `top/001` and so on."""
    number = shard // SHARDS_PER_FOLDER
    return f"{top}/{number:03d}" if number else top


def class_index_dtype(num_classes: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if num_classes <= 65536 else np.uint32
