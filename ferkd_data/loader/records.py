"""A crop block's rows as records of one size, which many processes map into their memory.

Legend: N crops of a block, k kept classes.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from ferkd_data import rng
from ferkd_data.label_set import LabelSet
from ferkd_data.shards.columns import ShardLabels, class_index_dtype

CHECKSUM = "crc32"
"""The last field of a record."""
Records = npt.NDArray[np.void]
PLACE = ("image_offset", "image_bytes")
"""Where an image lies in its shard's tar, in layout webdataset."""


def record_dtype(labels: LabelSet, block: int) -> np.dtype[np.void]:
    manifest = labels.manifest
    num_crops, top_k = manifest.block_crops(block), manifest.top_k
    return np.dtype(
        [
            ("key_hash", "<u8"),
            ("image_digest", "u1", (16,)),
            ("height", "<u2"),
            ("width", "<u2"),
            ("target", "<i4"),
            ("boxes", "<u2", (num_crops, 4)),
            ("class_index", class_index_dtype(manifest.num_classes), (num_crops, top_k)),
            ("class_prob", "<f2", (num_crops, top_k)),
            ("target_prob", "<f2", (num_crops,)),
            ("flip", "?", (num_crops,)),
            ("bucket", "u1", (num_crops,)),
            ("operations", "<u2", (num_crops, manifest.operation_words)),
            *((name, "<i8") for name in PLACE if manifest.layout == "webdataset"),
            (CHECKSUM, "<u4"),
        ]
    )


def fill(part: Records, rows: ShardLabels, labels: LabelSet, shard: int) -> None:
    """Write `rows`, a crop block of one shard, into `part` of as many records. Raises ShardError, RemoteError."""
    part["key_hash"] = rng.hashes64(rows.keys)
    if labels.manifest.layout == "webdataset":
        for name, places in zip(PLACE, labels.image_places(shard).T, strict=True):
            part[name] = places
    for name in part.dtype.names or ():
        if name not in ("key_hash", CHECKSUM, *PLACE):
            part[name] = getattr(rows, name)
    part[CHECKSUM] = _checksums(part)


def are_intact(records: Records) -> bool:
    """Whether these records, which lie side by side, are what `fill` wrote: a disk may return something else."""
    return bool((_checksums(records) == records[CHECKSUM]).all())


def _checksums(records: Records) -> npt.NDArray[np.uint32]:
    """CRC-32 of each record up to its checksum: any flipped bit changes it."""
    size = records.dtype.itemsize
    content = np.ascontiguousarray(records).view(np.uint8).data
    ends = range(size, len(content) + 1, size)
    return np.fromiter((zlib.crc32(content[end - size : end - 4]) for end in ends), np.uint32, len(records))
