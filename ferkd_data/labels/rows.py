"""What a shard holds, as arrays: the one form that writers take and readers give, whatever the layout.

Legend: R images (rows), N crops per image, k kept classes.

Probabilities to soft labels: the top-k, as they are stored.

Legend: N crops, C classes, k kept classes. Ranking uses the probabilities as stored (float16), so that a reader can
check the order, ties included, from the file alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ferkd_data.crops import Crops
from ferkd_data.errors import UsageError

UNKNOWN_TARGET = -1
SHARDS_PER_FOLDER = 500
"""Image shards whose files lie in one folder: the hub takes 10,000 files in each, so 20 crop blocks."""
DIGEST_BYTES = 16
NO_OPERATIONS: npt.NDArray[np.uint16] = np.empty((0, 0), np.uint16)
"""Stands for W = 0 in rows that are made without saying anything of operations; gets the rows' own shape."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageLabels:
    """Everything the label set knows of one image."""

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
        if self.operations is NO_OPERATIONS:
            object.__setattr__(self, "operations", np.empty((*self.flip.shape, 0), np.uint16))

    @property
    def crops(self) -> Crops:
        return Crops(boxes=self.boxes, flip=self.flip, operations=self.operations)


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardLabels:
    """The rows of one image shard: `ImageLabels`, every array with a leading axis R."""

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
        """The same rows with crops `start` .. `stop - 1` only."""
        return replace(self, **{name: getattr(self, name)[:, start:stop] for name in CROP_FIELDS})

    def take(self, rows: npt.NDArray[np.int64]) -> ShardLabels:
        """The rows of these numbers, in their order."""
        arrays = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "keys"}
        return replace(self, keys=[self.keys[row] for row in rows.tolist()], **arrays)

    @classmethod
    def from_rows(cls, rows: Sequence[ImageLabels]) -> ShardLabels:
        """Stack at least one row."""
        digests = np.frombuffer(b"".join(row.image_digest for row in rows), np.uint8)
        return cls(
            keys=[row.key for row in rows],
            image_digest=digests.reshape(len(rows), DIGEST_BYTES),
            height=np.array([row.height for row in rows], np.uint16),
            width=np.array([row.width for row in rows], np.uint16),
            target=np.array([row.target for row in rows], np.int32),
            **{name: np.stack([getattr(row, name) for row in rows]) for name in CROP_FIELDS},
        )


CROP_FIELDS = ("boxes", "flip", "class_index", "class_prob", "target_prob", "bucket", "operations")
"""The fields with an axis N."""


def concat_crops(parts: Sequence[ShardLabels]) -> ShardLabels:
    """Crop blocks of the same rows, one after the other along N."""
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts], axis=1) for name in CROP_FIELDS
    }
    return replace(parts[0], **joined)


def same_labels(a: ShardLabels, b: ShardLabels) -> bool:
    """Whether two shards hold the same rows, value by value (NaN equals NaN)."""
    if list(a.keys) != list(b.keys):
        return False
    names = [f.name for f in fields(ShardLabels) if f.name != "keys"]
    return all(np.array_equal(getattr(a, name), getattr(b, name), equal_nan=name == "target_prob") for name in names)


def to_float16(values: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    """Stored probabilities as float16; those too large for it become infinite, which no check lets through."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16, copy=False)


def identity_of_images(labels: ShardLabels) -> bytes:
    """16 bytes that are the same where the keys, image digests, sizes and targets are: BLAKE2b-128."""
    state = hashlib.blake2b("\0".join(labels.keys).encode("utf-8", "surrogatepass"), digest_size=16)
    for values in (labels.image_digest, labels.height, labels.width, labels.target):
        state.update(np.ascontiguousarray(values).data)
    return state.digest()


def shard_folder(top: str, shard: int) -> str:
    """The folder of a shard's files: `top` itself for the first `SHARDS_PER_FOLDER`, then `top/001` and so on."""
    number = shard // SHARDS_PER_FOLDER
    return f"{top}/{number:03d}" if number else top


def class_index_dtype(num_classes: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if num_classes <= 65536 else np.uint32


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
